"""CoPE: the paper's formulas, written out a pair at a time, and what holds of positions that gates count."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import posattn
from posattn.distributed import blocks
from posattn.encodings.base import Context
from posattn.plan import Bias, Call, Gated, Mask, Plan
from posattn.serialize import flatten, unflatten

HEADS, TOKENS, DIM, COUNT = 3, 9, 8, 4


def qkv(tokens: int = TOKENS, batch: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, HEADS, tokens, DIM, dtype=dtype) for _ in range(3)]


def cope(**options: Any) -> posattn.CoPE:
    torch.manual_seed(1)
    return posattn.CoPE(HEADS, DIM, COUNT, std=1.0, **options).double()


def attend(q: Tensor, k: Tensor, v: Tensor, position: posattn.encodings.Encoding, **options: Any) -> Tensor:
    out: Tensor = posattn.attention(q, k, v, position, backend="reference", **{"causal": True, **options})
    return out


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, position: posattn.CoPE, seen: Tensor, bias: Tensor | None = None
) -> Tensor:
    """One number at a time, in Python's own: gates from the last visible key back to the first."""
    out = torch.zeros_like(q)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        e = position.weight.detach() if position.shared else position.weight[h].detach()
        logits, counted = {}, 0.0
        for j in reversed(range(k.shape[2])):
            if not seen[i, j]:
                continue
            logit = float(q[b, h, i] @ k[b, h, j]) / math.sqrt(DIM)
            counted += 1.0 / (1.0 + math.exp(-logit))
            place = min(counted, COUNT - 1.0)
            low, high = math.floor(place), math.ceil(place)
            added = (1.0 - (place - low)) * float(q[b, h, i] @ e[low]) + (place - low) * float(q[b, h, i] @ e[high])
            logits[j] = logit + added / (math.sqrt(DIM) if position.scaled else 1.0)
            logits[j] += 0.0 if bias is None else float(bias[i, j])
        if logits:
            weights = torch.tensor(list(logits.values()), dtype=q.dtype).softmax(0)
            out[b, h, i] = weights @ v[b, h, list(logits)]
    return out


@pytest.mark.parametrize("options", [{}, {"scaled": True}, {"shared": False}], ids=str)
def test_it_is_the_papers_formula(options: dict[str, bool]) -> None:
    position = cope(**options)
    q, k, v = qkv()
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    torch.testing.assert_close(attend(q, k, v, position), by_hand(q, k, v, position, seen.tril()))
    torch.testing.assert_close(attend(q, k, v, position, causal=False), by_hand(q, k, v, position, seen))
    window = seen.tril() & seen.triu(-3)
    torch.testing.assert_close(attend(q, k, v, position, window=(3, 0)), by_hand(q, k, v, position, window))
    holes = seen.tril() & (torch.rand(TOKENS, TOKENS) < 0.6)
    torch.testing.assert_close(attend(q, k, v, position, mask=holes), by_hand(q, k, v, position, holes))
    hidden = torch.zeros(TOKENS, TOKENS, dtype=torch.float64).masked_fill(~holes, -torch.inf)
    torch.testing.assert_close(attend(q, k, v, position, bias=hidden), by_hand(q, k, v, position, holes))


def test_a_bias_beside_it_comes_after_the_gates() -> None:
    position = cope()
    q, k, v = qkv(batch=1)
    bias = torch.randn(TOKENS, TOKENS, dtype=torch.float64)
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    torch.testing.assert_close(attend(q, k, v, position, bias=bias), by_hand(q, k, v, position, seen, bias))
    with_alibi = attend(q, k, v, position + posattn.ALiBi(HEADS).double())
    dense = posattn.ALiBi(HEADS).double().bias(TOKENS, TOKENS)
    torch.testing.assert_close(with_alibi, attend(q, k, v, position, bias=dense))


