"""Integer and floating-point arithmetic of the PTX machine, bit for bit against exact integers and fractions."""

import itertools
import math
import operator
import random
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
import torch

from tests.ptxsim import Unsupported
from tests.ptxsim.bits import as_signed, integers, run
from tests.ptxsim.exact import F32, F64, FORMATS, NAN, Exact, Format
from tests.ptxsim.snippet import snippet


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)


LANES = 256


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul.lo": operator.mul,
    "min": min,
    "max": max,
    "div": truncated,
    "rem": lambda a, b: a - b * truncated(a, b),
}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("name", BINARY)
def test_integer_operations(name: str, kind: str) -> None:
    width = int(kind[1:])
    a, b = integers(width), integers(width)
    if name in ("div", "rem"):
        b = [value or 1 for value in b]  # division by zero is unspecified
    value = (lambda x: as_signed(x, width)) if kind[0] == "s" else int
    want = [BINARY[name](value(x), value(y)) & ((1 << width) - 1) for x, y in zip(a, b, strict=True)]
    assert run(f"{name}.{kind} %d0, %a0, %a1;", [(a, width), (b, width)], width) == want


@pytest.mark.parametrize(("name", "pick"), [("min", min), ("max", max)])
def test_extremes_that_are_not_negative(name: str, pick: Callable[[int, int], int]) -> None:
    a, b = integers(32), integers(32)
    want = [max(pick(as_signed(x, 32), as_signed(y, 32)), 0) for x, y in zip(a, b, strict=True)]
    assert run(f"{name}.relu.s32 %d0, %a0, %a1;", [(a, 32), (b, 32)], 32) == want


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_products_have_twice_the_width(kind: str) -> None:
    width = int(kind[1:])
    value = (lambda x: as_signed(x, width)) if kind[0] == "s" else int
    a, b, c = integers(width), integers(width), integers(2 * width)
    mask = (1 << 2 * width) - 1
    want = [value(x) * value(y) & mask for x, y in zip(a, b, strict=True)]
    assert run(f"mul.wide.{kind} %d0, %a0, %a1;", [(a, width), (b, width)], 2 * width) == want
    want = [(value(x) * value(y) + z) & mask for x, y, z in zip(a, b, c, strict=True)]
    got = run(f"mad.wide.{kind} %d0, %a0, %a1, %a2;", [(a, width), (b, width), (c, 2 * width)], 2 * width)
    assert got == want


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_high_products(kind: str) -> None:
    width = int(kind[1:])
    value = (lambda x: as_signed(x, width)) if kind[0] == "s" else int
    a, b, c = integers(width), integers(width), integers(width)
    mask = (1 << width) - 1
    want = [(value(x) * value(y) >> width) & mask for x, y in zip(a, b, strict=True)]
    assert run(f"mul.hi.{kind} %d0, %a0, %a1;", [(a, width), (b, width)], width) == want
    want = [((value(x) * value(y) >> width) + z) & mask for x, y, z in zip(a, b, c, strict=True)]
    assert run(f"mad.hi.{kind} %d0, %a0, %a1, %a2;", [(a, width), (b, width), (c, width)], width) == want


@pytest.mark.parametrize("width", [16, 32, 64])
def test_integer_signs(width: int) -> None:
    a = integers(width)
    mask = (1 << width) - 1
    assert run(f"abs.s{width} %d0, %a0;", [(a, width)], width) == [abs(as_signed(x, width)) & mask for x in a]
    assert run(f"neg.s{width} %d0, %a0;", [(a, width)], width) == [-x & mask for x in a]


def floats(form: Format, count: int = LANES) -> list[int]:
    """Bit patterns over the whole range: random, near one another, subnormal, infinite, NaN, zero."""
    width = 1 + form.exponent + form.mantissa
    one = form.bias << form.mantissa
    edges = [
        0,
        form.sign,
        1,
        form.sign | 1,
        form.infinity,
        form.infinity | form.sign,
        form.infinity + 1,
        form.infinity - 1,
    ]
    edges += [one, one | form.sign, one + 1, 1 << form.mantissa, (1 << form.mantissa) - 1]
    chosen = []
    for _ in range(count):
        roll = random.random()
        if roll < 0.25:
            chosen.append(random.choice(edges))
        elif roll < 0.65:  # exponents close to one another, where sums cancel and round
            near = (form.bias + random.randint(-3, 3)) << form.mantissa
            chosen.append(near | random.getrandbits(form.mantissa) | random.choice((0, form.sign)))
        else:
            chosen.append(random.getrandbits(width))
    return chosen


