"""DAPE V2: both layers convolved along the keys, by the authors' edge and by one that a cache reproduces."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import posattn
from posattn.serialize import flatten, unflatten

HEADS, TOKENS, DIM = 3, 9, 8


def qkv(tokens: int = TOKENS, batch: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, HEADS, tokens, DIM, dtype=torch.float64) for _ in range(3)]


def dape(inner: posattn.encodings.Encoding | None = None, **options: object) -> posattn.DAPE:
    torch.manual_seed(1)
    given = {"width": 5, "kernel": 3} | options
    return posattn.DAPE(inner or posattn.Kerple(HEADS), HEADS, **given).double()  # type: ignore[arg-type]


def attend(q: Tensor, k: Tensor, v: Tensor, position: posattn.DAPE, **options: object) -> Tensor:
    return posattn.attention(q, k, v, position, backend="reference", **options)  # type: ignore[call-overload, no-any-return]


def authors(position: posattn.DAPE, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Their module as it is called: a lower triangle of concatenated scores and biases through its own convolutions."""
    x = q @ k.mT * DIM**-0.5
    b = position.inner.bias(q.shape[2], k.shape[2]).expand_as(x)  # type: ignore[union-attr]
    z = torch.cat([x, b], 1).tril(k.shape[2] - q.shape[2])
    hidden = torch.ones_like(x[:1, :1], dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])
    return (x + b + position.mlp(z)).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def test_the_papers_edge_is_the_authors_module() -> None:
    position = dape(edge="paper")
    assert isinstance(position.mlp[0], torch.nn.Conv2d)
    assert position.mlp[0].weight.shape == (5, 2 * HEADS, 1, 3)
    q, k, v = qkv()
    torch.testing.assert_close(attend(q, k, v, position, causal=True), authors(position, q, k, v))


@pytest.mark.parametrize("kernel", [3, 5])
def test_the_causal_edge_is_the_authors_with_keys_to_come(kernel: int) -> None:
    """A text that goes on shows what a row is that has keys after it; more of them change nothing."""
    position = dape(kernel=kernel)
    q, k, v = qkv(TOKENS + kernel)
    expected = authors(position, q, k, v)[:, :, :TOKENS]
    q, k, v = (x[:, :, :TOKENS] for x in (q, k, v))
    torch.testing.assert_close(attend(q, k, v, position, causal=True), expected)


@pytest.mark.parametrize("kernel", [3, 5])
def test_decoding_gives_what_the_whole_does(kernel: int) -> None:
    position = dape(kernel=kernel)
    q, k, v = qkv()
    whole = attend(q, k, v, position, causal=True)
    steps = [
        attend(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], position, causal=True) for i in range(TOKENS)
    ]
    torch.testing.assert_close(torch.cat(steps, 2), whole)
    paper = dape(kernel=kernel, edge="paper")
    last = attend(q[:, :, 4:5], k[:, :, :5], v[:, :, :5], paper, causal=True)
    assert not torch.allclose(last, attend(q, k, v, paper, causal=True)[:, :, 4:5])


def test_documents_padding_and_segments_are_the_sequences_alone() -> None:
    position = dape()
    q, k, v = qkv(batch=1)
    parts = ((0, 4), (4, 9))
    alone = torch.cat([attend(*(x[:, :, a:b] for x in (q, k, v)), position, causal=True) for a, b in parts], 2)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    packed = attend(q, k, v, position, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu)
    torch.testing.assert_close(packed, alone)
    segments = torch.tensor([[0] * 4 + [1] * 5])
    torch.testing.assert_close(attend(q, k, v, position, causal=True, segments=segments), alone)
    padded = attend(q, k, v, position, causal=True, k_starts=torch.tensor([4]))
    torch.testing.assert_close(padded[:, :, 4:], alone[:, :, 4:])
    right = attend(*(x[:, :, :4] for x in (q,)), k, v, position, causal=True, k_lengths=torch.tensor([4]))
    torch.testing.assert_close(right, alone[:, :, :4])
    nan = [x.clone().index_fill_(2, torch.arange(4, 9), torch.nan) for x in (k, v)]
    torch.testing.assert_close(attend(q[:, :, :4], *nan, position, causal=True, k_lengths=torch.tensor([4])), right)


def test_a_mask_hides_logits_from_the_convolution() -> None:
    position = dape()
    q, k, v = qkv()
    mask = torch.rand(2, HEADS, TOKENS, TOKENS) < 0.7
    before = attend(q, k, v, position, mask=mask)
    # What a hidden pair's logit would be is nowhere seen.
    k[:, 0, 3] += 5.0
    after = attend(q, k, v, position, mask=mask)
    blind = ~mask[:, 0, :, 3]
    torch.testing.assert_close(before[:, 0][blind], after[:, 0][blind])
    assert not torch.allclose(before[:, 0][~blind], after[:, 0][~blind])


