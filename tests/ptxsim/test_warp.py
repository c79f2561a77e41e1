"""Lanes together: shuffles, votes, divergence, atomics, matrix fragments, each against its definition lane by lane."""

import math
import random
from fractions import Fraction

import pytest
import torch

from tests.ptxsim import Fault, Options
from tests.ptxsim.bits import integers, patterns, run, tensor
from tests.ptxsim.exact import FORMATS
from tests.ptxsim.snippet import snippet

ALL = "0xffffffff"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(2)


def test_movmatrix_transposes_what_the_lanes_hold_together() -> None:
    matrix = torch.tensor([random.randrange(1 << 16) for _ in range(64)]).view(8, 8)
    words = (matrix[:, 0::2] | matrix[:, 1::2] << 16).flatten().tolist()
    turned = matrix.T
    want = (turned[:, 0::2] | turned[:, 1::2] << 16).flatten().tolist()
    assert run("movmatrix.sync.aligned.m8n8.trans.b16 %d0, %a0;", [(words, 32)], 32) == want


@pytest.mark.parametrize("width", [32, 16, 8, 2])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles_stay_in_their_segment(mode: str, width: int) -> None:
    values = integers(32, 32)
    for offset in (0, 1, 3, 5, width - 1):
        clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
        want, inside = [], []
        for lane in range(32):
            first = lane // width * width
            step = {"up": lane - offset, "down": lane + offset, "bfly": lane ^ offset, "idx": first + offset % width}
            source = step[mode]
            valid = first <= source < first + width if mode in ("up", "down") else source < first + width
            want.append(values[source if valid else lane])
            inside.append(int(valid))
        body = f"shfl.sync.{mode}.b32 %d0|%p, %a0, {offset}, {clamp}, {ALL};"
        assert run(body, [(values, 32)], 32) == want
        assert run(body + "selp.b32 %d0, 1, 0, %p;", [(values, 32)], 32) == inside


def test_votes_and_match() -> None:
    values = [random.randrange(4) for _ in range(32)]
    holds = [value == 2 for value in values]
    compare = "setp.eq.s32 %p, %a0, 2;"
    ballot = sum(bit << lane for lane, bit in enumerate(holds))
    assert run(f"{compare} vote.sync.ballot.b32 %d0, %p, {ALL};", [(values, 32)], 32) == [ballot] * 32
    for name, want in (("any", any(holds)), ("all", all(holds)), ("uni", False)):
        body = f"{compare} vote.sync.{name}.pred %q, %p, {ALL}; selp.b32 %d0, 1, 0, %q;"
        assert run(body, [(values, 32)], 32) == [int(want)] * 32
    same = [sum((other == value) << lane for lane, other in enumerate(values)) for value in values]
    assert run(f"match.any.sync.b32 %d0, %a0, {ALL};", [(values, 32)], 32) == same


@pytest.mark.parametrize(
    ("name", "kind", "fold"),
    [("add", "s32", sum), ("min", "u32", min), ("max", "u32", max), ("and", "b32", None), ("xor", "b32", None)],
)
def test_reductions(name: str, kind: str, fold) -> None:
    values = integers(32, 32)
    if fold is None:
        want = values[0]
        for value in values[1:]:
            want = want & value if name == "and" else want ^ value
    else:
        want = fold(values) & 0xFFFFFFFF
    assert run(f"redux.sync.{name}.{kind} %d0, %a0, {ALL};", [(values, 32)], 32) == [want] * 32


def test_a_diverged_warp_comes_together() -> None:
    """Each lane loops its own number of times; then all of them shuffle."""
    counts = [random.randrange(9) for _ in range(32)]
    body = f"""mov.u32 %d0, 0; mov.u32 %n, %a0;
    LOOP: setp.eq.s32 %p, %n, 0; @%p bra DONE;
    add.s32 %d0, %d0, 3; sub.s32 %n, %n, 1; bra.uni LOOP;
    DONE: shfl.sync.bfly.b32 %d0, %d0, 1, 31, {ALL};"""
    want = [3 * counts[lane ^ 1] for lane in range(32)]
    assert run(body, [(counts, 32)], 32, declare=".reg .b32 %n;") == want