def exactly(op: Callable[..., Fraction], *values: Exact) -> Exact:
    """The exact result of `op`, with the infinities and NaN of IEEE 754."""
    if NAN in values:
        return NAN
    if any(isinstance(value, float) for value in values):
        # Finite operands only matter by sign and by being zero, so small stand-ins give the same special case.
        small = [value if isinstance(value, float) else math.copysign(1.0, value) if value else 0.0 for value in values]
        result = op(*small)
        return NAN if math.isnan(result) else math.copysign(math.inf, result) if math.isinf(result) else Fraction(0)
    return op(*values)


def multiply_add(a: Fraction, b: Fraction, c: Fraction) -> Fraction:
    return a * b + c


FLOAT_OPS: dict[str, tuple[int, Callable[..., Fraction]]] = {
    "add": (2, operator.add),
    "sub": (2, operator.sub),
    "mul": (2, operator.mul),
    "fma": (3, multiply_add),
}


def without_zero_sign(bits: Sequence[int], form: Format) -> list[int]:
    """Exact arithmetic does not say which zero; test_signed_zeros does."""
    return [0 if value == form.sign else value for value in bits]


def check_float(name: str, kind: str, mode: str) -> None:
    arity, op = FLOAT_OPS[name]
    form = FORMATS[kind]
    width = 1 + form.exponent + form.mantissa
    operands = [floats(form) for _ in range(arity)]
    want = [
        form.encode(exactly(op, *(form.decode(bits) for bits in values)), mode)
        for values in zip(*operands, strict=True)
    ]
    rounding = f".{mode}" if mode != "rn" or name == "fma" else ""
    body = f"{name}{rounding}.{kind} %d0, " + ", ".join(f"%a{i}" for i in range(arity)) + ";"
    got = run(body, [(values, width) for values in operands], width)
    if kind == "f64":  # NaN payloads of f64 are the host's
        got = [form.encode(NAN) if form.decode(value) == NAN else value for value in got]
    assert without_zero_sign(got, form) == without_zero_sign(want, form)


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("name", FLOAT_OPS)
def test_float_operations_round_to_nearest(name: str, kind: str) -> None:
    check_float(name, kind, "rn")


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("name", FLOAT_OPS)
def test_float_operations_round_as_directed(name: str, kind: str, mode: str) -> None:
    check_float(name, kind, mode)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize(("kind", "form"), [("f32", F32), ("f64", F64)])
def test_division_rounds_as_directed(kind: str, form: Format, mode: str) -> None:
    width = 1 + form.exponent + form.mantissa
    finite = [bits for bits in floats(form, 4 * LANES) if bits & form.infinity != form.infinity]
    a, b = finite[:LANES], [bits for bits in finite[LANES:] if form.decode(bits) != 0]
    pairs = list(zip(a, b, strict=False))
    want = [form.encode(form.decode(x) / form.decode(y), mode) for x, y in pairs]
    got = run(
        f"div.{mode}.{kind} %d0, %a0, %a1;", [([x for x, _ in pairs], width), ([y for _, y in pairs], width)], width
    )
    assert without_zero_sign(got, form) == without_zero_sign(want, form)


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma", "min", "max"])
def test_packed_operations_are_two_scalar_ones(name: str, kind: str) -> None:
    scalar = kind[:-2]
    form = FORMATS[scalar]
    arity = 3 if name == "fma" else 2
    rounding = ".rn" if name == "fma" else ""
    args = ", ".join(f"%a{i}" for i in range(arity))
    low, high = ([floats(form) for _ in range(arity)] for _ in range(2))
    packed = [([x | y << 16 for x, y in zip(*pair, strict=True)], 32) for pair in zip(low, high, strict=True)]
    got = run(f"{name}{rounding}.{kind} %d0, {args};", packed, 32)
    halves = [run(f"{name}{rounding}.{scalar} %d0, {args};", [(v, 16) for v in part], 16) for part in (low, high)]
    assert got == [x | y << 16 for x, y in zip(*halves, strict=True)]


