"""Bitwise instructions, comparisons and conversions of the PTX machine, bit for bit against the ISA's definitions."""

import math
import operator
import random
from collections.abc import Callable
from fractions import Fraction

import pytest

from tests.ptxsim.bits import as_signed, integers, run
from tests.ptxsim.exact import FORMATS, NAN, Format


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(1)


@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize(("name", "op"), [("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)])
def test_logic(name: str, op: Callable[[int, int], int], width: int) -> None:
    a, b = integers(width), integers(width)
    want = [op(x, y) for x, y in zip(a, b, strict=True)]
    assert run(f"{name}.b{width} %d0, %a0, %a1;", [(a, width), (b, width)], width) == want
    assert run(f"not.b{width} %d0, %a0;", [(a, width)], width) == [~x & ((1 << width) - 1) for x in a]


@pytest.mark.parametrize("width", [16, 32, 64])
def test_shifts_past_the_width_give_zeros_or_the_sign(width: int) -> None:
    a = integers(width)
    amounts = [random.choice([0, 1, width - 1, width, width + 1, 200, random.randrange(width)]) for _ in a]
    operands = [(a, width), (amounts, 32)]
    mask = (1 << width) - 1
    pairs = list(zip(a, amounts, strict=True))
    assert run(f"shl.b{width} %d0, %a0, %a1;", operands, width) == [x << n & mask for x, n in pairs]
    assert run(f"shr.u{width} %d0, %a0, %a1;", operands, width) == [x >> n for x, n in pairs]
    assert run(f"shr.s{width} %d0, %a0, %a1;", operands, width) == [as_signed(x, width) >> n & mask for x, n in pairs]


@pytest.mark.parametrize("side", ["l", "r"])
@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift(side: str, mode: str) -> None:
    low, high = integers(32), integers(32)
    amounts = [random.choice([0, 1, 31, 32, 33, 40]) for _ in low]
    want = []
    for x, y, n in zip(low, high, amounts, strict=True):
        n = n % 32 if mode == "wrap" else min(n, 32)
        pair = y << 32 | x
        want.append((pair << n >> 32 if side == "l" else pair >> n) & 0xFFFFFFFF)
    assert run(f"shf.{side}.{mode}.b32 %d0, %a0, %a1, %a2;", [(low, 32), (high, 32), (amounts, 32)], 32) == want


@pytest.mark.parametrize("table", [0x96, 0xE8, 0xCA, 0x01, 0x80, 0xF8])
def test_any_logic_of_three(table: int) -> None:
    a, b, c = integers(32), integers(32), integers(32)
    want = []
    for x, y, z in zip(a, b, c, strict=True):
        bits = [table >> ((x >> i & 1) << 2 | (y >> i & 1) << 1 | (z >> i & 1)) & 1 for i in range(32)]
        want.append(sum(bit << i for i, bit in enumerate(bits)))
    assert run(f"lop3.b32 %d0, %a0, %a1, %a2, {table};", [(a, 32), (b, 32), (c, 32)], 32) == want


def test_byte_permutation() -> None:
    a, b, selector = integers(32), integers(32), integers(32)
    want = []
    for x, y, s in zip(a, b, selector, strict=True):
        source = (y << 32 | x).to_bytes(8, "little")
        nibbles = [s >> 4 * i & 15 for i in range(4)]
        chosen = [(255 if source[n & 7] & 128 else 0) if n & 8 else source[n & 7] for n in nibbles]
        want.append(int.from_bytes(bytes(chosen), "little"))
    assert run("prmt.b32 %d0, %a0, %a1, %a2;", [(a, 32), (b, 32), (selector, 32)], 32) == want


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind: str) -> None:
    width = int(kind[1:])
    a, b = integers(width), integers(width)
    position = [random.choice([0, 3, width - 1, width, 255]) for _ in a]
    length = [random.choice([0, 1, 5, width, 255]) for _ in a]
    extracted, inserted = [], []
    for x, y, p, n in zip(a, b, position, length, strict=True):
        field = 0
        for i in range(width):  # the ISA's own loop, bit by bit
            inside = i < n and p + i < width
            sign = kind[0] == "s" and n > 0 and x >> min(p + n - 1, width - 1) & 1
            field |= (x >> (p + i) & 1 if inside else int(sign)) << i
        extracted.append(field)
        merged = y
        for i in range(n):
            if p + i < width:
                merged = merged & ~(1 << p + i) | (x >> i & 1) << p + i
        inserted.append(merged)
    places = [(position, 32), (length, 32)]
    assert run(f"bfe.{kind} %d0, %a0, %a1, %a2;", [(a, width), *places], width) == extracted
    if kind[0] == "u":
        got = run(f"bfi.b{width} %d0, %a0, %a1, %a2, %a3;", [(a, width), (b, width), *places], width)
        assert got == inserted


@pytest.mark.parametrize("width", [32, 64])
def test_bit_counting(width: int) -> None:
    a = integers(width)
    assert run(f"popc.b{width} %d0, %a0;", [(a, width)], 32) == [x.bit_count() for x in a]
    assert run(f"clz.b{width} %d0, %a0;", [(a, width)], 32) == [width - x.bit_length() for x in a]
    assert run(f"bfind.u{width} %d0, %a0;", [(a, width)], 32) == [(x.bit_length() - 1) & 0xFFFFFFFF for x in a]
    reverse = [int(f"{x:0{width}b}"[::-1], 2) for x in a]
    assert run(f"brev.b{width} %d0, %a0;", [(a, width)], width) == reverse


def test_moves_pack_and_unpack() -> None:
    a, b = integers(32), integers(32)
    want = [y << 32 | x for x, y in zip(a, b, strict=True)]
    assert run("mov.b64 %d0, {%a0, %a1};", [(a, 32), (b, 32)], 64) == want
    halves = "mov.b32 {%l, %h}, %a0; mov.b32 %d0, {%h, %l};"
    want = [(x << 16 | x >> 16) & 0xFFFFFFFF for x in a]
    assert run(halves, [(a, 32)], 32, declare=".reg .b16 %l, %h;") == want


ORDERED = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
UNSIGNED = {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}
STORE = "selp.b32 %d0, 1, 0, %p;"


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_integer_comparisons(kind: str) -> None:
    width = int(kind[1:])
    a = integers(width)
    b = [x if random.random() < 0.3 else y for x, y in zip(a, integers(width), strict=True)]
    value = (lambda x: as_signed(x, width)) if kind[0] == "s" else int
    for name, op in (ORDERED if kind[0] == "s" else ORDERED | UNSIGNED).items():
        want = [int(op(value(x), value(y))) for x, y in zip(a, b, strict=True)]
        assert run(f"setp.{name}.{kind} %p, %a0, %a1; {STORE}", [(a, width), (b, width)], 32) == want, name


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
def test_float_comparisons_and_nan(kind: str) -> None:
    form = FORMATS[kind]
    width = 1 + form.exponent + form.mantissa
    numbers = [form.encode(Fraction(x)) for x in (-2, -1, 0, 1, 2)] + [form.sign, form.infinity, form.encode(NAN)]
    a, b = ([random.choice(numbers) for _ in range(256)] for _ in range(2))
    for name, op in ORDERED.items():
        for suffix, when_unordered in (("", False), ("u", True)):
            want = []
            for x, y in zip(a, b, strict=True):
                u, v = form.decode(x), form.decode(y)
                want.append(int(when_unordered if NAN in (u, v) else op(u, v)))
            body = f"setp.{name}{suffix}.{kind} %p, %a0, %a1; {STORE}"
            assert run(body, [(a, width), (b, width)], 32) == want, name + suffix
    unordered = [int(NAN in (form.decode(x), form.decode(y))) for x, y in zip(a, b, strict=True)]
    assert run(f"setp.nan.{kind} %p, %a0, %a1; {STORE}", [(a, width), (b, width)], 32) == unordered
    assert run(f"setp.num.{kind} %p, %a0, %a1; {STORE}", [(a, width), (b, width)], 32) == [1 - x for x in unordered]


def test_a_comparison_combines_with_a_predicate_and_gives_its_complement() -> None:
    a, b, c = ([random.randrange(3) for _ in range(64)] for _ in range(3))
    for name, op in {"and": operator.and_, "or": operator.or_, "xor": operator.xor}.items():
        body = f"setp.ne.s32 %q, %a2, 0; setp.lt.{name}.s32 %p|%q, %a0, %a1, !%q;"
        body += "selp.b32 %d0, 1, 0, %p; selp.b32 %t, 2, 0, %q; or.b32 %d0, %d0, %t; mov.u32 %t, %tid.x;"
        want = []
        for x, y, z in zip(a, b, c, strict=True):
            want.append(int(op(x < y, z == 0)) | 2 * int(op(x >= y, z == 0)))
        assert run(body, [(a, 32), (b, 32), (c, 32)], 32) == want, name


def test_set_and_testp() -> None:
    values = [0x3F800000, 0xBF800000, 0x7F800000, 0x7FC00000, 0x00000001, 0]
    one, ones = 0x3F800000, 0xFFFFFFFF
    assert run("set.gt.f32.f32 %d0, %a0, 0f00000000;", [(values, 32)], 32) == [one, 0, one, 0, one, 0]
    assert run("set.gt.u32.f32 %d0, %a0, 0f00000000;", [(values, 32)], 32) == [ones, 0, ones, 0, ones, 0]
    for name, want in {
        "infinite": [0, 0, 1, 0, 0, 0],
        "notanumber": [0, 0, 0, 1, 0, 0],
        "subnormal": [0, 0, 0, 0, 1, 0],
    }.items():
        assert run(f"testp.{name}.f32 %p, %a0; {STORE}", [(values, 32)], 32) == want


def spread(form: Format, count: int = 256) -> list[int]:
    """Patterns of every size, with the halfway cases of narrower formats among them."""
    width = 1 + form.exponent + form.mantissa
    chosen = [0, 1, form.infinity, form.infinity | form.sign, form.encode(NAN), form.infinity - 1]
    while len(chosen) < count:
        bits = random.getrandbits(width)
        if random.random() < 0.6:
            exponent = form.bias + random.randint(-30, 30)
            exponent = min(max(exponent, 0), 2 * form.bias)
            bits = (bits & form.sign) | exponent << form.mantissa | (bits & ((1 << form.mantissa) - 1))
        if random.random() < 0.4 and form.mantissa > 10:
            bits &= ~((1 << (form.mantissa - 11)) - 1)
        chosen.append(bits)
    return chosen


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize(("to", "source"), [("f16", "f32"), ("bf16", "f32"), ("f32", "f64"), ("f16", "f64")])
def test_narrowing_rounds_as_directed(to: str, source: str, mode: str) -> None:
    wide, narrow = FORMATS[source], FORMATS[to]
    widths = [1 + form.exponent + form.mantissa for form in (wide, narrow)]
    a = spread(wide)
    want = [narrow.encode(wide.decode(bits), mode) for bits in a]
    got = run(f"cvt.{mode}.{to}.{source} %d0, %a0;", [(a, widths[0])], widths[1])

    def one_zero(values: list[int]) -> list[int]:
        """Exact arithmetic has no signed zero."""
        return [0 if bits == narrow.sign else bits for bits in values]

    assert one_zero(got) == one_zero(want)


@pytest.mark.parametrize(("to", "source"), [("f32", "f16"), ("f32", "bf16"), ("f64", "f32"), ("f64", "f16")])
def test_widening_is_exact(to: str, source: str) -> None:
    narrow, wide = FORMATS[source], FORMATS[to]
    widths = [1 + form.exponent + form.mantissa for form in (narrow, wide)]
    a = spread(narrow)
    got = run(f"cvt.{to}.{source} %d0, %a0;", [(a, widths[0])], widths[1])
    assert [wide.decode(bits) for bits in got] == [narrow.decode(bits) for bits in a]


def test_pairs_and_tf32() -> None:
    a, b = spread(FORMATS["f32"]), spread(FORMATS["f32"])
    for kind in ("f16", "bf16"):
        high, low = (run(f"cvt.rn.{kind}.f32 %d0, %a0;", [(v, 32)], 16) for v in (a, b))
        got = run(f"cvt.rn.{kind}x2.f32 %d0, %a0, %a1;", [(a, 32), (b, 32)], 32)
        assert got == [x << 16 | y for x, y in zip(high, low, strict=True)]
    finite = [x for x in a if x & 0x7F800000 != 0x7F800000]
    tf32 = Format(8, 10)
    for bits, got in zip(finite, run("cvt.rna.tf32.f32 %d0, %a0;", [(finite, 32)], 32), strict=True):
        exact = FORMATS["f32"].decode(bits)
        tie = bits & 0x1FFF == 0x1000
        up = tf32.encode(exact, "rp" if exact > 0 else "rm")
        want = (up if tie else tf32.encode(exact) | (bits >> 31 << 18)) << 13
        assert got & 0x7FFFFFFF == want & 0x7FFFFFFF


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("to", ["s32", "u32", "s64", "u64", "s16", "u8"])
@pytest.mark.parametrize("source", ["f32", "f64", "f16"])
def test_floats_to_integers_clamp(source: str, to: str, mode: str) -> None:
    form = FORMATS[source]
    source_width, width = 1 + form.exponent + form.mantissa, int(to[1:])
    rounding = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[mode]
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if to[0] == "s" else (0, (1 << width) - 1)
    want = []
    a = spread(form)
    for bits in a:
        value = form.decode(bits)
        if value == NAN:
            whole = 1 << width - 1 if source == "f64" or width == 64 else 0
        elif isinstance(value, float):
            whole = high if value > 0 else low
        else:
            whole = min(max(rounding(value), low), high)
        want.append(whole & ((1 << width) - 1))
    got = run(f"cvt.{mode}.{to}.{source} %d0, %a0;", [(a, source_width)], max(width, 16))
    assert [x & ((1 << width) - 1) for x in got] == want


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("to", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("source", ["s32", "u32", "s64", "u64"])
def test_integers_to_floats(source: str, to: str, mode: str) -> None:
    form, width = FORMATS[to], int(source[1:])
    a = integers(width)
    value = (lambda x: as_signed(x, width)) if source[0] == "s" else int
    want = [form.encode(Fraction(value(x)), mode) for x in a]
    assert run(f"cvt.{mode}.{to}.{source} %d0, %a0;", [(a, width)], 1 + form.exponent + form.mantissa) == want


@pytest.mark.parametrize("to", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("source", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_integers_to_integers(source: str, to: str) -> None:
    from_width, width = int(source[1:]), int(to[1:])
    a = integers(from_width)
    values = [as_signed(x, from_width) if source[0] == "s" else x for x in a]
    mask = (1 << width) - 1
    assert run(f"cvt.{to}.{source} %d0, %a0;", [(a, from_width)], width) == [x & mask for x in values]
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if to[0] == "s" else (0, mask)
    clamped = [min(max(x, low), high) & mask for x in values]
    assert run(f"cvt.sat.{to}.{source} %d0, %a0;", [(a, from_width)], width) == clamped
