"""wgmma fragment and shared-memory layouts, element by element, against their definitions in the PTX ISA."""

import pytest
import torch

from tests.ptxsim import Options, Report
from tests.ptxsim.snippet import snippet

M, K = 64, 16
WARPGROUP = 128
A_BYTES, B_BYTES = 16384, 32768
UNIT = 8  # elements of 16 bytes, which stay together


def layout(size: int, swizzle: int, along_k: bool, first_k: int = 0) -> tuple[list[int], int, int, int]:
    """For a [size, K] operand: the element offset of (mn, k) at mn * K + k, leading and stride byte offsets, bytes.
    It may be the columns from first_k on of a wider one that lies in the same patterns.

    A swizzled operand repeats a pattern of 8 rows of `swizzle` bytes; rows run along k, or along mn if not along_k.
    Without a swizzle the patterns are 8 rows of 16 bytes, each in one piece.
    """
    row = max(swizzle // 2, UNIT)  # elements
    pattern = 8 * row
    inner, outer = (K, size) if along_k else (size, K)
    across = -(-inner // row)  # patterns side by side
    offsets = []
    for mn in range(size):
        for k in range(K):
            i, o = (first_k + k, mn) if along_k else (mn, k)
            if swizzle:
                place = (o // 8 * across + i // row) * pattern + o % 8 * row + i % row
            else:
                place = (i // UNIT * (outer // 8) + o // 8) * pattern + o % 8 * UNIT + i % UNIT
            unit, rest = divmod(place, UNIT)
            unit ^= unit // 8 % 8 & (max(swizzle, 16) // 16 - 1)
            offsets.append(unit * UNIT + rest)
    beside, below = 2 * pattern, 2 * pattern * across
    if not swizzle:  # side by side lies far, and the next 8 rows near
        beside, below = 2 * pattern * (outer // 8), 2 * pattern
    # Leading is the step along k without a swizzle, and the step along mn from pattern to pattern with one.
    leading, stride = beside, below
    if not swizzle and not along_k:
        leading, stride = below, beside
    return offsets, leading, stride, 2 * pattern * across * (outer // 8)


def descriptor(start: int, leading: int, stride: int, swizzle: int) -> int:
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def spread(matrix: torch.Tensor, offsets: list[int], size: int) -> torch.Tensor:
    """The operand as it lies in shared memory."""
    memory = torch.full((size // 2,), float("nan"), dtype=matrix.dtype)
    memory[torch.tensor(offsets)] = matrix.flatten()
    return memory


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    a_layout: tuple[int, bool] | None,
    b_layout: tuple[int, bool],
    late: bool = True,
    first_k: int = 0,
) -> tuple[Report, torch.Tensor]:
    """D[64, n] of one wgmma as (thread, register); a_layout None passes A in registers, given as [thread, 4] of b32."""
    n = b.shape[0]
    registers = n // 2
    kind = {torch.float16: "f16", torch.bfloat16: "bf16"}[b.dtype]
    b_offsets, b_leading, b_stride, b_bytes = layout(n, *b_layout, first_k)
    images = [spread(b, b_offsets, b_bytes)]
    b_at = A_BYTES
    if a_layout is None:
        images.append(a)
        a_operand = "{%q0, %q1, %q2, %q3}"
        fill_a = "mad.wide.u32 %at, %t, 16, %x2; ld.global.v4.b32 {%q0, %q1, %q2, %q3}, [%at];"
    else:
        a_offsets, a_leading, a_stride, a_bytes = layout(M, *a_layout)
        images.append(spread(a, a_offsets, a_bytes))
        a_operand = "%da"
        fill_a = copy_in("%x2", 0, a_bytes, "A") + f"mov.b64 %da, {descriptor(0, a_leading, a_stride, a_layout[0])};"
    out = torch.full((WARPGROUP, registers), float("nan"))
    d = ", ".join(f"%d{i}" for i in range(registers))
    transposes = "" if a_layout is None else f"{int(not a_layout[1])}, "
    body = copy_in("%x1", b_at, b_bytes, "B") + fill_a
    body += f"mov.b64 %db, {descriptor(b_at + 2 * first_k, b_leading, b_stride, b_layout[0])};"
    body += "fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;"
    body += f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{d}}}, {a_operand}, %db, 0, 1, 1, "
    body += f"{transposes}{int(not b_layout[1])}; wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
    body += f"mad.wide.u32 %at, %t, {4 * registers}, %x0;"
    body += "".join(f"st.global.f32 [%at+{4 * i}], %d{i};" for i in range(registers))
    declare = f".reg .f32 %d<{registers}>; .reg .b32 %q<4>, %i, %v, %w; .reg .b64 %da, %db;"
    lanes = torch.zeros(WARPGROUP, dtype=torch.int32)
    report = snippet(
        body, [lanes], [], declare=declare, shared=A_BYTES + B_BYTES, extra=[out, *images], options=Options(late=late)
    )
    return report, out


def copy_in(source: str, to: int, size: int, name: str) -> str:
    """`size` bytes from a tensor to shared memory at `to`, a word a thread and turn."""
    return f"""mov.u32 %i, %t; {name}: setp.ge.u32 %p, %i, {size // 4}; @%p bra {name}END;
    mad.wide.u32 %at, %i, 4, {source}; ld.global.b32 %v, [%at]; shl.b32 %w, %i, 2; add.u32 %w, %w, %s;
    st.shared.b32 [%w+{to}], %v; add.u32 %i, %i, {WARPGROUP}; bra {name}; {name}END:"""


def in_fragments(matrix: torch.Tensor) -> torch.Tensor:
    """[64, n] as (thread, register): warp w holds rows 16 w and up, lane l row l / 4, pairs of columns 2 (l % 4)."""
    registers = matrix.shape[1] // 2
    out = torch.empty(WARPGROUP, registers)
    for thread in range(WARPGROUP):
        warp, lane = divmod(thread, 32)
        for i in range(registers):
            row = 16 * warp + lane // 4 + 8 * (i // 2 % 2)
            out[thread, i] = matrix[row, 8 * (i // 4) + 2 * (lane % 4) + i % 2]
    return out


def a_in_registers(a: torch.Tensor) -> torch.Tensor:
    """A [64, 16] as four words a thread: rows 0 and 8, then columns 8 and up; two columns a word."""
    out = torch.empty(WARPGROUP, 4, 2, dtype=a.dtype)
    for thread in range(WARPGROUP):
        warp, lane = divmod(thread, 32)
        for i in range(4):
            row, column = 16 * warp + lane // 4 + 8 * (i % 2), 2 * (lane % 4) + 8 * (i // 2)
            out[thread, i] = a[row, column : column + 2]
    return out.flatten()


def small_integers(*shape: int) -> torch.Tensor:
    """Products and sums of these are exact, so that a misplaced element shows and rounding does not."""
    return torch.randint(-8, 9, shape).float()


@pytest.mark.parametrize("n", [8, 24, 64, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_operands_without_a_swizzle(n: int, dtype: torch.dtype) -> None:
    a, b = small_integers(M, K), small_integers(n, K)
    report, out = product(a.to(dtype), b.to(dtype), (0, True), (0, True))
    report.check()
    assert torch.equal(out, in_fragments(a @ b.T))


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("a_along_k", [True, False])
@pytest.mark.parametrize("b_along_k", [True, False])
def test_every_layout_of_both_operands(swizzle: int, a_along_k: bool, b_along_k: bool) -> None:
    a, b = small_integers(M, K), small_integers(64, K)
    report, out = product(a.half(), b.half(), (swizzle, a_along_k), (swizzle, b_along_k))
    report.check()
    assert torch.equal(out, in_fragments(a @ b.T))


def test_a_in_registers() -> None:
    a, b = small_integers(M, K), small_integers(32, K)
    report, out = product(a_in_registers(a.bfloat16()), b.bfloat16(), None, (32, True), late=False)
    report.check()
    assert torch.equal(out, in_fragments(a @ b.T))


@pytest.mark.parametrize("first_k", [16, 32, 48])
def test_a_step_along_k_inside_a_swizzled_row(first_k: int) -> None:
    a, b = small_integers(M, K), small_integers(24, K)
    report, out = product(a.half(), b.half(), (0, True), (128, True), first_k=first_k)
    report.check()
    assert torch.equal(out, in_fragments(a @ b.T))