def test_signed_zeros() -> None:
    zero, minus = 0, 1 << 31
    pairs = [(zero, zero), (zero, minus), (minus, zero), (minus, minus)]
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    for name, want in {
        "add.f32": [zero, zero, zero, minus],
        "sub.f32": [zero, zero, minus, zero],
        "mul.f32": [zero, minus, minus, zero],
        "min.f32": [zero, minus, minus, minus],
        "max.f32": [zero, zero, zero, minus],
    }.items():
        assert run(f"{name} %d0, %a0, %a1;", [(a, 32), (b, 32)], 32) == want, name


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("name", ["min", "max"])
def test_minimum_and_maximum_leave_nan_out_unless_asked(name: str, kind: str) -> None:
    form = FORMATS[kind]
    width = 1 + form.exponent + form.mantissa
    a, b = floats(form), floats(form)
    pick = min if name == "min" else max
    plain, strict = [], []
    for x, y in zip(a, b, strict=True):
        u, v = form.decode(x), form.decode(y)
        numbers = [value for value in (u, v) if value != NAN]
        plain.append(form.encode(pick(numbers)) if numbers else form.encode(NAN))
        strict.append(form.encode(NAN) if len(numbers) < 2 else plain[-1])
    got = run(f"{name}.{kind} %d0, %a0, %a1;", [(a, width), (b, width)], width)
    nan_free = [form.encode(NAN) if form.decode(value) == NAN else value for value in got]
    assert without_zero_sign(nan_free, form) == without_zero_sign(plain, form)
    if kind != "f64":
        got = run(f"{name}.NaN.{kind} %d0, %a0, %a1;", [(a, width), (b, width)], width)
        assert without_zero_sign(got, form) == without_zero_sign(strict, form)


def test_flush_to_zero_takes_inputs_and_results() -> None:
    smallest_normal, subnormal, minus_subnormal = 0x00800000, 0x00400000, 0x80400000
    half = 0x3F000000
    a = [subnormal, minus_subnormal, smallest_normal, smallest_normal]
    b = [0, 0x80000000, half, 0x40000000]
    assert run("add.ftz.f32 %d0, %a0, %a1;", [(a[:2], 32), (b[:2], 32)], 32) == [0, 0x80000000]
    assert run("mul.ftz.f32 %d0, %a0, %a1;", [(a, 32), ([half] * 4, 32)], 32) == [0, 0x80000000, 0, 0]
    assert run("mul.f32 %d0, %a0, %a1;", [(a[2:], 32), (b[2:], 32)], 32) == [0x00400000, 0x01000000]


def test_saturation_clamps_to_the_unit_interval() -> None:
    a = [F32.encode(Fraction(x)) for x in (-3, 2)] + [F32.encode(NAN), F32.encode(Fraction(1, 4))]
    zero = [0] * 4
    want = [0, F32.encode(Fraction(1)), 0, F32.encode(Fraction(1, 4))]
    assert run("add.sat.f32 %d0, %a0, %a1;", [(a, 32), (zero, 32)], 32) == want
    one = [F32.encode(Fraction(1))] * 4
    assert run("fma.rn.sat.f32 %d0, %a0, %a1, %a2;", [(a, 32), (one, 32), (zero, 32)], 32) == want


def test_float_signs() -> None:
    a = floats(F32)
    assert run("abs.f32 %d0, %a0;", [(a, 32)], 32) == [x & 0x7FFFFFFF for x in a]
    assert run("neg.f32 %d0, %a0;", [(a, 32)], 32) == [x ^ 0x80000000 for x in a]
    b = floats(F32)
    want = [(y & 0x7FFFFFFF) | (x & 0x80000000) for x, y in zip(a, b, strict=True)]
    assert run("copysign.f32 %d0, %a0, %a1;", [(a, 32), (b, 32)], 32) == want