def test_lanes_missing_from_a_shuffle_are_a_fault() -> None:
    body = f"setp.lt.s32 %p, %a0, 16; @%p shfl.sync.bfly.b32 %d0, %a0, 1, 31, {ALL};"
    with pytest.raises(Fault, match="member mask"):
        run(body, [(list(range(32)), 32)], 32)


def test_elect_and_activemask() -> None:
    body = f"elect.sync %d0|%p, {ALL}; selp.b32 %d0, 1, 0, %p;"
    assert run(body, [([0] * 32, 32)], 32) == [1] + [0] * 31
    body = "mov.u32 %d0, 0; setp.lt.s32 %p, %a0, 5; @%p activemask.b32 %d0;"
    assert run(body, [(list(range(32)), 32)], 32) == [31] * 5 + [0] * 27


@pytest.mark.parametrize("name", ["add", "min", "max", "and", "or", "xor", "exch", "inc", "dec"])
def test_integer_atomics_return_what_was_there(name: str) -> None:
    values = integers(32, 64)
    memory = torch.tensor([12345], dtype=torch.int32)
    before = torch.zeros(64, dtype=torch.int32)
    kind = "u32" if name in ("add", "min", "max", "inc", "dec") else "b32"
    snippet(f"atom.global.{name}.{kind} %d0, [%x0], %a0;", [tensor(values, 32)], [before], extra=[memory])
    # Whatever order the lanes took, each saw what the one before left, so the chain of values is a walk.
    step = {
        "add": lambda old, v: old + v,
        "min": min,
        "max": max,
        "and": lambda old, v: old & v,
        "or": lambda old, v: old | v,
        "xor": lambda old, v: old ^ v,
        "exch": lambda old, v: v,
        "inc": lambda old, v: 0 if old >= v else old + 1,
        "dec": lambda old, v: v if old == 0 or old > v else old - 1,
    }[name]
    reached = sorted([12345, *(step(old, v) & 0xFFFFFFFF for old, v in zip(patterns(before), values, strict=True))])
    assert reached == sorted([*patterns(before), *patterns(memory)])


def test_compare_and_swap_wins_once() -> None:
    memory = torch.zeros(1, dtype=torch.int32)
    before = torch.zeros(96, dtype=torch.int32)
    mine = torch.arange(1, 97, dtype=torch.int32)
    snippet("atom.global.cas.b32 %d0, [%x0], 0, %a0;", [mine], [before], extra=[memory])
    assert (before == 0).sum() == 1
    assert memory.item() == mine[before == 0].item()


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16), ("f32", torch.float32)])
def test_float_atomics_round_each_addition(kind: str, dtype: torch.dtype) -> None:
    memory = torch.tensor([1.0], dtype=dtype)
    small = torch.full((1,), 2.0**-12, dtype=dtype)  # below half an ulp of 1 in both 16-bit formats
    noftz = ".noftz" if kind != "f32" else ""
    snippet(f"red.global.add{noftz}.{kind} [%x0], %a0;", [small], [torch.zeros(1)], declare="", extra=[memory])
    assert memory.item() == (1.0 + 2.0**-12 if kind == "f32" else 1.0)


@pytest.mark.parametrize(
    ("form", "kind", "dtype", "lanes"), [("v2", "f32", torch.float32, 2), ("v4", "f32", torch.float32, 4)]
)
def test_vector_reductions(form: str, kind: str, dtype: torch.dtype, lanes: int) -> None:
    memory = torch.zeros(lanes, dtype=dtype)
    value = torch.arange(32, dtype=dtype)
    registers = ", ".join(["%a0"] * lanes)
    snippet(f"red.global.add.{form}.{kind} [%x0], {{{registers}}};", [value], [torch.zeros(32)], extra=[memory])
    assert memory.tolist() == [496.0] * lanes


