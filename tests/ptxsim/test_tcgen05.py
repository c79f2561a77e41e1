"""tcgen05 (sm_100): layouts of tensor memory, products and copies against their definitions, and its findings."""

import itertools
from collections.abc import Sequence

import pytest
import torch

from tests.ptxsim import Fault, Options, Report
from tests.ptxsim.snippet import snippet
from tests.ptxsim.test_wgmma import copy_in, layout, small_integers, spread

K = 16
THREADS = 128
COLUMNS = 128
BARRIER, SLOT, A_AT, B_AT = 0, 8, 1024, 1024 + 32768
SHARED = B_AT + 32768
SWIZZLES = {0: 0, 128: 2, 64: 4, 32: 6}

DECLARE = """.reg .pred %z, %o, %n; .reg .b32 %m, %u, %i, %v, %w, %r<64>; .reg .b64 %da, %db;
.reg .f32 %f<4>;"""
ALLOCATE = f"""setp.lt.u32 %z, %t, 32; setp.eq.u32 %o, %t, 0;
@%z tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%s+{SLOT}], {COLUMNS};
@%o mbarrier.init.shared::cta.b64 [%s+{BARRIER}], 1;
fence.mbarrier_init.release.cluster; bar.sync 0; ld.shared.b32 %m, [%s+{SLOT}];
shr.u32 %i, %t, 5; shl.b32 %i, %i, 21; add.u32 %u, %m, %i;
"""
FREE = f"bar.sync 0; @%z tcgen05.dealloc.cta_group::1.sync.aligned.b32 %m, {COLUMNS};"
COMMIT = f"@%o tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%s+{BARRIER}];"
WAIT = f"WAITING: mbarrier.try_wait.parity.shared::cta.b64 %n, [%s+{BARRIER}], 0; @!%n bra WAITING;"
WAIT_LD, WAIT_ST = "tcgen05.wait::ld.sync.aligned;", "tcgen05.wait::st.sync.aligned;"
BEFORE, AFTER = "tcgen05.fence::before_thread_sync;", "tcgen05.fence::after_thread_sync;"


def registers(count: int, name: str = "r") -> str:
    return "{" + ", ".join(f"%{name}{i}" for i in range(count)) + "}"


def load(count: int, column: int = 0) -> str:
    return f"tcgen05.ld.sync.aligned.32x32b.x{count}.b32 {registers(count)}, [%u+{column}];"


def run(body: str, extra: Sequence[torch.Tensor] = (), **options: bool) -> Report:
    lanes = torch.zeros(THREADS, dtype=torch.int32)
    whole = ALLOCATE + body + FREE
    return snippet(whole, [lanes], [], declare=DECLARE, shared=SHARED, extra=extra, options=Options(**options))


def to_global(count: int, first: int = 0) -> str:
    """The registers as row %t of the first extra tensor, [128, 64]."""
    stores = "".join(f"st.global.b32 [%at+{4 * (first + i)}], %r{i};" for i in range(count))
    return f"mad.wide.u32 %at, %t, 256, %x0;{stores}"


