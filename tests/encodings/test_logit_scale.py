"""LogitScale and the amplitude of a plan, xPos, and positions that are fractions, against formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch

import posattn
from posattn.encodings import DAPE, AxialRoPE, Context, Encoding, Kerple, LogitScale, LongRoPE, MRoPE, RoPE, XPos
from posattn.plan import Bias, Mask, Plan
from tests.tolerance import assert_parity

WIDE = torch.float64
HEADS, DIM, TOKENS = 3, 8, 29
CPU = torch.device("cpu")


def qkv(dtype=torch.float32, batch=2, tokens=TOKENS):
    return torch.randn(3, batch, HEADS, tokens, DIM, dtype=WIDE).to(dtype).unbind()


def attended(x, v):
    hidden = torch.ones(x.shape[-2:], dtype=torch.bool).triu(1)
    return x.masked_fill(hidden, -torch.inf).softmax(-1) @ v


def llama4(p):
    return 1 + 0.2 * math.log(1 + math.floor((p + 1) / 5))


def logarithm(p):
    return 0.7 * math.log(p + 1)


@pytest.mark.parametrize(
    ("scale", "factor"),
    [
        (LogitScale(strength=0.2, length=5), llama4),
        (LogitScale("log", strength=0.7), logarithm),
        (LogitScale("yarn", 0.8, factor=40.0), lambda p: (0.1 * 0.8 * math.log(40) + 1) ** 2),
        (LogitScale("yarn", factor=0.5), lambda p: 1.0),
    ],
    ids=["llama4", "log", "yarn", "yarn of less"],
)
@pytest.mark.parametrize("rope", [None, RoPE(DIM), RoPE(DIM, rotary_dim=4)], ids=["alone", "turned", "partly turned"])
def test_the_formula(scale, factor, rope):
    q, k, v = qkv(WIDE)
    a = torch.tensor([factor(p) for p in range(TOKENS)], dtype=WIDE)[:, None]
    turned = (q, k) if rope is None else (rope.rotate(q), rope.rotate(k))
    expected = attended(a * (turned[0] @ turned[1].mT) * DIM**-0.5, v)
    position = scale if rope is None else rope + scale
    torch.testing.assert_close(posattn.attention(q, k, v, position, causal=True), expected)
    narrow = posattn.attention(*(x.float() for x in (q, k, v)), position, causal=True)
    torch.testing.assert_close(narrow.double(), expected, rtol=1e-4, atol=1e-5)


def test_defaults():
    q = torch.zeros(1, HEADS, 16384, DIM)
    amplitude = LogitScale().lower(Context.of(q, q, Mask())).amplitude
    assert amplitude.shape == (1, 1, 16384)
    assert amplitude[0, 0, [0, 8190]].tolist() == [1.0, 1.0]
    assert amplitude[0, 0, 8191].item() == pytest.approx(1 + 0.1 * math.log(2))
    log = LogitScale("log", length=100).lower(Context.of(q, q, Mask())).amplitude
    assert log[0, 0, 99].item() == pytest.approx(1.0)
    assert log[0, 0, 0].item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda: LogitScale("log", num_heads=HEADS),
        lambda: RoPE(DIM) + LogitScale("log", num_heads=HEADS),
        lambda: RoPE(DIM) + LogitScale(length=4) + Kerple(HEADS),
        lambda: RoPE(DIM, rotary_dim=4, learnable=True) + LogitScale(length=4),
        lambda: AxialRoPE(DIM, 5, mixed=True, num_heads=HEADS) + LogitScale("log", num_heads=HEADS),
        lambda: DAPE(LogitScale(length=4) + Kerple(HEADS), HEADS),
        lambda: LogitScale(length=4) + LogitScale("log"),
        lambda: XPos(DIM, scale_base=40.0) + LogitScale(length=7),
    ],
)
def test_parity(place, dtype, make):
    device, backend = place
    q, k, v = (x.to(device) for x in qkv(dtype))
    assert_parity(q, k, v, make().to(device), {"causal": True, "softcap": 20.0}, backend)


def test_a_learned_strength_is_the_formula():
    q, k, v = qkv(WIDE)
    scale = LogitScale("log", num_heads=HEADS).double()
    with torch.no_grad():
        scale.strength.uniform_(0.5, 1.0)
    s = scale.strength.detach().clone().requires_grad_()
    n = torch.arange(1, TOKENS + 1, dtype=WIDE)[:, None]
    expected = attended(s[:, None, None] * n.log() * (q @ k.mT) * DIM**-0.5, v)
    got = posattn.attention(q, k, v, scale, causal=True)
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out, x in ((got, scale.strength), (expected, s))]
    torch.testing.assert_close(*gradients)


def test_steps_with_a_cache_are_the_whole():
    for position in (LogitScale(length=4), RoPE(DIM) + LogitScale("log"), XPos(DIM, scale_base=20.0)):
        q, k, v = qkv(batch=1)
        whole = posattn.attention(q, k, v, position, causal=True)
        for n in (1, 11, TOKENS):
            step = posattn.attention(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], position, causal=True)
            torch.testing.assert_close(step, whole[:, :, n - 1 : n])
        chunk = posattn.attention(q[:, :, 10:20], k, v, position, causal=True, offset=10)
        torch.testing.assert_close(chunk, whole[:, :, 10:20])


def test_xpos_is_the_formula():
    q, k, v = qkv(WIDE)
    position = XPos(DIM, scale_base=20.0)
    zeta = (torch.arange(0, DIM, 2) / DIM + 0.4) / 1.4
    theta = 10000.0 ** -(torch.arange(0, DIM, 2, dtype=WIDE) / DIM)
    i = torch.arange(TOKENS, dtype=WIDE)
    d = (i[:, None] - i)[..., None]
    q_pairs, k_pairs = (torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) for x in (q, k))
    turn = torch.polar((zeta ** (d / 20.0)).to(WIDE), d * theta)  # [T, T, pairs]
    logits = torch.einsum("bhip,bhjp,ijp->bhij", q_pairs, k_pairs.conj(), turn).real * DIM**-0.5
    torch.testing.assert_close(posattn.attention(q, k, v, position, causal=True), attended(logits, v))
    places = torch.arange(TOKENS) + 1_000_000
    moved = posattn.attention(q, k, v, position, causal=True, q_positions=places, k_positions=places)
    torch.testing.assert_close(moved, attended(logits, v), rtol=1e-5, atol=1e-6)


def test_xpos_holds_long_sequences_in_float32():
    rotary = XPos(64).lower(Context(65536, 65536, 1, 64, CPU, torch.float32)).rotary
    for table in (rotary.q_cos, rotary.q_sin, rotary.k_cos, rotary.k_sin):
        assert table.isfinite().all()
    with pytest.raises(TypeError, match="rotate: xPos turns queries and keys differently"):
        XPos(8).rotate(torch.zeros(1, 1, 2, 8))
    with pytest.raises(TypeError, match="rotation: xPos turns queries and keys differently"):
        XPos(8).tables(torch.arange(3))
    with pytest.raises(ValueError, match="k_rotated: expected False with XPos"):
        posattn.attention(*qkv(), XPos(DIM), k_rotated=True)


def test_the_amplitude_costs_nothing_where_the_whole_head_turns():
    from posattn import turning
    from posattn.plan import Call

    q, k, v = qkv()
    for rope, untouched in ((RoPE(DIM), True), (RoPE(DIM, rotary_dim=4), False)):
        plan = (rope + LogitScale(length=4)).lower(Context.of(q, k, Mask()))
        call = turning.scaled(Call(q, k, v, plan, Mask(), 1.0))
        assert call.plan.amplitude is None
        assert (call.q is q) == untouched
        assert call.k is k


# Fractions


FRACTIONAL = {
    "RoPE": lambda: RoPE(DIM, base=20.0),
    "learned": lambda: RoPE(DIM, base=20.0, learnable=True),
    "xPos": lambda: XPos(DIM, scale_base=20.0),
    "a sum": lambda: RoPE(DIM, base=20.0) + LogitScale("log"),
    "under DAPE": lambda: DAPE(RoPE(DIM, base=20.0), HEADS),
}


@pytest.mark.parametrize("name", FRACTIONAL)
def test_fractions_of_a_longer_sequence_are_its_positions_scaled(name):
    """Positions p / 4 are what four times lower frequencies make of p."""
    position = FRACTIONAL[name]()
    q, k, v = qkv(WIDE)
    position = position.double()
    places = torch.arange(TOKENS)
    whole = posattn.attention(q, k, v, position, causal=True, q_positions=places, k_positions=places)
    same = posattn.attention(q, k, v, position, causal=True, q_positions=places.float(), k_positions=places)
    assert torch.equal(same, whole)
    half = places.double() / 4
    out = posattn.attention(q, k, v, position, causal=True, q_positions=half, k_positions=half[None])
    assert not torch.allclose(out, whole)
    if name == "RoPE":
        slow = RoPE(DIM, base=20.0, scaling=posattn.Linear(4.0))
        torch.testing.assert_close(out, posattn.attention(q, k, v, slow, causal=True))
    options = {"causal": True, "q_positions": half.float(), "k_positions": half.float()}
    assert_parity(*(x.float() for x in (q, k, v)), FRACTIONAL[name](), options, "cpu")


def test_axes_take_fractions():
    q, k, v = qkv(WIDE, tokens=24)
    rope = AxialRoPE(DIM, width=6, base=30.0)
    cell = torch.arange(24)
    places = torch.stack([cell // 6, cell % 6])[:, None]  # [2, 1, T]
    torch.testing.assert_close(posattn.attention(q, k, v, rope.at(places)), posattn.attention(q, k, v, rope))
    finer = posattn.attention(q, k, v, rope.at(places / 2))
    row, column = (places[axis, 0, :, None] / 2 * 30.0 ** -(torch.arange(2, dtype=WIDE) * 4 / DIM) for axis in (0, 1))
    angles = torch.cat([row, column], -1)

    def turn(x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)

    expected = (turn(q) @ turn(k).mT * DIM**-0.5).softmax(-1) @ v
    torch.testing.assert_close(finer, expected)
    mixed = AxialRoPE(DIM, width=6, mixed=True, num_heads=HEADS).double()
    torch.testing.assert_close(posattn.attention(q, k, v, mixed.at(places)), posattn.attention(q, k, v, mixed))
    posattn.attention(q, k, v, mixed.at(places / 3)).sum().backward()
    assert mixed.theta.grad.abs().sum() > 0
    m = MRoPE(DIM, (2, 1, 1))
    ids = torch.rand(3, 1, 24)
    torch.testing.assert_close(
        posattn.attention(q, k, v, m.at(ids)), posattn.attention(q, k, v, m.at(ids.double())), rtol=1e-6, atol=1e-6
    )
    with pytest.raises(ValueError, match=r"q_ids: expected \[2, B or 1, T\], got \[3, 1, 24\]"):
        rope.at(ids)


@pytest.mark.parametrize(
    "position", [Kerple(HEADS), RoPE(DIM) + posattn.ALiBi(HEADS), DAPE(Kerple(HEADS), HEADS)], ids=str
)
def test_a_bias_of_the_distance_takes_no_fractions(position):
    q, k, v = qkv()
    with pytest.raises(TypeError, match="q_positions, k_positions: expected integers, got fractions"):
        posattn.attention(q, k, v, position, q_positions=torch.rand(TOKENS), k_positions=torch.arange(TOKENS))


def test_a_position_that_is_no_number():
    q, k, v = qkv()
    places = torch.rand(TOKENS)
    places[3] = torch.nan
    with pytest.raises(ValueError, match=r"q_positions: expected positions between -2\^31 and 2\^31, got nan"):
        posattn.attention(q, k, v, RoPE(DIM), q_positions=places, k_positions=torch.arange(TOKENS))


@pytest.mark.parametrize("rule", [posattn.DynamicNTK(2.0, 4), LongRoPE([1.0] * 4, [2.0] * 4, 4, 2.0)], ids=str)
def test_dynamic_rules_take_fractions(rule):
    q, k, v = qkv(WIDE)
    rope, places = RoPE(DIM, scaling=rule), torch.arange(TOKENS)
    segments = torch.arange(TOKENS) // 13
    for options in ({}, {"segments": segments}):
        whole, same = (
            posattn.attention(q, k, v, rope, causal=True, q_positions=x, k_positions=x, **options)
            for x in (places, places.double())
        )
        assert torch.equal(same, whole)


# An attention factor a length


def test_longrope_may_have_a_factor_for_each_set():
    rule = LongRoPE([1.0] * 4, [1.0] * 4, 10, 4.0, attention_factor=(1.2, 1.5))
    assert rule.frequencies(8, 100.0, 10, CPU)[1] == 1.2
    assert rule.frequencies(8, 100.0, 11, CPU)[1] == 1.5
    q, k, v = qkv(WIDE)
    rope, plain = RoPE(DIM, base=100.0, scaling=rule), RoPE(DIM, base=100.0)
    lengths = torch.tensor([TOKENS, 9])
    got = posattn.attention(q[:, :, :5], k, v, rope, k_lengths=lengths)
    for b, (n, factor) in enumerate(((TOKENS, 1.5), (9, 1.2))):
        one = [x[b, None, :, :n] for x in (k, v)]
        expected = posattn.attention(q[b, None, :, :5], *one, plain, scale=DIM**-0.5 * factor**2)
        torch.testing.assert_close(got[b, None], expected)
    cu = torch.tensor([0, 9, TOKENS])
    packed = posattn.attention(q[:1], k[:1], v[:1], rope, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu)
    for (a, b), factor in zip(((0, 9), (9, TOKENS)), (1.2, 1.5), strict=True):
        one = (x[:1, :, a:b] for x in (q, k, v))
        expected = posattn.attention(*one, plain, causal=True, scale=DIM**-0.5 * factor**2)
        torch.testing.assert_close(packed[:, :, a:b], expected)
    with pytest.raises(ValueError, match="attention_factor: expected one number or two, got 3"):
        LongRoPE([1.0], [1.0], 10, 4.0, attention_factor=(1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match=r"attention_factor\[1\]: expected a positive finite number"):
        LongRoPE([1.0], [1.0], 10, 4.0, attention_factor=(1.0, -2.0))


# Bad values


class Wrong(Encoding):
    def __init__(self, plan):
        super().__init__()
        self.plan = plan

    def build(self, context):
        return self.plan


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"amplitude": torch.ones(TOKENS)}, r"amplitude .* of shape \[2 or 1, 3 or 1, 29\], got \[29\]"),
        ({"amplitude": torch.ones(1, 2, TOKENS)}, r"amplitude .* of shape \[2 or 1, 3 or 1, 29\], got \[1, 2, 29\]"),
        ({"places": 3}, r"places .* a Places, got int"),
        ({"places": posattn.plan.Places(torch.zeros(1, TOKENS), torch.zeros(1, TOKENS))}, r"places.q .* of int64"),
        (
            {"places": posattn.plan.Places(torch.arange(TOKENS)[None], torch.arange(3)[None])},
            r"places.k .* of shape \[2 or 1, 29\], got \[1, 3\]",
        ),
    ],
)
def test_bad_plans(plan, message):
    q, k, v = qkv()
    with pytest.raises((ValueError, TypeError), match=message):
        posattn.attention(q, k, v, Wrong(Plan(bias=Bias(), **plan)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogitScale("sqrt"), "form: expected one of 'llama4', 'log', 'yarn', got 'sqrt'"),
        (lambda: LogitScale("yarn"), "factor: expected a number with form='yarn', got None"),
        (lambda: LogitScale(factor=2.0), "factor: expected None with form='llama4', got 2.0"),
        (lambda: LogitScale(num_heads=2), "num_heads: expected None with form='llama4', where nothing is learned"),
        (lambda: LogitScale("log", length=1), "length: expected at least 2 for the default strength"),
        (lambda: LogitScale("log", float("inf")), "strength: expected a finite number"),
        (lambda: XPos(8, gamma=0.0), "gamma: expected a positive finite number"),
        (lambda: XPos(8, scale_base=-1.0), "scale_base: expected a positive finite number"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()
