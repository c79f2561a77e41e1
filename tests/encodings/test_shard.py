"""Tensor-parallel slices: the shards of an encoding, put together, are the whole, in value and in gradient."""

from __future__ import annotations

import copy

import pytest
import torch

import posattn
import posattn.encodings as encodings
from posattn.encodings import DAPE, FIRE, ALiBi, Kerple, RelativeTable2D, RoPE, Sandwich, T5Bias

HEADS, DIM, TOKENS = 6, 12, 10
EVERY = {
    name: encoding
    for kind in encodings.__all__
    for name, encoding in getattr(encodings, kind).examples(HEADS, DIM, TOKENS).items()
}
EVERY["a sum"] = RoPE(DIM) + ALiBi(HEADS) + T5Bias(HEADS) + FIRE(HEADS, initial_length=4.0)
EVERY["a sum with a dense bias"] = RelativeTable2D(HEADS, (2, 5)) + ALiBi(HEADS, learnable=True)


def attend(encoding, q, heads=slice(None)):
    q = q[:, heads]
    places = torch.arange(TOKENS) // 2
    return posattn.attention(q, q, q, encoding, causal=True, q_positions=places, k_positions=places)


def gradients(encoding):
    return {name: p.grad for name, p in encoding.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("counts", [(3, 3), (1, 2, 3), (6,)])
@pytest.mark.parametrize("name", EVERY)
def test_shards_are_the_whole(name, counts):
    encoding = copy.deepcopy(EVERY[name])
    if any(isinstance(m, DAPE) for m in encoding.modules()):
        with pytest.raises(ValueError, match=r"expected an encoding whose heads stand alone, .* got one with a DAPE"):
            attend(encoding.shard(0, 3), torch.randn(1, 3, TOKENS, DIM))
        return
    q = torch.randn(2, HEADS, TOKENS, DIM, dtype=torch.float64)
    weight = torch.randn_like(q)
    whole, encoding = encoding.double(), copy.deepcopy(encoding).double()
    expected = attend(whole, q)
    if expected.requires_grad:
        (expected * weight).sum().backward()
    outs, first = [], 0
    for count in counts:
        shard = encoding.shard(first, count)
        assert shard.num_heads in (None, count)
        outs.append(attend(shard, q, slice(first, first + count)))
        if outs[-1].requires_grad:
            (outs[-1] * weight[:, first : first + count]).sum().backward()
        first += count
    torch.testing.assert_close(torch.cat(outs, dim=1), expected)
    found, wanted = gradients(encoding), gradients(whole)
    assert found.keys() == wanted.keys()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[key], msg=lambda m, k=key: f"{k}: {m}")


def test_a_shard_of_sandwich_knows_its_heads():
    shard = Sandwich(8).shard(4, 2)
    torch.testing.assert_close(shard.bias(3, 5), Sandwich(8).bias(3, 5)[4:6])
    assert not torch.allclose(shard.bias(3, 5), Sandwich(2).bias(3, 5))


def test_slopes_of_each_sequence_and_operands_that_heads_share():
    slopes, table, dense = torch.rand(2, HEADS), torch.rand(1, 2 * TOKENS - 1), torch.rand(1, 1, TOKENS, TOKENS)

    class Shared(encodings.Encoding):
        num_heads = HEADS

        def build(self, context):
            plan = posattn.plan
            bias = plan.Bias(plan.Slope(slopes), plan.Table(table, 1 - TOKENS), None, plan.Dense(dense))
            return plan.Plan(bias=bias)

    context = encodings.Context(TOKENS, TOKENS, 2, DIM, torch.device("cpu"), torch.float32, batch=2)
    bias = Shared().shard(3, 2).lower(context).bias
    assert torch.equal(bias.slope.slope, slopes[:, 3:5])
    assert torch.equal(bias.table.values, table)
    assert torch.equal(bias.dense.bias, dense)


def test_shards_of_shards_and_in_sums():
    whole = Kerple(8)
    torch.testing.assert_close(whole.shard(2, 4).shard(1, 2).bias(3, 3), whole.bias(3, 3)[3:5])
    both = whole.shard(2, 4) + ALiBi(8).shard(2, 4) + RoPE(DIM)
    assert both.num_heads == 4
    assert set(both.state_dict()) == {"parts.0.whole.p", "parts.0.whole.a"}


def test_an_encoding_of_any_number_of_heads_is_its_own_shard():
    rope = RoPE(DIM)
    assert rope.shard(5, 2) is rope


def test_shards_compile_whole():
    torch._dynamo.reset()
    shard, q = Kerple(HEADS).shard(2, 2), torch.randn(1, 2, TOKENS, DIM)

    def run(q):
        return posattn.attention(q, q, q, shard, causal=True)

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(q), run(q))


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (5, 2), (6, 1), (0, 7)])
def test_heads_outside_the_whole(first, count):
    with pytest.raises(
        ValueError, match=rf"first, count: expected heads within the 6 of Kerple, got {first} and {count}"
    ):
        Kerple(HEADS).shard(first, count)


def test_bad_arguments():
    with pytest.raises(ValueError, match="count: expected a positive int, got 0"):
        Kerple(HEADS).shard(0, 0)
    with pytest.raises(TypeError, match="first: expected an int, got float"):
        Kerple(HEADS).shard(0.0, 1)
    with pytest.raises(ValueError, match="position: Shard was made for num_heads=2, got queries with 3 heads"):
        attend(Kerple(HEADS).shard(0, 2), torch.randn(1, 3, TOKENS, DIM))
    with pytest.raises(ValueError, match="whole: expected an encoding made for a number of heads, got RoPE"):
        encodings.base.Shard(RoPE(DIM), 0, 1)