def of_thread(shape: str, register: int, thread: int, split: int) -> tuple[int, int]:
    """(lane, column) that a register of a thread holds."""
    if shape == "16x32bx2":
        return thread % 16, register + split * (thread // 16)
    if shape == "16x128b":
        pair, lower = divmod(register, 2)
        return thread // 4 + 8 * lower, 4 * pair + thread % 4
    if shape == "16x256b":
        block, rest = divmod(register, 4)
        return thread // 4 + 8 * (rest // 2), 8 * block + 2 * (thread % 4) + rest % 2
    return thread, register


@pytest.mark.parametrize("upper", [0, 16])
@pytest.mark.parametrize(("shape", "count"), [("16x32bx2", 8), ("16x128b", 16), ("16x256b", 16), ("32x32b", 8)])
def test_loads_and_stores_of_every_shape(shape: str, count: int, upper: int) -> None:
    """What the one stores, loads of whole lanes find where the ISA says; and the other way round."""
    if shape == "32x32b" and upper:
        return
    repeat = count // {"16x128b": 2, "16x256b": 4}.get(shape, 1)
    split, operand = (16, ", 16") if shape == "16x32bx2" else (0, "")
    place = f"add.u32 %v, %u, {upper << 16};"
    zero = "".join(f"mov.b32 %r{i}, 7;" for i in range(32))
    zero += f"tcgen05.st.sync.aligned.32x32b.x32.b32 [%u], {registers(32)}; {WAIT_ST}"
    number = "".join(f"mad.lo.u32 %r{i}, %t, 64, {1000 + i};" for i in range(count))
    form = f"sync.aligned.{shape}.x{repeat}.b32"
    out = torch.zeros(THREADS, 64, dtype=torch.int32)
    body = zero + place + number + f"tcgen05.st.{form} [%v]{operand}, {registers(count)}; {WAIT_ST}"
    run(body + load(32) + WAIT_LD + to_global(32), [out]).check()
    want = torch.full((THREADS, 64), 7, dtype=torch.int32)
    want[:, 32:] = 0
    for thread, i in itertools.product(range(THREADS), range(count)):
        lane, column = of_thread(shape, i, thread % 32, split)
        want[thread // 32 * 32 + upper + lane, column] = 64 * thread + 1000 + i
    assert torch.equal(out, want)

    back = torch.zeros(THREADS, 64, dtype=torch.int32)
    by_lane = "".join(f"mad.lo.u32 %r{i}, %t, 64, {i};" for i in range(32))
    by_lane += f"tcgen05.st.sync.aligned.32x32b.x32.b32 [%u], {registers(32)}; {WAIT_ST}"
    body = by_lane + place + f"tcgen05.ld.{form} {registers(count)}, [%v]{operand}; {WAIT_LD}" + to_global(count)
    run(body, [back]).check()
    for thread, i in itertools.product(range(THREADS), range(count)):
        lane, column = of_thread(shape, i, thread % 32, split)
        assert back[thread, i] == 64 * (thread // 32 * 32 + upper + lane) + column


def descriptor(start: int, leading: int, stride: int, swizzle: int) -> str:
    return f"{start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | 1 << 46 | SWIZZLES[swizzle] << 61}"


def instruction(m: int, n: int, dtype: torch.dtype, a_along_k: bool, b_along_k: bool, negate: int = 0) -> int:
    code = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}[dtype]
    types = 1 << 4 | code << 7 | code << 10 | negate << 13
    return types | (not a_along_k) << 15 | (not b_along_k) << 16 | n // 8 << 17 | m // 16 << 24


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    a_layout: tuple[int, bool] | None = (128, True),
    b_layout: tuple[int, bool] = (128, True),
    times: int = 1,
    negate: int = 0,
    **options: bool,
) -> torch.Tensor:
    """`times` products A [m, 16] @ B [n, 16].T in one accumulator, as it lies in [128 lanes, n columns]; a_layout None
    puts A in tensor memory. float32 operands [.., 8] are products of tf32."""
    m, n = a.shape[0], b.shape[0]
    shape = instruction(m, n, a.dtype, a_layout is None or a_layout[1], b_layout[1], negate)
    kind = "tf32" if a.dtype is torch.float32 else "f16"
    halves = [x.contiguous().view(torch.float16) if kind == "tf32" else x for x in (a, b)]
    b_offsets, b_leading, b_stride, b_bytes = layout(n, *b_layout)
    images = [spread(halves[1], b_offsets, b_bytes)]
    body = copy_in("%x1", B_AT, b_bytes, "B")
    if a_layout is None:
        lanes = torch.zeros(128, 16, dtype=a.dtype)
        lanes[[lane_of(m, row) for row in range(m)]] = a
        images.append(lanes)
        body += "mad.wide.u32 %at, %t, 32, %x2; ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%at];"
        body += "ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%at+16];"
        body += f"tcgen05.st.sync.aligned.32x32b.x8.b32 [%u+64], {registers(8)}; {WAIT_ST} {BEFORE}"
        a_operand = "[%m+64]"
    else:
        a_offsets, a_leading, a_stride, a_bytes = layout(m, *a_layout)
        images.append(spread(halves[0], a_offsets, a_bytes))
        body += copy_in("%x2", A_AT, a_bytes, "A")
        body += f"mov.b64 %da, {descriptor(A_AT, a_leading, a_stride, a_layout[0])};"
        a_operand = "%da"
    body += f"mov.b64 %db, {descriptor(B_AT, b_leading, b_stride, b_layout[0])};"
    body += f"fence.proxy.async.shared::cta; bar.sync 0; {AFTER}"
    for i in range(times):
        body += f"setp.ne.u32 %q, {i}, 0;"
        body += f"@%o tcgen05.mma.cta_group::1.kind::{kind} [%m], {a_operand}, %db, {shape}, %q;"
    body += f"{COMMIT} {WAIT} {AFTER}"
    out = torch.full((THREADS, 64), float("nan"))
    if m == 128:
        body += load(n) + WAIT_LD + to_global(n)
    else:  # only the lower half of each warp's lanes was written
        loaded = f"tcgen05.ld.sync.aligned.16x32bx2.x{n // 2}.b32 {registers(n // 2)}, [%u], {n // 2}; {WAIT_LD}"
        body += loaded + to_global(n // 2)
    run(body, [out, *images], tensor_strict=True, **options).check()
    if m == 128:
        return out[:, :n]
    warps = out[:, : n // 2].view(4, 2, 16, n // 2)
    return torch.cat([warps[:, 0], warps[:, 1]], -1).view(64, n)


def lane_of(m: int, row: int) -> int:
    return row if m == 128 else row // 16 * 32 + row % 16


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize(("a_along_k", "b_along_k"), list(itertools.product([True, False], repeat=2)))
def test_every_layout_of_both_operands(swizzle: int, a_along_k: bool, b_along_k: bool) -> None:
    a, b = small_integers(128, K).half(), small_integers(64, K).half()
    assert torch.equal(product(a, b, (swizzle, a_along_k), (swizzle, b_along_k)), a.float() @ b.float().T)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("m", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types_rows_and_accumulation(dtype: torch.dtype, m: int, late: bool) -> None:
    k = 8 if dtype is torch.float32 else K
    a, b = small_integers(m, k).to(dtype), small_integers(32, k).to(dtype)
    assert torch.equal(product(a, b, times=3, late=late), 3 * a.float() @ b.float().T)


@pytest.mark.parametrize("m", [64, 128])
def test_a_in_tensor_memory(m: int) -> None:
    a, b = small_integers(m, K).bfloat16(), small_integers(64, K).bfloat16()
    if m == 64:  # 32x32b stores all lanes, of which the product takes the lower halves
        b = b[:32]
    assert torch.equal(product(a, b, None, (64, False)), a.float() @ b.float().T)


def test_negated_operands_and_bits_that_tf32_does_not_have() -> None:
    a, b = torch.randn(128, 8), torch.randn(16, 8)
    cut_a, cut_b = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for x in (a, b))
    assert torch.equal(product(a, b, negate=1), (-cut_a @ cut_b.T).float())


@pytest.mark.parametrize(("shape", "rows", "units"), [("128x256b", 128, 2), ("128x128b", 128, 1), ("32x128b", 32, 1)])
@pytest.mark.parametrize("late", [False, True])
def test_copies_from_shared_memory(shape: str, rows: int, units: int, late: bool) -> None:
    matrix = torch.randint(-(2**15), 2**15, (rows, K), dtype=torch.int16)
    offsets, leading, stride, size = layout(rows, 32, True)
    image = torch.zeros(size // 2, dtype=torch.int16)
    image[torch.tensor(offsets)] = matrix.flatten()
    out = torch.zeros(THREADS, 64, dtype=torch.int32)
    form = shape + (".warpx4" if rows == 32 else "")
    body = copy_in("%x1", A_AT, size, "A") + f"mov.b64 %da, {descriptor(A_AT, leading, stride, 32)};"
    body += (
        f"fence.proxy.async.shared::cta; bar.sync 0; @%o tcgen05.cp.cta_group::1.{form} [%m+4], %da; {COMMIT} {WAIT}"
    )
    run(body + load(4 * units, 4) + WAIT_LD + to_global(4 * units), [out, image], late=late).check()
    want = matrix[:, : 8 * units].contiguous().view(torch.int32).repeat(128 // rows, 1)
    assert torch.equal(out[:, : 4 * units], want)


STORE = f"mov.b32 %r0, %t; tcgen05.st.sync.aligned.32x32b.x1.b32 [%u], {registers(1)};"
LOAD = load(1)
ZERO_OPERANDS = f"""shl.b32 %w, %t, 5; add.u32 %w, %w, %s; mov.b32 %v, 0;
st.shared.v4.b32 [%w+{A_AT}], {{%v, %v, %v, %v}}; st.shared.v4.b32 [%w+{A_AT + 16}], {{%v, %v, %v, %v}};
mov.b64 %da, {descriptor(A_AT, 128, 256, 0)};"""
PUBLISH = "fence.proxy.async.shared::cta; bar.sync 0;"
SHAPE = instruction(128, 16, torch.float16, True, True)


def multiply(accumulate: bool = False, at: str = "%m") -> str:
    return f"""setp.ne.u32 %q, {int(accumulate)}, 0;
    @%o tcgen05.mma.cta_group::1.kind::f16 [{at}], %da, %da, {SHAPE}, %q;"""


READY = ZERO_OPERANDS + PUBLISH
FLIGHT = {"tensor_in_flight", "tensor_race"}
PROBLEMS = [
    ("stored and loaded", STORE + WAIT_ST + LOAD + WAIT_LD, set()),
    ("loaded before the store is over", STORE + LOAD + WAIT_LD, {"tensor_wait"}),
    ("stored before the load is over", STORE + WAIT_ST + LOAD + STORE + WAIT_ST, {"tensor_wait"}),
    ("loaded, waited for and stored", STORE + WAIT_ST + LOAD + WAIT_LD + STORE + WAIT_ST, set()),
    ("product and commit", READY + multiply() + COMMIT + WAIT + LOAD + WAIT_LD, set()),
    ("loaded before its barrier", READY + multiply() + COMMIT + LOAD + WAIT_LD + WAIT, FLIGHT),
    ("no commit", READY + multiply() + LOAD + WAIT_LD, FLIGHT),
    ("two products in a row", READY + multiply() + multiply(True) + COMMIT + WAIT, set()),
    ("added to nothing", READY + multiply(True) + COMMIT + WAIT, {"uninitialised_tensor"}),
    ("an accumulator that moves", READY + multiply() + multiply(at="%m+8") + COMMIT + WAIT, {"tensor_in_flight"}),
    ("no proxy fence", ZERO_OPERANDS + "bar.sync 0;" + multiply() + COMMIT + WAIT, {"proxy_fence"}),
    (
        "operands overwritten",
        READY + multiply() + COMMIT + ZERO_OPERANDS + WAIT,
        {"in_flight", "shared_race", "proxy_fence"},
    ),
    ("operands overwritten after the barrier", READY + multiply() + COMMIT + WAIT + ZERO_OPERANDS, set()),
    ("product over a store of other warps", READY + STORE + WAIT_ST + multiply() + COMMIT + WAIT, {"tensor_race"}),
    ("product behind a store", READY + STORE + WAIT_ST + "bar.sync 0;" + multiply() + COMMIT + WAIT, set()),
    (
        "store not over at the barrier",
        READY + STORE + "bar.sync 0;" + multiply() + COMMIT + WAIT + WAIT_ST,
        {"tensor_wait", "tensor_race"},
    ),
    ("nobody waits", READY + multiply(), {"tensor_in_flight"}),
]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("body", "found"), [case[1:] for case in PROBLEMS], ids=[case[0] for case in PROBLEMS])
def test_findings(body: str, found: set[str], late: bool) -> None:
    """Of several kinds, the schedule decides which are met."""
    kinds = set(run(body, late=late).findings)
    assert bool(kinds) == bool(found), kinds
    assert kinds <= found


def test_the_fences_that_the_isa_asks_for() -> None:
    """Asked for by an option: Triton's kernels have neither, and waits for loads after their registers' first use."""

    def across(before: str = BEFORE, after: str = AFTER, completed: str = AFTER, use: str = "") -> str:
        stored = READY + STORE + WAIT_ST + before + "bar.sync 0;" + after
        return stored + multiply() + COMMIT + WAIT + completed + LOAD + use + WAIT_LD

    assert not run(across(), tensor_strict=True).findings
    for lacking in (across(before=""), across(after=""), across(completed="")):
        assert set(run(lacking, tensor_strict=True).findings) == {"tensor_fence"}
        assert not run(lacking).findings
    early = across(use="add.u32 %v, %r0, 1;")
    assert set(run(early, tensor_strict=True).findings) == {"tensor_wait"}
    assert set(run(LOAD + WAIT_LD, tensor_strict=True).findings) == {"uninitialised_tensor"}


def test_tensor_memory_is_freed() -> None:
    lanes = torch.zeros(THREADS, dtype=torch.int32)
    report = snippet(ALLOCATE, [lanes], [], declare=DECLARE, shared=SHARED)
    assert set(report.findings) == {"tensor_allocation"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (FREE, "not allocated"),
        (STORE.replace("[%u]", f"[%u+{COLUMNS}]"), "not allocated"),
        (STORE.replace("[%u]", "[%m]"), "reaches"),
        ("@%z tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%s+16], 48;", "powers of two"),
        ("@%z tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%s+16], 512;", "are free"),
        (
            "@%z tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;"
            "@%z tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%s+16], 32;",
            "relinquish",
        ),
        (READY + multiply().replace(str(SHAPE), str(instruction(128, 8, torch.float16, True, True))), "128 x 8"),
        (READY.replace(str(1 << 46), "0") + "mov.b64 %da, 0;" + multiply(), "descriptor"),
    ],
)
def test_faults(body: str, message: str) -> None:
    with pytest.raises(Fault, match=message):
        run(body)
