"""DAPE in its forms, and what `+` makes of encodings."""

from __future__ import annotations

import pytest
import torch

import posattn
from posattn import reference
from posattn.encodings import DAPE, FIRE, ALiBi, BiPE, Context, Kerple, RelativeTable, RelativeTable2D, RoPE, Sandwich
from posattn.plan import Call, Mask

WIDE = torch.float64
CPU = torch.device("cpu")
HEADS, TOKENS, DIM = 3, 6, 8
CONTEXT = Context(TOKENS, TOKENS, HEADS, DIM, CPU, WIDE)


class Unknown(posattn.encodings.Encoding):
    """Nothing is known of what it sets until it is lowered."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def build(self, context):
        return self.inner(context)


def qkv(seed=0):
    torch.manual_seed(seed)
    return (torch.randn(2, HEADS, TOKENS, DIM, dtype=WIDE) for _ in range(3))


def attend(encoding, q, k, v):
    plan = encoding.lower(Context.of(q, k, Mask()))
    return reference.forward(Call(q, k, v, plan, Mask(causal=True), scale=DIM**-0.5))[0]


def softmax_attend(logits, v):
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    return logits.masked_fill(hidden, -float("inf")).softmax(-1) @ v


def mixed(dape, x, b, form):
    """The definition, on logits [B, H, T, T], with the module's own mlp."""
    b = b.expand_as(x)
    z = x + b if form == "add" else torch.cat([x, b], dim=1)
    f = dape.mlp(z.movedim(1, -1)).movedim(-1, 1)
    return x + f if form == "concat" else x + b + f