def test_a_rotation_turns_the_logits_alone() -> None:
    position, rope = cope(), posattn.RoPE(DIM)
    q, k, v = qkv()
    turned_q, turned_k = rope.rotate(q), rope.rotate(k)
    x = turned_q @ turned_k.mT / math.sqrt(DIM)
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    places = x.sigmoid().masked_fill(hidden, 0.0).flip(-1).cumsum(-1).flip(-1).clamp(max=COUNT - 1.0)
    hats = (1.0 - (places[..., None] - torch.arange(COUNT)).abs()).clamp(min=0.0)  # linear interpolation, as a basis
    added = torch.einsum("bhijl,ld,bhid->bhij", hats, position.weight, q)
    expected = (x + added).masked_fill(hidden, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(attend(q, k, v, rope + position), expected)


def test_it_starts_as_no_position_at_all() -> None:
    q, k, v = qkv()
    position = posattn.CoPE(HEADS, DIM, COUNT).double()
    assert not position.weight.any()
    torch.testing.assert_close(attend(q, k, v, position), posattn.attention(q, k, v, causal=True, backend="reference"))


@pytest.mark.parametrize("options", [{}, {"window": (3, 0)}, {"softcap": 2.0}], ids=str)
def test_decoding_gives_what_the_whole_does(options: dict[str, Any]) -> None:
    position = cope()
    q, k, v = qkv()
    whole = attend(q, k, v, position, **options)
    steps = [attend(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], position, **options) for i in range(TOKENS)]
    torch.testing.assert_close(torch.cat(steps, 2), whole)
    padded = [x.clone().index_fill_(2, torch.arange(6, TOKENS), torch.nan) for x in (k, v)]  # a static cache
    lengths = torch.tensor([6, 6])
    torch.testing.assert_close(attend(q[:, :, 5:6], *padded, position, k_lengths=lengths, **options), whole[:, :, 5:6])


def test_documents_padding_and_segments_are_the_sequences_alone() -> None:
    position = cope()
    q, k, v = qkv(batch=1)
    parts = ((0, 4), (4, 9))
    alone = torch.cat([attend(*(x[:, :, a:b] for x in (q, k, v)), position) for a, b in parts], 2)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    torch.testing.assert_close(attend(q, k, v, position, cu_seqlens_q=cu, cu_seqlens_k=cu), alone)
    torch.testing.assert_close(attend(q, k, v, position, segments=torch.tensor([[0] * 4 + [1] * 5])), alone)
    padded = attend(q, k, v, position, k_starts=torch.tensor([4]))
    torch.testing.assert_close(padded[:, :, 4:], alone[:, :, 4:])
    assert not padded[:, :, :4].any()


def test_grouped_heads_share_keys_and_not_gates() -> None:
    position = cope(shared=False)
    q, k, v = qkv()
    few_k, few_v = k[:, :1], v[:, :1]
    expected = attend(q, few_k.expand_as(k), few_v.expand_as(v), position)
    torch.testing.assert_close(attend(q, few_k, few_v, position), expected)


@pytest.mark.parametrize("options", [{}, {"scaled": True, "shared": False}], ids=str)
def test_gradients(options: dict[str, bool]) -> None:
    position = cope(**options)
    leaves = [x[:1, :, :5].clone().requires_grad_() for x in qkv()]
    assert torch.autograd.gradcheck(
        lambda q, k, v, _: attend(q, k, v, position, softcap=3.0), (*leaves, position.weight), atol=1e-6
    )


