"""The contenders: posattn, and the ways in which PyTorch computes the same function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import posattn
from posattn.encodings.base import Encoding

from .cases import Case, Variant
from .encodings import build


class Unavailable(Exception):
    """A peer that cannot run the case here; the message says why."""


@dataclass(frozen=True)
class Inputs:
    """One case's tensors. All variants of a case get the same values; `grad_out` is what the backward starts from."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    position: Encoding | None
    causal: bool


@dataclass(frozen=True)
class Contender:
    """`forward` gives out [B, H, Tq, D]; `leaves` are the tensors whose gradients its backward has to produce."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    grad_out: Tensor

    def backward(self, out: Tensor, retain_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, self.leaves, self.grad_out, retain_graph=retain_graph, allow_unused=True)


def make_inputs(case: Case, encoding: str, device: str) -> Inputs:
    """Standard normal tensors, equal for equal shapes, and the encoding with equal parameters for equal names."""
    torch.manual_seed(0)
    dtype: torch.dtype = getattr(torch, case.dtype)

    def draw(length: int, heads: int = case.heads) -> Tensor:
        return torch.randn(case.batch, heads, length, case.head_dim, device=device).to(dtype)

    keys = case.k_len, case.kv_heads or case.heads
    q, k, v = (x.requires_grad_(case.mode != "forward") for x in (draw(case.q_len), draw(*keys), draw(*keys)))
    position = build(encoding, case.heads, case.head_dim, max(case.q_len, case.k_len))
    if position is not None:
        position = position.to(device).requires_grad_(case.mode != "forward")
    return Inputs(q, k, v, draw(case.q_len), position, case.causal)


def contender(variant: Variant, case: Case, device: str) -> Contender:
    """The variant ready to run on its inputs. Raises Unavailable if it cannot run the case."""
    inputs = make_inputs(case.shaped(variant), variant.encoding, device)
    forward, extra = PEERS[variant.peer](inputs, variant)
    trained = inputs.position.parameters() if inputs.position is not None else ()
    leaves = (inputs.q, inputs.k, inputs.v, *(p for p in trained if p.requires_grad and not extra), *extra)
    return Contender(forward, leaves, inputs.grad_out)


Peer = tuple[Callable[[], Tensor], tuple[Tensor, ...]]


def _posattn(inputs: Inputs, variant: Variant) -> Peer:
    def forward() -> Tensor:
        return posattn.attention(
            inputs.q, inputs.k, inputs.v, inputs.position, causal=inputs.causal, backend=variant.backend
        )

    return forward, ()


def _eager(inputs: Inputs, variant: Variant) -> Peer:
    def forward() -> Tensor:
        return posattn.attention(
            inputs.q, inputs.k, inputs.v, inputs.position, causal=inputs.causal, backend="reference"
        )

    return forward, ()


def _torch(inputs: Inputs, **options: Any) -> Tensor:
    grouped = inputs.q.shape[1] != inputs.k.shape[1]
    return F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, enable_gqa=grouped, **options)


def _sdpa(inputs: Inputs, variant: Variant) -> Peer:
    q_len, k_len = inputs.q.shape[2], inputs.k.shape[2]
    if inputs.causal and 1 < q_len != k_len:
        raise Unavailable("its causal mask is aligned top-left")
    causal = inputs.causal and q_len == k_len  # a single query at the end sees every key
    return lambda: _torch(inputs, is_causal=causal), ()


def _dense_mask(inputs: Inputs) -> Tensor:
    """The encoding's bias with -inf above the diagonal, [1, H, Tq, Tk] in the dtype of q."""
    if inputs.position is None:
        raise Unavailable("it needs an encoding with a bias")
    q_len, k_len = inputs.q.shape[2], inputs.k.shape[2]
    mask = inputs.position.bias(q_len, k_len)
    if inputs.causal:
        future = torch.ones(q_len, k_len, dtype=torch.bool, device=mask.device).triu(1 + k_len - q_len)
        mask = mask.masked_fill(future, -torch.inf)
    return mask[None].to(inputs.q.dtype)


def _sdpa_mask(inputs: Inputs, variant: Variant) -> Peer:
    mask = _dense_mask(inputs).detach()
    return lambda: _torch(inputs, attn_mask=mask), ()


def _sdpa_mask_build(inputs: Inputs, variant: Variant) -> Peer:
    return lambda: _torch(inputs, attn_mask=_dense_mask(inputs)), ()


def _sdpa_mask_grad(inputs: Inputs, variant: Variant) -> Peer:
    """The mask itself is the leaf: what a trained bias costs before its own parameters are reached."""
    mask = _dense_mask(inputs).detach().requires_grad_()
    return lambda: _torch(inputs, attn_mask=mask), (mask,)


def _flex(inputs: Inputs, variant: Variant) -> Peer:
    """FlexAttention under torch.compile, with ALiBi as its score_mod and the causal block mask built beforehand."""
    if not isinstance(inputs.position, posattn.ALiBi):
        raise Unavailable("its score_mod is written for ALiBi alone")
    if inputs.q.requires_grad and inputs.q.device.type == "cpu":
        raise Unavailable("it does not train on a CPU")
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError as error:
        raise Unavailable(f"this torch has no FlexAttention ({error})") from error
    slopes = inputs.position.slopes.detach()
    q_len, k_len = inputs.q.shape[2], inputs.k.shape[2]
    offset = k_len - q_len

    def alibi(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - slopes[h] * (i + offset - j).abs()

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i + offset

    block_mask = create_block_mask(sees, None, None, q_len, k_len, inputs.q.device) if inputs.causal else None
    grouped = inputs.q.shape[1] != inputs.k.shape[1]
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(
        inputs.q, inputs.k, inputs.v, score_mod=alibi, block_mask=block_mask, enable_gqa=grouped
    ), ()


def _flash_attn(inputs: Inputs, variant: Variant) -> Peer:
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from error
    slopes = None
    if isinstance(inputs.position, posattn.ALiBi):
        slopes = inputs.position.slopes.detach().float()
    elif inputs.position is not None:
        raise Unavailable("of all encodings it has ALiBi alone")

    def forward() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
        out: Tensor = flash_attn_func(q, k, v, causal=inputs.causal, alibi_slopes=slopes)
        return out.transpose(1, 2)

    return forward, ()


PEERS: dict[str, Callable[[Inputs, Variant], Peer]] = {
    "posattn": _posattn,
    "eager": _eager,
    "sdpa": _sdpa,
    "sdpa-mask": _sdpa_mask,
    "sdpa-mask-build": _sdpa_mask_build,
    "sdpa-mask-grad": _sdpa_mask_grad,
    "flex": _flex,
    "flash-attn": _flash_attn,
}
