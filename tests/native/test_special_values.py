"""Logits far from zero on every instruction set: nothing overflows, cancels or loses what float32 holds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import posattn
from tests.tolerance import assert_parity

HIGHEST = torch.finfo(torch.float32).max

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 0.3, -0.3])
def test_a_query_of_1e20_attends_to_one_key(isa: str, dtype: torch.dtype, scale: float) -> None:
    q = torch.full((1, 1, 1, 1), 1e20, dtype=dtype)
    k = torch.tensor([1.0, 0.5, -1.0], dtype=dtype).view(1, 1, 3, 1)
    v = torch.tensor([0.25, 2.0, -3.0], dtype=dtype).view(1, 1, 3, 1).requires_grad_()
    out, lse = posattn.attention(q, k, v, scale=scale, backend="cpu", return_lse=True)
    best = 0 if scale > 0.0 else 2
    assert out.item() == v[0, 0, best].item()
    assert lse.item() == pytest.approx(abs(scale) * q.item(), rel=1e-6)
    out.sum().backward()
    assert v.grad is not None
    assert v.grad.flatten().tolist() == [float(n == best) for n in range(3)]


def _grads(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, grad_out: Tensor, backend: str) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v, bias)]
    out = posattn.attention(*leaves[:3], bias=leaves[3], causal=True, backend=backend)
    return [out, *torch.autograd.grad(out, leaves, grad_out)]


@pytest.mark.parametrize("keys", [40, 1100])  # the latter decodes
@pytest.mark.parametrize("value", [-HIGHEST, -1e12, -1e9, 1e12, HIGHEST])
def test_rows_wholly_at_one_far_value_are_uniform(isa: str, value: float, keys: int) -> None:
    q, k, v = (torch.randn(1, 2, tokens, 16) for tokens in (7, keys, keys))
    # In float32 such a bias swallows the logit whole, in naive PyTorch too.
    bias = torch.zeros(2, 7, keys)
    bias[:, ::2] = value
    grad_out = torch.randn(1, 2, 7, 16)
    got = _grads(q, k, v, bias, grad_out, "cpu")
    expected = _grads(q, k, v, bias, grad_out, "reference")
    for name, a, b in zip(("out", "dq", "dk", "dv", "dbias"), got, expected):
        assert (a - b).abs().max() < 1e-5 * max(1.0, b.abs().max().item()), name


@pytest.mark.parametrize("keys", [40, 1100])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_large_logits_keep_the_rule(isa: str, dtype: torch.dtype, scale: float, keys: int) -> None:
    q, k, v = (torch.randn(1, 2, tokens, 16).to(dtype) for tokens in (7, keys, keys))
    for size in (8.0, 20.0):
        assert_parity(q * size, k * size, v, None, {"scale": scale}, "cpu")
    assert_parity(q * 20.0, k * 20.0, v, posattn.RoPE(16) + posattn.ALiBi(2), {"scale": scale, "causal": True}, "cpu")


def test_a_far_sink_takes_all_weight(isa: str) -> None:
    q, k, v = (torch.randn(1, 2, 5, 16) for _ in range(3))
    sinks = torch.tensor([1e30, -1e30])
    out, lse = posattn.attention(q, k, v, sinks=sinks, backend="cpu", return_lse=True)
    plain = posattn.attention(q, k, v, backend="cpu")
    assert not out[:, 0].any()
    assert torch.equal(out[:, 1], plain[:, 1])
    assert (lse[:, 0] == sinks[0]).all()
    assert math.isfinite(lse[:, 1].max().item())