FUNCTIONS: dict[str, Callable[[float], float]] = {
    "ex2.approx.f32": lambda x: 2.0**x,
    "lg2.approx.f32": math.log2,
    "rcp.approx.f32": lambda x: 1 / x,
    "sqrt.approx.f32": math.sqrt,
    "rsqrt.approx.f32": lambda x: 1 / math.sqrt(x),
    "sin.approx.f32": math.sin,
    "cos.approx.f32": math.cos,
    "tanh.approx.f32": math.tanh,
    "sqrt.rn.f32": math.sqrt,
    "rcp.rn.f32": lambda x: 1 / x,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_rounded_float64(name: str) -> None:
    values = torch.rand(LANES) * 8 + 0.01
    out = torch.zeros(LANES)
    snippet(f"{name} %d0, %a0;", [values], [out])
    want = torch.tensor([FUNCTIONS[name](x) for x in values.double().tolist()], dtype=torch.float64).float()
    torch.testing.assert_close(out, want, rtol=0 if ".rn" in name else 1.2e-7, atol=0)


def test_functions_at_the_edges() -> None:
    inf, nan = math.inf, math.nan
    values = torch.tensor([inf, -inf, 0.0, nan, -1.0, 200.0, -200.0])
    for name, want in {
        "ex2.approx.ftz.f32": [inf, 0.0, 1.0, nan, 0.5, inf, 0.0],
        "lg2.approx.f32": [inf, nan, -inf, nan, nan, math.log2(200), nan],
        "rcp.approx.f32": [0.0, -0.0, inf, nan, -1.0, 1 / 200, -1 / 200],
    }.items():
        out = torch.zeros(7)
        snippet(f"{name} %d0, %a0;", [values], [out])
        torch.testing.assert_close(out, torch.tensor(want), equal_nan=True)


@pytest.mark.parametrize(
    "instruction",
    [
        "add.cc.u32 %d0, %a0, %a1;",
        "min.xorsign.abs.f32 %d0, %a0, %a1;",
        "min.relu.f16 %d0, %a0, %a1;",
        "dp4a.u32.u32 %d0, %a0, %a1, %a0;",
    ],
)
def test_what_is_not_modelled_is_refused(instruction: str) -> None:
    with pytest.raises(Unsupported, match="not modelled"):
        run(instruction, [([1], 32), ([2], 32)], 32)


def test_pairs_of_floats_in_one_register() -> None:
    """sm_100's .f32x2: each half as the instruction for one float32 has it."""
    a, b, c = (torch.randn(64, 2) for _ in range(3))
    inputs = [x.view(torch.int64).flatten() for x in (a, b, c)]
    wide = (a.double() * b.double() + c.double()).float()  # no double rounding shows in so few random numbers
    for body, want in (
        ("add.rn.f32x2 %d0, %a0, %a1;", a + b),
        ("sub.rn.f32x2 %d0, %a0, %a1;", a - b),
        ("mul.rn.f32x2 %d0, %a0, %a1;", a * b),
        ("fma.rn.f32x2 %d0, %a0, %a1, %a2;", wide),
    ):
        out = torch.zeros(64, dtype=torch.int64)
        snippet(body, inputs, [out]).check()
        assert torch.equal(out.view(torch.float32).view(64, 2), want), body


def test_the_least_and_greatest_of_three() -> None:
    values = [math.nan, -math.inf, -1.0, -0.0, 0.0, 2.0]
    a, b, c = (torch.tensor(x) for x in zip(*itertools.product(values, repeat=3)))
    for name in ("min", "max"):
        for nan in ("", ".NaN"):
            pair, three = torch.zeros_like(a), torch.zeros_like(a)
            two = f"{name}{nan}.f32 %d0, %a0, %a1; {name}{nan}.f32 %d0, %d0, %a2;"
            snippet(two, [a, b, c], [pair]).check()
            snippet(f"{name}{nan}.f32 %d0, %a0, %a1, %a2;", [a, b, c], [three]).check()
            assert torch.equal(pair.view(torch.int32), three.view(torch.int32))
