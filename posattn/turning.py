"""What is done to q and k in front of a kernel, in O(N D): rotations that learn or differ between heads, amplitudes.

A kernel's own turn has one table for all heads and gives it no gradient. Here every backend has both at once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from posattn.plan import Call, Rotary


def in_front(rotary: Rotary) -> bool:
    """Whether kernels cannot turn by these tables."""
    tables = (rotary.q_cos, rotary.q_sin, rotary.k_cos, rotary.k_sin)
    return any(x.dim() == 4 or (x.requires_grad and torch.is_grad_enabled()) for x in tables)


def turned(call: Call) -> Call:
    """The call with q and k turned where kernels cannot, by differentiable operations; else the call as it is."""
    rotary = call.plan.rotary
    if rotary is None or not in_front(rotary):
        return call
    q = turn(call.q, rotary.q_cos, rotary.q_sin, rotary.interleaved)
    k = turn(_defined(call), rotary.k_cos, rotary.k_sin, rotary.interleaved)
    return replace(call, q=q, k=k, plan=replace(call.plan, rotary=None))


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [B, H, T, D] with its pairs turned, in float32 at least, rounded once to its dtype; cos and sin are [B or 1, T,
    rotary_dim / 2], or with a dimension of heads before T."""
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    turned: Tensor = _Turn.apply(x, cos, sin, interleaved)  # type: ignore[no-untyped-call]
    return turned


def scaled(call: Call) -> Call:
    """The call without an amplitude: the tables of a rotation of the whole head take it, at no cost, else q does."""
    rotary, amplitude, q = call.plan.rotary, call.plan.amplitude, call.q
    if amplitude is None:
        return call
    if rotary is None or 2 * rotary.q_cos.shape[-1] < q.shape[3]:
        return replace(call, q=(q * amplitude[..., None]).to(q.dtype), plan=replace(call.plan, amplitude=None))
    cos, sin = rotary.q_cos, rotary.q_sin
    if cos.dim() == 4:
        amplitude = amplitude[..., None]
    elif amplitude.shape[1] == 1:
        amplitude = amplitude[:, 0, :, None]
    else:
        cos, sin, amplitude = cos[:, None], sin[:, None], amplitude[..., None]
    # The keys' tables have as many dimensions as they had: those of 4 turn in front whatever these have.
    rotary = replace(rotary, q_cos=cos * amplitude, q_sin=sin * amplitude)
    return replace(call, plan=replace(call.plan, rotary=rotary, amplitude=None))


def _defined(call: Call) -> Tensor:
    """k, with zeros for the keys that its bounds hide: these may hold anything, and the gradient of a table that
    sequences share is a sum over them, of zero times that."""
    k, mask = call.k, call.mask
    if mask.k_lengths is None and mask.k_starts is None:
        return k
    index = torch.arange(k.shape[2], device=k.device)
    hidden = torch.zeros(1, 1, dtype=torch.bool, device=k.device)
    if mask.k_lengths is not None:
        hidden = hidden | (index >= mask.k_lengths[:, None])
    if mask.k_starts is not None:
        hidden = hidden | (index < mask.k_starts[:, None])
    return k.masked_fill(hidden[:, None, :, None], 0.0)


class _Turn(torch.autograd.Function):
    """Keeps x and the tables alone for the backward pass; autograd would keep wide copies of x's halves too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        return _turn(x, cos, sin, interleaved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, cos, sin, ctx.interleaved = inputs
        ctx.save_for_backward(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, cos, sin = ctx.saved_tensors
        d_cos = d_sin = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            x1, x2 = _pairs(x, cos, ctx.interleaved)
            g1, g2 = _pairs(grad, cos, ctx.interleaved)
            d_cos = (g1 * x1 + g2 * x2).sum_to_size(cos.shape)
            d_sin = (g2 * x1 - g1 * x2).sum_to_size(sin.shape)
        return _turn(grad, cos, -sin, ctx.interleaved) if ctx.needs_input_grad[0] else None, d_cos, d_sin, None


def _pairs(x: Tensor, cos: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second of each pair, [B, H, T, rotary_dim / 2], as wide as the tables."""
    half = cos.shape[-1]
    turning = x[..., : 2 * half].to(torch.promote_types(x.dtype, cos.dtype))
    if interleaved:
        return turning[..., 0::2], turning[..., 1::2]
    return turning[..., :half], turning[..., half:]


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    first, second = _pairs(x, cos, interleaved)
    turned = [(first * cos - second * sin).to(x.dtype), (first * sin + second * cos).to(x.dtype)]
    passing = x[..., 2 * cos.shape[-1] :]
    if interleaved:
        return torch.cat([torch.stack(turned, dim=-1).flatten(-2), passing], dim=-1)
    return torch.cat([*turned, passing], dim=-1)