def test_a_kernel_of_one_is_the_first_version() -> None:
    first, wide = dape(kernel=1), dape(kernel=3)
    with torch.no_grad():
        for index in (0, 2):
            wide.mlp[index].weight.zero_()
            wide.mlp[index].weight[:, :, 0, 1] = first.mlp[index].weight
            wide.mlp[index].bias.copy_(first.mlp[index].bias)
    assert set(first.state_dict()) == set(wide.state_dict())
    q, k, v = qkv()
    torch.testing.assert_close(attend(q, k, v, wide, causal=True), attend(q, k, v, first, causal=True))


@pytest.mark.parametrize("form", ["concat-residual", "concat", "add"])
def test_gradients(form: str) -> None:
    position = dape(form=form, width=2)
    leaves = [x[:1, :, :4].clone().requires_grad_() for x in qkv()]
    weights = [p for p in position.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(
        lambda q, k, v, *_: attend(q, k, v, position, causal=True), (*leaves, *weights), atol=1e-6
    )


def test_without_an_inner_bias_and_with_rope() -> None:
    q, k, v = qkv()
    for inner in (None, posattn.RoPE(DIM)):
        position = posattn.DAPE(inner, HEADS, kernel=3).double()
        assert position.mlp[0].in_channels == HEADS
        assert attend(q, k, v, position, causal=True).isfinite().all()


def test_rows_of_weights_are_those_of_the_whole() -> None:
    position = dape()
    q, k, _ = qkv()
    rows = torch.tensor([2, 7])
    whole = posattn.weights(q, k, position, causal=True)
    torch.testing.assert_close(posattn.weights(q, k, position, causal=True, rows=rows), whole[:, :, rows])


@pytest.mark.parametrize("edge", ["causal", "paper"])
def test_it_survives_serialization(edge: str) -> None:
    from posattn.encodings.base import Context
    from posattn.plan import Call, Mask

    q, k, v = qkv()
    plan = dape(edge=edge).lower(Context.of(q, k, Mask()))
    call = Call(q, k, v, plan, Mask(causal=True), scale=1.0)
    flat = flatten(call, "reference")
    again = unflatten(q, k, v, flat.operands, flat.ints, call.scale, call.softcap, call.dropout_p, flat.spec)
    mix = (again[0] if isinstance(again, tuple) else again).plan.mix
    assert mix is not None
    assert mix.edge == edge
    assert mix.w1.shape == (5, 2 * HEADS, 3)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="kernel: expected an odd number of keys, got 2"):
        posattn.DAPE(None, HEADS, kernel=2)
    with pytest.raises(ValueError, match="edge: expected one of 'causal', 'paper', got 'zeros'"):
        posattn.DAPE(None, HEADS, kernel=3, edge="zeros")
    q, k, v = (x.float() for x in qkv())
    with pytest.raises(ValueError, match=r"convolves over 3 keys \(DAPE V2\).*backend=\"reference\""):
        posattn.attention(q, k, v, dape().float(), causal=True)
    with pytest.raises(ValueError, match="cannot run this call: its mix of heads convolves"):
        posattn.attention(q, k, v, dape().float(), causal=True, backend="cpu")


def test_plans_of_ones_own_are_checked() -> None:
    class Wrong(posattn.DAPE):
        def build(self, context: posattn.encodings.Context) -> posattn.plan.Plan:
            plan = super().build(context)
            mix = copy.copy(plan.mix)
            object.__setattr__(mix, *self.change(mix))
            return posattn.plan.Plan(mix=mix, bias=plan.bias)

    q, k, v = (x.float() for x in qkv())
    for change, message in (
        (
            lambda mix: ("edge", "none"),
            "expected mix.edge of the plan of Wrong to be one of 'causal', 'paper', got 'none'",
        ),
        (lambda mix: ("w2", mix.w2[:, :, :1]), r"expected mix.w2 of the plan of Wrong to be .*3\], got"),
        (lambda mix: ("w1", F.pad(mix.w1, (0, 1))), "expected mix.w1 of the plan of Wrong to be an odd kernel"),
    ):
        position = Wrong(posattn.Kerple(HEADS), HEADS, kernel=3)
        position.change = change
        with pytest.raises(ValueError, match=message):
            posattn.attention(q, k, v, position, causal=True, backend="reference")