@pytest.mark.parametrize("form", ["concat-residual", "concat", "add"])
@pytest.mark.parametrize("inner", [ALiBi(HEADS, learnable=True), Kerple(HEADS), FIRE(HEADS, initial_length=3.0)])
def test_forms(form, inner):
    dape = DAPE(inner, HEADS, width=5, form=form).double()
    assert dape.mlp[0].in_features == (HEADS if form == "add" else 2 * HEADS)
    q, k, v = qkv()
    expected = softmax_attend(mixed(dape, q @ k.mT * DIM**-0.5, inner.bias(TOKENS, TOKENS), form), v)
    torch.testing.assert_close(attend(dape, q, k, v), expected)
    weight = torch.randn_like(expected)
    got = torch.autograd.grad((attend(dape, q, k, v) * weight).sum(), list(dape.parameters()))
    for x, y in zip(got, torch.autograd.grad((expected * weight).sum(), list(dape.parameters())), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("form", ["concat-residual", "concat", "add"])
@pytest.mark.parametrize("signed", [False, True])
def test_learnable_slopes_inside(place, form, signed):
    """Without a causal mask, so that the sign of the distance counts; the gradients are those of the definition."""
    device, backend = place
    inner = ALiBi(HEADS, learnable=True, signed=signed)
    dape = DAPE(inner, HEADS, width=5, form=form).to(device)
    q, k, v = (x.float().to(device) for x in qkv())
    x = q @ k.mT * DIM**-0.5
    expected = mixed(dape, x, inner.bias(TOKENS, TOKENS), form).softmax(-1) @ v
    got = posattn.attention(q, k, v, dape, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    weight, leaves = torch.randn_like(got), list(dape.parameters())
    for a, b in zip(*(torch.autograd.grad((o * weight).sum(), leaves) for o in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["concat-residual", "concat", "add"])
@pytest.mark.parametrize("inner", [None, RoPE(DIM)])
def test_without_an_inner_bias(form, inner):
    dape = DAPE(inner, HEADS, form=form).double()
    assert dape.mlp[0].in_features == HEADS
    q, k, v = qkv()
    x = (q @ k.mT if inner is None else inner.rotate(q) @ inner.rotate(k).mT) * DIM**-0.5
    expected = softmax_attend(x + dape.mlp(x.movedim(1, -1)).movedim(-1, 1), v)
    torch.testing.assert_close(attend(dape, q, k, v), expected)


def test_the_rotary_part_of_the_inner_encoding_turns_q_and_k():
    rope, fire = RoPE(DIM), FIRE(HEADS, initial_length=3.0)
    dape = DAPE(rope + fire, HEADS).double()
    q, k, v = qkv()
    x = rope.rotate(q) @ rope.rotate(k).mT * DIM**-0.5
    expected = softmax_attend(mixed(dape, x, fire.bias(TOKENS, TOKENS), "concat-residual"), v)
    torch.testing.assert_close(attend(dape, q, k, v), expected)


def test_a_bias_beside_dape_is_added_after_the_mix():
    dape, alibi = DAPE(Kerple(HEADS), HEADS).double(), ALiBi(HEADS).double()
    q, k, v = qkv()
    x = q @ k.mT * DIM**-0.5
    after = mixed(dape, x, dape.inner.bias(TOKENS, TOKENS), "concat-residual") + alibi.bias(TOKENS, TOKENS)
    for both in (dape + alibi, alibi + dape):
        torch.testing.assert_close(attend(both, q, k, v), softmax_attend(after, v))


def test_rope_beside_dape():
    rope, dape = RoPE(DIM), DAPE(Kerple(HEADS), HEADS).double()
    q, k, v = qkv()
    inside = DAPE(rope + dape.inner, HEADS).double()
    inside.mlp = dape.mlp
    torch.testing.assert_close(attend(rope + dape, q, k, v), attend(inside, q, k, v))


@pytest.mark.parametrize(
    "parts",
    [
        (ALiBi(HEADS), ALiBi(HEADS, slopes=[1.0, 2.0, 3.0])),
        (ALiBi(HEADS), ALiBi(HEADS, signed=True)),
        (ALiBi(HEADS, signed=True), ALiBi(HEADS), Kerple(HEADS)),
        (Kerple(HEADS), Sandwich(HEADS), RelativeTable(HEADS, 3)),
        (ALiBi(HEADS), Kerple(HEADS), FIRE(HEADS)),
        (RelativeTable2D(HEADS, (2, 3)), RelativeTable2D(HEADS, (3, 3)), ALiBi(HEADS)),
    ],
)
def test_biases_add(parts):
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    expected = sum(part.bias(TOKENS, TOKENS) for part in parts)
    torch.testing.assert_close(total.bias(TOKENS, TOKENS), expected)


def test_rope_and_alibi_keep_their_operands():
    plan = (RoPE(DIM) + ALiBi(HEADS)).lower(CONTEXT)
    assert plan.rotary is not None
    assert (ALiBi(HEADS) + RoPE(DIM)).lower(CONTEXT).rotary is not None
    assert plan.bias.slope is not None
    assert plan.bias.table is None
    assert plan.mix is None


def test_a_sum_of_slopes_is_one_slope_where_one_can_be_both():
    plain, signed = ALiBi(HEADS), ALiBi(HEADS, signed=True)
    for one in (plain, signed):
        bias = (one + one).lower(CONTEXT).bias
        assert bias.table is None
        assert bias.slope.signed == one.signed
        torch.testing.assert_close(bias.slope.slope, 2.0 * one.lower(CONTEXT).bias.slope.slope)
    assert (plain + signed).lower(CONTEXT).bias.table is not None


def test_a_profile_inside_a_dape_leaves_room_for_one_beside_it():
    total = DAPE(FIRE(HEADS), HEADS) + FIRE(HEADS)
    plan = total.lower(CONTEXT)
    assert plan.bias.profile is not None
    assert plan.mix.inner.profile is not None
    assert total.sole_operands == {"mix", "profile"}


def test_sums_are_flat_and_hold_their_parts_parameters():
    total = (ALiBi(HEADS, learnable=True) + Kerple(HEADS)) + RoPE(DIM)
    assert [type(part).__name__ for part in total.parts] == ["ALiBi", "Kerple", "RoPE"]
    assert set(total.state_dict()) == {"parts.0.slopes", "parts.1.p", "parts.1.a"}
    assert total.num_heads == HEADS
    assert (RoPE(DIM) + posattn.Bias(torch.ones(1, 3), 0)).num_heads is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RoPE(DIM) + RoPE(DIM), "at most one rotary encoding, got two"),
        (lambda: RoPE(DIM) + DAPE(RoPE(DIM), HEADS), "at most one rotary encoding, got two"),
        (lambda: FIRE(HEADS) + FIRE(HEADS), "at most one FIRE, got two"),
        (lambda: DAPE(None, HEADS) + DAPE(None, HEADS), "at most one DAPE, got two"),
        (lambda: FIRE(HEADS) + BiPE(FIRE(HEADS), DIM, 4), "at most one FIRE, got two"),
        (lambda: FIRE(HEADS).shard(0, 2) + FIRE(2), "at most one FIRE, got two"),
        (lambda: ALiBi(HEADS) + RoPE(DIM) + (Kerple(HEADS) + RoPE(DIM)), "at most one rotary encoding, got two"),
        (lambda: (Unknown(RoPE(DIM)) + RoPE(DIM)).lower(CONTEXT), "at most one rotary encoding, got two"),
        (lambda: (Unknown(FIRE(HEADS)) + FIRE(HEADS)).lower(CONTEXT), "at most one FIRE, got two"),
        (lambda: (Unknown(DAPE(None, HEADS)) + DAPE(None, HEADS)).lower(CONTEXT), "at most one DAPE, got two"),
        (lambda: ALiBi(HEADS) + Kerple(4), r"\+: expected encodings with equal num_heads, got \[3, 4\]"),
        (lambda: DAPE(Kerple(4), HEADS), "inner: expected an encoding with num_heads=3, got 4"),
        (lambda: DAPE(DAPE(None, HEADS), HEADS), "inner: expected an encoding without a DAPE"),
        (lambda: DAPE(RoPE(DIM) + DAPE(None, HEADS), HEADS), "inner: expected an encoding without a DAPE"),
        (lambda: DAPE(None, HEADS, form="sum"), "form: expected one of 'concat-residual', 'concat', 'add', got 'sum'"),
        (lambda: DAPE(None, HEADS, width=0), "width: expected a positive int, got 0"),
    ],
)
def test_bad_combinations(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DAPE(HEADS, HEADS), "inner: expected an Encoding or None, got int"),
        (lambda: DAPE(Kerple, HEADS), r"inner: expected an Encoding or None, got the class Kerple; make an instance"),
        (lambda: BiPE(RoPE, DIM, 4), r"inter: expected an Encoding, got the class RoPE; make an instance"),
        (lambda: RoPE(DIM) + ALiBi, r"\+: expected an encoding, got the class ALiBi; make an instance"),
        (lambda: ALiBi + RoPE(DIM), r"\+: expected an encoding, got the class ALiBi; make an instance"),
        (lambda: 1.0 + RoPE(DIM), "unsupported operand"),
        (lambda: ALiBi(HEADS) + 1.0, "unsupported operand"),
        (lambda: DAPE(Kerple(HEADS), HEADS).bias(2, 2), "DAPE depends on the logits and has no fixed bias"),
        (lambda: (DAPE(None, HEADS) + ALiBi(HEADS)).bias(2, 2), "depends on the logits"),
        (lambda: RoPE(DIM).bias(2, 2), r"RoPE turns q and k and is not an additive bias.*RoPE.rotate"),
        (lambda: (RoPE(DIM) + ALiBi(HEADS)).bias(2, 2), "take .bias of the additive part alone"),
        (lambda: BiPE("rope", 8, 4), "inter: expected an Encoding, got str"),
    ],
)
def test_bad_types(make, message):
    with pytest.raises(TypeError, match=message):
        make()
