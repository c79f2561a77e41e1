"""Programs that add to the same tile one after another, in an order that does not depend on their speed.

Program n publishes how far it has come; the program after it in the order waits for that before it adds to what both
share. Plain loads and stores then suffice, and every run adds in the same order. A program must only wait for one that
is sure to run: programs number themselves by a ticket as they start, so whoever it waits for has started before it.
"""

import triton
import triton.language as tl


@triton.jit
def wait_for(Progress, target, NVIDIA: tl.constexpr):
    """Returns (0) once Progress has reached `target`, with all that was written before it was published visible.

    Every thread polls, in assembly: a `while` would keep the compiler from pipelining the loop around it."""
    if NVIDIA:
        return tl.inline_asm_elementwise(
            """{
            .reg .pred waiting;
            .reg .b32 reached;
            again: ld.acquire.gpu.global.s32 reached, [$1];
            setp.lt.s32 waiting, reached, $2;
            @waiting bra again;
            mov.b32 $0, 0;
            }""",
            "=r,l,r", [Progress.to(tl.int64), target], tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        while tl.atomic_add(Progress, 0, sem="acquire") < target:
            pass
        return 0


@triton.jit
def publish(Progress, value, NVIDIA: tl.constexpr):
    """Sets Progress to `value` after everything that the program has written so far, and returns 0 then."""
    if NVIDIA:
        return tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .b32 thread;
            bar.sync 0;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first st.release.gpu.global.s32 [$1], $2;
            mov.b32 $0, 0;
            }""",
            "=r,l,r", [Progress.to(tl.int64), value], tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.debug_barrier()
        tl.atomic_xchg(Progress, value, sem="release")
        return 0
