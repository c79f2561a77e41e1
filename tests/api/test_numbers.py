"""Scale, softcap and dropout_p: learned scales, one compiled graph for all values, the ends of their ranges; and what
flop counters see."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import posattn

sdpa = posattn.scaled_dot_product_attention
POSITIONS = {
    "none": lambda: None,
    "RoPE": lambda: posattn.RoPE(8),
    "ALiBi": lambda: posattn.ALiBi(2),
    "DAPE": lambda: posattn.DAPE(posattn.Kerple(2), 2, width=8),
}


def tensors(*shape: int, grad: bool = False) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(*shape, requires_grad=grad) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"causal": True, "dropout_p": 0.3}], ids=str)
@pytest.mark.parametrize("name", POSITIONS)
def test_a_learned_scale_has_its_gradient(name: str, options: dict[str, object], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    position = POSITIONS[name]()
    given = [x.to(dtype) for x in tensors(2, 2, 11, 8)]

    def run(dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
        torch.manual_seed(4)
        module = None if position is None else position.to(torch.float64 if dtype == torch.float64 else torch.float32)
        scale = torch.tensor([0.7], requires_grad=True)
        out = posattn.attention(*(x.to(dtype) for x in given), module, scale=scale, backend=backend, **options)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        return out, torch.autograd.grad((out * weight).sum(), scale)[0]

    out, grad = run(dtype, "auto")
    expected, exact = run(torch.float64, "reference")
    _, naive = run(dtype, "reference")
    assert grad.shape == (1,)
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.02)
    bound = 2 * (naive - exact).abs() + 8 * torch.finfo(dtype).eps * exact.abs() + 1e-6
    assert (grad - exact).abs() <= bound, (grad, exact, naive)


def test_a_scale_that_cannot_be_learned() -> None:
    given = tensors(1, 1, 4, 8)
    with pytest.raises(ValueError, match="scale: expected a number other than 0"):
        sdpa(*given, scale=torch.zeros((), requires_grad=True))
    with pytest.raises(TypeError, match=r"scale: expected one number .*\[2\]"):
        sdpa(*given, scale=torch.ones(2))
    with pytest.raises(TypeError, match="softcap: expected a number, got a tensor that requires grad"):
        posattn.attention(*given, softcap=torch.ones((), requires_grad=True))


def test_torchs_own_values() -> None:
    q, k, v = tensors(2, 2, 5, 8, grad=True)
    torch.testing.assert_close(sdpa(q, k, v, scale=True), F.scaled_dot_product_attention(q, k, v, scale=True))
    out = sdpa(q, k, v, dropout_p=1.0)
    assert torch.equal(out, torch.zeros_like(out))
    assert all(torch.equal(grad, torch.zeros_like(q)) for grad in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("shape", [(5, 7), (2, 1, 5, 7)])
def test_a_mask_and_causal_hold_together(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, (k, v, _) = tensors(2, 2, 5, 8)[0], tensors(2, 2, 7, 8)
    mask = torch.rand(shape) < 0.8 if dtype == torch.bool else torch.randn(shape)
    whole = torch.zeros(shape).masked_fill(~mask, -math.inf) if dtype == torch.bool else mask
    whole = whole.masked_fill(torch.ones(5, 7).triu(1).bool(), -math.inf)
    expected = F.scaled_dot_product_attention(q, k, v, whole).nan_to_num()
    torch.testing.assert_close(sdpa(q, k, v, mask, is_causal=True), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("causal", [False, True])
def test_no_head_dimension(causal: bool, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype).requires_grad_() for x in tensors(2, 2, 5, 4))
    empty = [x[..., :0] for x in (q, k)]
    out, expected = (f(*empty, v, is_causal=causal) for f in (sdpa, F.scaled_dot_product_attention))
    torch.testing.assert_close(out, expected)
    (grad,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), v)[0])
    nothing = sdpa(q, k, v[..., :0], is_causal=causal)
    assert nothing.shape == (2, 2, 5, 0)
    grads = torch.autograd.grad(nothing.sum(), (q, k))
    assert all(torch.equal(grad, torch.zeros_like(q)) for grad in grads)


def test_a_softcap_that_float32_cannot_hold() -> None:
    with pytest.raises(ValueError, match="softcap: expected a finite number of at least"):
        posattn.attention(*tensors(1, 1, 4, 8), softcap=1e-60)


def test_sinks_that_are_no_numbers() -> None:
    given = tensors(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"sinks: expected numbers .*, got NaN"):
        posattn.attention(*given, sinks=torch.tensor([0.0, math.nan]))
    torch.testing.assert_close(posattn.attention(*given, sinks=torch.full((2,), -math.inf)), posattn.attention(*given))


def test_errors_are_torchs_kind_too() -> None:
    with pytest.raises(RuntimeError, match="key: expected head_dim 8"):
        sdpa(torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 7), torch.zeros(1, 1, 3, 8))
    with pytest.raises(RuntimeError, match="key: expected dtype"):
        sdpa(torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 8).half(), torch.zeros(1, 1, 3, 8))


@pytest.mark.parametrize("name", POSITIONS)
def test_flops_are_counted(name: str) -> None:
    batch, heads, q_len, k_len, dim, value_dim = 2, 2, 6, 10, 8, 4
    q = torch.randn(batch, heads, q_len, dim, requires_grad=True)
    k = torch.randn(batch, heads, k_len, dim)
    v = torch.randn(batch, heads, k_len, value_dim)
    pairs = batch * heads * q_len * k_len
    mlp = 2 * pairs * 8 * 3 if name == "DAPE" else 0  # 2 H inputs and H outputs by 8 hidden units, a head's share
    with FlopCounterMode(display=False) as counter:
        out = posattn.attention(q, k, v, POSITIONS[name]())
    assert counter.get_total_flops() == 2 * pairs * (dim + value_dim) + mlp
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    # The logits and the weights' gradient once more, and the gradients of q, k and v.
    assert counter.get_total_flops() == 2 * pairs * (3 * dim + 2 * value_dim) + 3 * mlp
