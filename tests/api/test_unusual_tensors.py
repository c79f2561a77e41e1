"""Tensors whose memory is not what they say: default devices, negated and conjugated views, zeros without memory,
subclasses, nested tensors, symbols of a trace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import posattn
from posattn.parity import examples

sdpa = posattn.scaled_dot_product_attention


def tensors(*shape: int, grad: bool = False) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(*shape, requires_grad=grad) for _ in range(3)]


@pytest.mark.parametrize("device", ["meta", "cuda"])
@pytest.mark.parametrize("name", ["none", *posattn.parity.examples(2, 8, 9)])
def test_the_default_device_is_for_the_callers_tensors(name: str, device: str) -> None:
    q, k, v = tensors(1, 2, 9, 8, grad=True)
    position = posattn.parity.examples(2, 8, 9).get(name)
    at = torch.arange(9)
    positions = {"q_positions": at, "k_positions": at} if position is not None and position.needs_positions else {}

    def run() -> tuple[Tensor, ...]:
        torch.manual_seed(2)
        out = posattn.attention(q, k, v, position, causal=True, dropout_p=0.25, **positions)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    expected = run()
    torch.set_default_device(device)
    try:
        got = run()
    finally:
        torch.set_default_device(None)  # no mode at all: one for the CPU would break graphs of later tests
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.device.type == "cpu"
        assert torch.equal(ours, theirs)


def test_a_negated_view_as_bias() -> None:
    q, k, v = tensors(1, 1, 20, 8)
    bias = torch.randn(1, 1, 20, 20, dtype=torch.complex64).conj().imag
    assert bias.is_neg()
    torch.testing.assert_close(
        posattn.attention(q, k, v, bias=bias), posattn.attention(q, k, v, bias=bias.clone()), rtol=0, atol=0
    )


@pytest.mark.parametrize("which", range(3))
def test_negated_views_as_inputs(which: int) -> None:
    given = tensors(1, 1, 20, 8)
    plain = [-x if i == which else x for i, x in enumerate(given)]
    given[which] = torch._neg_view(given[which])
    assert torch.equal(posattn.attention(*given), posattn.attention(*plain))


@pytest.mark.parametrize("return_lse", [False, True])
def test_negated_views_as_gradients(return_lse: bool) -> None:
    given = tensors(1, 1, 20, 8, grad=True)
    results = posattn.attention(*given, return_lse=return_lse)
    result = results[1] if return_lse else results
    weight = torch.randn_like(result)
    got = torch.autograd.grad(result, given, torch._neg_view(weight), retain_graph=True, allow_unused=True)
    expected = torch.autograd.grad(result, given, -weight, allow_unused=True)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_zeros_without_memory() -> None:
    given = tensors(1, 1, 20, 8)
    given[1] = torch._efficientzerotensor((1, 1, 20, 8))
    torch.testing.assert_close(posattn.attention(*given), given[2].mean(2, keepdim=True).expand(-1, -1, 20, -1))
    leaves = tensors(1, 1, 20, 8, grad=True)
    out = posattn.attention(*leaves)
    grads = torch.autograd.grad(out, leaves, torch._efficientzerotensor(out.shape))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.parametrize("mask", [causal_upper_left, causal_lower_right])
@pytest.mark.parametrize(("q_len", "k_len"), [(3, 3), (3, 7), (6, 4)])
def test_causal_bias_means_its_mask(mask, q_len: int, k_len: int) -> None:
    q, (k, v, _) = tensors(2, 2, q_len, 8)[0], tensors(2, 2, k_len, 8)
    got = sdpa(q, k, v, mask(q_len, k_len))
    assert type(got) is Tensor
    # Rows that see no key are zeros here, and NaN where torch adds its mask.
    expected = F.scaled_dot_product_attention(q, k, v, mask(q_len, k_len)._materialize()).nan_to_num()
    torch.testing.assert_close(got, expected)


def test_subclasses_keep_their_class() -> None:
    class Named(Tensor):
        pass

    q, k, v = tensors(1, 1, 5, 8)
    got = posattn.attention(q.as_subclass(Named), k, v)
    assert type(got) is Named
    assert torch.equal(got.as_subclass(Tensor), posattn.attention(q, k, v))


def test_a_class_of_ones_own_takes_the_call_over() -> None:
    class Mine:
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return function.__name__, kwargs

    assert posattn.attention(Mine(), Mine(), Mine(), causal=True) == ("attention", {"causal": True})
    assert sdpa(Mine(), Mine(), Mine())[0] == "scaled_dot_product_attention"


class Model(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, is_causal=True) + posattn.attention(q, k, v, causal=True)


def test_symbolic_trace() -> None:
    traced = torch.fx.symbolic_trace(Model())
    given = tensors(1, 1, 5, 8)
    assert torch.equal(traced(*given), Model()(*given))
    assert {"attention", "scaled_dot_product_attention"} <= {
        getattr(n.target, "__name__", "") for n in traced.graph.nodes
    }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("k_lengths", [(5, 1, 9), (7, 12, 2)], ids=["as queries", "other keys"])
def test_nested_tensors_are_documents(causal: bool, kv_heads: int, k_lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)

    def nested(heads: int, dim: int, lengths: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
        parts = [torch.randn(n, heads, dim, requires_grad=True) for n in lengths]
        return torch.nested.as_nested_tensor(parts, layout=torch.jagged).transpose(1, 2), parts

    q, q_parts = nested(4, 8, (5, 1, 9))
    (k, k_parts), (v, v_parts) = nested(kv_heads, 8, k_lengths), nested(kv_heads, 6, k_lengths)
    position = posattn.ALiBi(4) + posattn.Kerple(4)
    out = sdpa(q, k, v, is_causal=causal, enable_gqa=kv_heads == 1, position=position)
    assert out.is_nested
    expected = [
        sdpa(*(part.transpose(0, 1) for part in parts), is_causal=causal, enable_gqa=True, position=position)
        for parts in zip(q_parts, k_parts, v_parts, strict=True)
    ]
    for ours, theirs in zip(out.unbind(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    leaves = [*q_parts, *k_parts, *v_parts]
    ours = torch.autograd.grad(out.values().square().sum(), leaves)
    theirs = torch.autograd.grad(sum(part.square().sum() for part in expected), leaves)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want)


def test_what_nested_tensors_cannot_have() -> None:
    q = torch.nested.as_nested_tensor([torch.randn(3, 2, 8), torch.randn(4, 2, 8)], layout=torch.jagged).transpose(1, 2)
    other = torch.nested.as_nested_tensor([torch.randn(3, 2, 8)], layout=torch.jagged).transpose(1, 2)
    with pytest.raises(TypeError, match="key: expected a nested tensor"):
        sdpa(q, torch.randn(2, 2, 4, 8), q)
    with pytest.raises(ValueError, match="attn_mask: expected None"):
        sdpa(q, q, q, torch.ones(4, 4).bool())
    with pytest.raises(ValueError, match="as many documents"):
        sdpa(q, other, other)
    cut = torch.nested.as_nested_tensor([torch.randn(4, 2, 8), torch.randn(3, 2, 8)], layout=torch.jagged)
    with pytest.raises(ValueError, match="the same lengths of both"):
        sdpa(q, q, cut.transpose(1, 2))
    with pytest.raises(TypeError, match="q: expected a dense tensor"):
        posattn.attention(q, q, q)


@pytest.mark.parametrize("name", ["none", "Kerple", "DAPE-Kerple"])
@pytest.mark.parametrize(("q_len", "dim_v"), [(1, 16), (7, 16), (7, 5)])
def test_results_lie_as_the_queries_do(name: str, q_len: int, dim_v: int) -> None:
    """The layer that merges heads gets a view, as from torch's own function; so do compiled graphs."""
    position = None if name == "none" else examples(4, 16, 9)[name]
    q, k, v = (torch.randn(2, n, 4, d).transpose(1, 2) for n, d in ((q_len, 16), (9, 16), (9, dim_v)))
    out = posattn.attention(q, k, v, position, causal=True)
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(out, posattn.attention(q.contiguous(), k, v, position, causal=True))
    assert posattn.attention(q.contiguous(), k, v, position, causal=True).is_contiguous()
    compiled = torch.compile(lambda q: posattn.attention(q, k, v, position, causal=True), backend="aot_eager")
    assert torch.equal(compiled(q), out)
    assert compiled(q).stride() == out.stride()