@pytest.mark.parametrize(("kind", "dtype"), [("f16x2", torch.float16), ("bf16x2", torch.bfloat16)])
def test_packed_vector_reductions(kind: str, dtype: torch.dtype) -> None:
    memory = torch.zeros(4, dtype=dtype)
    pair = torch.tensor([[1.0, 2.0]] * 32, dtype=dtype).view(torch.int32).flatten()
    body = f"red.global.add.noftz.v2.{kind} [%x0], {{%a0, %a0}};"
    snippet(body, [pair], [torch.zeros(32)], extra=[memory])
    assert memory.tolist() == [32.0, 64.0, 32.0, 64.0]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_gives_each_lane_its_two_elements(count: int, transposed: bool) -> None:
    rows = torch.arange(8 * count * 8, dtype=torch.int16).view(count, 8, 8)
    suffix = ".trans" if transposed else ""
    names = ", ".join(f"%m{i}" for i in range(count))
    outputs = [torch.zeros(32, dtype=torch.int32) for _ in range(count)]
    # Lane r of the first 8 * count holds the address of row r: 16 bytes, copied from global memory first.
    body = f"""setp.lt.u32 %p, %t, {8 * count};
    mad.wide.u32 %at, %t, 16, %x0; mad.lo.u32 %row, %t, 16, %s;
    @%p ld.global.v4.b32 {{%w0, %w1, %w2, %w3}}, [%at];
    @%p st.shared.v4.b32 [%row], {{%w0, %w1, %w2, %w3}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 {{{names}}}, [%row];
    """ + "".join(f"mov.b32 %d{i}, %m{i};" for i in range(count))
    declare = ".reg .b32 %w<4>, %m<4>, %row;"
    snippet(body, [], outputs, declare=declare, shared=16 * 32, extra=[rows.flatten()]).check()
    for matrix, out in zip(rows, outputs, strict=True):
        for lane, (low, high) in enumerate(out.view(torch.int16).view(32, 2).tolist()):
            row, column = lane // 4, lane % 4 * 2
            want = (
                [matrix[column, row], matrix[column + 1, row]]
                if transposed
                else [matrix[row, column], matrix[row, column + 1]]
            )
            assert [low, high] == [value.item() for value in want]