def test_a_learned_scale_reaches_the_scaled_form() -> None:
    position = cope(scaled=True)
    q, k, v = qkv()
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(attend(q, k, v, position, scale=scale), attend(q, k, v, position, scale=0.3))
    assert torch.autograd.gradcheck(lambda s: attend(q, k, v, position, scale=s), (scale,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_positions_keep_their_fractions(dtype: torch.dtype) -> None:
    """600 gates of a half are 300, and one key farther is 300.5: in bfloat16 both would be 300."""
    q = torch.zeros(1, 1, 1, 2, dtype=dtype)
    k = torch.zeros(1, 1, 602, 2, dtype=dtype)
    q[..., 1] = 1.0  # which k does not see: all logits are 0
    position = posattn.CoPE(1, 2, 400)
    with torch.no_grad():
        position.weight[301:, 1] = 8.0  # at 300 no key stands out; at 301 it does
    found = posattn.weights(q, k, position)[0, 0, 0]
    expected = torch.zeros(602)
    expected[:3] = torch.tensor([8.0, 4.0, 0.0])  # positions 301, 300.5, 300
    torch.testing.assert_close(found, expected.softmax(0))
    out = posattn.attention(q, k, torch.eye(602, dtype=dtype)[None, None], position, backend="reference")
    torch.testing.assert_close(out[0, 0, 0].float(), expected.softmax(0), rtol=0.02, atol=1e-4)


def test_rows_and_heads_of_weights_are_those_of_the_whole() -> None:
    position = cope(shared=False)
    q, k, _ = qkv()
    whole = posattn.weights(q, k, position, causal=True)
    torch.testing.assert_close(whole.sum(-1), torch.ones_like(whole[..., 0]))
    some = posattn.weights(q, k, position, causal=True, rows=[2, 7], heads=[2, 0])
    torch.testing.assert_close(some, whole[:, [2, 0]][:, :, [2, 7]])


@pytest.mark.parametrize("scaled", [False, True])
def test_it_survives_serialization(scaled: bool) -> None:
    q, k, v = qkv()
    plan = cope(scaled=scaled).lower(Context.of(q, k, Mask()))
    call = Call(q, k, v, plan, Mask(causal=True), scale=1.0)
    flat = flatten(call, "cpu")
    back = unflatten(q, k, v, flat.operands, flat.ints, 1.0, 0.0, 0.0, flat.spec).plan.gated
    assert plan.gated is not None
    assert back == Gated(plan.gated.weight, scaled)


def test_fused_backends_refuse_it_with_the_reason() -> None:
    position = cope().float()
    q, k, v = qkv(dtype=torch.float32)
    for backend in ("auto", "cpu"):
        with pytest.raises(ValueError, match=r"sums of gates over the keys after each \(CoPE\)"):
            posattn.attention(q, k, v, position, causal=True, backend=backend)


@pytest.mark.parametrize("name", ["CoPE", "CoPE per head"])
def test_check_finds_it_as_it_should_be(name: str) -> None:
    position = posattn.parity.examples(HEADS, 16, 20, every=True)[name]
    assert name not in posattn.parity.examples(HEADS, 16, 20)
    report = posattn.check(position, head_dim=16, tokens=20)
    assert report, str(report)
    assert 'none computes it; backend="reference" does' in str(report)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match="CoPE was made for head_dim=6, got 8"):
        attend(q, k, v, posattn.CoPE(HEADS, 6, COUNT))
    with pytest.raises(ValueError, match=r"\+: expected at most one CoPE, got two"):
        cope() + cope()
    with pytest.raises(ValueError, match=r"expected gated of the plan of DAPE to be None beside a mix of heads"):
        attend(q, k, v, posattn.DAPE(cope(), HEADS).double())
    with pytest.raises(ValueError, match=r"k_rotated: expected no CoPE beside a rotation"):
        attend(q, k, v, posattn.RoPE(DIM) + cope(), k_rotated=True)
    with pytest.raises(ValueError, match=r"position: expected no CoPE, got one, whose positions count"):
        blocks.probe(cope(), HEADS, DIM, q.device)

    class Wrong(posattn.encodings.Encoding):
        def build(self, context: Context) -> Plan:
            return Plan(bias=Bias(), gated=Gated(torch.zeros(HEADS - 1, COUNT, DIM, dtype=torch.float64)))

    with pytest.raises(ValueError, match=r"gated.weight of the plan of Wrong to be of shape \[3, positions, 8\]"):
        attend(q, k, v, Wrong())