# (row, column) of the elements of a lane, from the fragment figures of mma.m16n8k16 (16-bit) and m16n8k8 (tf32).
def a_16_bit(lane: int) -> list[tuple[int, int]]:
    g, t = lane // 4, lane % 4
    return [(g + 8 * (i // 2 % 2), 2 * t + i % 2 + 8 * (i // 4)) for i in range(8)]


def b_16_bit(lane: int) -> list[tuple[int, int]]:
    g, t = lane // 4, lane % 4
    return [(2 * t + i % 2 + 8 * (i // 2), g) for i in range(4)]


def accumulator(lane: int) -> list[tuple[int, int]]:
    g, t = lane // 4, lane % 4
    return [(g + 8 * (i // 2), 2 * t + i % 2) for i in range(4)]


def a_tf32(lane: int) -> list[tuple[int, int]]:
    g, t = lane // 4, lane % 4
    return [(g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)]


def b_tf32(lane: int) -> list[tuple[int, int]]:
    g, t = lane // 4, lane % 4
    return [(t, g), (t + 4, g)]


def fragments(matrix: torch.Tensor, layout) -> list[torch.Tensor]:
    """Each lane's 32-bit registers of `matrix`, as a list of [32] int32 tensors."""
    flat = torch.stack([torch.stack([matrix[place] for place in layout(lane)]) for lane in range(32)])
    return [register.contiguous() for register in flat.view(torch.int32).unbind(1)]


@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_mma_multiplies_its_fragments(kind: str) -> None:
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}[kind]
    depth = 8 if kind == "tf32" else 16
    a, b = torch.randint(-8, 8, (16, depth)).to(dtype), torch.randint(-8, 8, (depth, 8)).to(dtype)
    c = torch.randn(16, 8)
    layouts = (a_tf32, b_tf32) if kind == "tf32" else (a_16_bit, b_16_bit)
    operands = [*fragments(a, layouts[0]), *fragments(b, layouts[1]), *fragments(c, accumulator)]
    na, nb = len(fragments(a, layouts[0])), len(fragments(b, layouts[1]))
    names = [f"%a{i}" for i in range(len(operands))]
    sources = [", ".join(part) for part in (names[:na], names[na : na + nb], names[na + nb :])]
    body = f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32 {{%d0, %d1, %d2, %d3}}, "
    body += ", ".join(f"{{{part}}}" for part in sources) + ";"
    outputs = [torch.zeros(32) for _ in range(4)]
    snippet(body, operands, outputs)
    want = a.double() @ b.double() + c.double()
    for lane in range(32):
        for i, place in enumerate(accumulator(lane)):
            assert outputs[i][lane].item() == want[place].float().item()


@pytest.mark.parametrize(("core", "kept"), [(0, True), (80, False), (90, False)])
def test_a_tensor_core_drops_what_lies_far_below_the_largest_product(core: int, kept: bool) -> None:
    """1024 - 1024 + 2^-20: float64 keeps the last term, hardware has cut it off when the terms were aligned."""
    a = torch.zeros(16, 16, dtype=torch.float16)
    a[0, :3] = torch.tensor([1024.0, -1024.0, 2.0**-10])
    b = torch.zeros(16, 8, dtype=torch.float16)
    b[:3, 0] = torch.tensor([1.0, 1.0, 2.0**-10])
    operands = [*fragments(a, a_16_bit), *fragments(b, b_16_bit)]
    body = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%d0, %d1, %d2, %d3}, {%a0, %a1, %a2, %a3}, {%a4, %a5}, "
    body += "{0f00000000, 0f00000000, 0f00000000, 0f00000000};"
    outputs = [torch.zeros(32) for _ in range(4)]
    snippet(body, operands, outputs, options=Options(tensor_core=core))
    assert outputs[0][0].item() == (2.0**-20 if kept else 0.0)


def test_a_tensor_core_truncates() -> None:
    """1 + 3 * 2^-25 lies above the middle of two float32 numbers; nearest goes up, hardware goes down."""
    a = torch.zeros(16, 16, dtype=torch.float16)
    a[0, :2] = torch.tensor([1.0, 3.0 * 2.0**-10])
    b = torch.zeros(16, 8, dtype=torch.float16)
    b[:2, 0] = torch.tensor([1.0, 2.0**-15])
    operands = [*fragments(a, a_16_bit), *fragments(b, b_16_bit)]
    body = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%d0, %d1, %d2, %d3}, {%a0, %a1, %a2, %a3}, {%a4, %a5}, "
    body += "{0f00000000, 0f00000000, 0f00000000, 0f00000000};"
    for core, want in ((0, FORMATS["f32"].encode(1 + Fraction(3, 2**25))), (80, 0x3F800000), (90, 0x3F800000)):
        outputs = [torch.zeros(32) for _ in range(4)]
        snippet(body, operands, outputs, options=Options(tensor_core=core))
        assert patterns(outputs[0])[0] == want


@pytest.mark.parametrize("name", ["min", "max"])
def test_redux_of_floats(name: str) -> None:
    """sm_100's: a NaN gives way to a number, unless .NaN is given."""
    values = torch.randn(32)
    values[3] = math.nan
    out = torch.zeros(32)
    snippet(f"redux.sync.{name}.f32 %d0, %a0, 0xffffffff;", [values], [out]).check()
    kept = values[~values.isnan()]
    assert (out == getattr(kept, name)()).all()
    snippet(f"redux.sync.{name}.abs.f32 %d0, %a0, 0xffffffff;", [values], [out]).check()
    assert (out == getattr(kept.abs(), name)()).all()
    snippet(f"redux.sync.{name}.NaN.f32 %d0, %a0, 0xffffffff;", [values], [out]).check()
    assert out.isnan().all()
