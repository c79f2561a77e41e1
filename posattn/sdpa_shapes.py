"""torch's shapes for scaled_dot_product_attention, [..., heads, tokens, dim], folded to [batch, heads, tokens, dim].

Leading dimensions broadcast, as they do in torch. A view where strides allow it, a copy where they do not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from posattn.errors import ArgumentValueError


def fold(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...]]:
    """query, key, value and attn_mask with four dimensions, and the shape that the caller's result has."""
    if query.dim() == key.dim() == value.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return query, key, value, attn_mask, (*query.shape[:3], value.shape[3])
    rank = max(query.dim(), key.dim(), value.dim())
    q, k, v = (_pad(tensor, max(rank, 3)) for tensor in (query, key, value))
    heads = q.shape[-3]
    if enable_gqa:
        k, v = _grouped("key", k, heads), _grouped("value", v, heads)
        if k.shape[-3] != v.shape[-3]:
            k, v = (tensor.repeat_interleave(heads // tensor.shape[-3], -3) for tensor in (k, v))
    else:
        heads = _broadcast((q.shape[-3:-2], k.shape[-3:-2], v.shape[-3:-2]), query, key, value)[0]
        q, k, v = (tensor.expand(*tensor.shape[:-3], heads, -1, -1) for tensor in (q, k, v))
    lead = _broadcast((q.shape[:-3], k.shape[:-3], v.shape[:-3]), query, key, value)
    shape = (*lead, heads, q.shape[-2], v.shape[-1])
    if attn_mask is not None and attn_mask.dim() > 3 and len(lead) != 1:
        attn_mask = _fold_mask(attn_mask, lead)
    q, k, v = (
        tensor if len(lead) == 1 and tensor.shape[0] == lead[0] else _merge(tensor, lead) for tensor in (q, k, v)
    )
    return q, k, v, attn_mask, shape[-rank:] if rank < len(shape) else shape


# A mask that rows share is never copied for them up to so many calls; past it, one call over a copy.
MOST_PARTS = 64


def parts(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
) -> tuple[int, list[tuple[Tensor, Tensor, Tensor, Tensor]]] | None:
    """query, key, value and attn_mask cut along a leading dimension, and which, where the mask differs along it
    and is shared along another: [B, 1, H, L, S] for [B, N, H, L, E], AlphaFold's pair bias. Folding both into a batch
    would copy it N times, where each part, a batch of N, reads its own as it is. None where folding copies nothing.
    """
    rank = max(query.dim(), key.dim(), value.dim())
    if attn_mask is None or rank < 5 or attn_mask.dim() > rank:
        return None
    q, k, v, mask = (_pad(tensor, rank) for tensor in (query, key, value, attn_mask))
    lead = _broadcast((q.shape[:-3], k.shape[:-3], v.shape[:-3]), query, key, value)
    own = [dim for dim, length in enumerate(mask.shape[:-3]) if length > 1]
    shared = any(length == 1 and lead[dim] > 1 for dim, length in enumerate(mask.shape[:-3]))
    if not own or not shared or math.prod(mask.shape[:-3]) > MOST_PARTS or any(mask.shape[d] != lead[d] for d in own):
        return None
    wide = (tensor.expand(*lead, *tensor.shape[-3:]) for tensor in (q, k, v))
    return own[0], list(zip(*(tensor.unbind(own[0]) for tensor in (*wide, mask))))


def _pad(tensor: Tensor, rank: int) -> Tensor:
    return tensor if tensor.dim() == rank else tensor[(None,) * (rank - tensor.dim())]


def _merge(tensor: Tensor, lead: tuple[int, ...]) -> Tensor:
    rest = tensor.shape[-3:]
    return tensor.expand(*lead, *rest).reshape(math.prod(lead), *rest)


def _fold_mask(attn_mask: Tensor, lead: tuple[int, ...]) -> Tensor:
    if attn_mask.dim() < len(lead) + 3:
        attn_mask = _pad(attn_mask, len(lead) + 3)
    rest = attn_mask.shape[-3:]
    mask_lead = attn_mask.shape[:-3]
    if all(length == 1 for length in mask_lead):
        return attn_mask.reshape(1, *rest)
    if len(mask_lead) != len(lead) or any(have not in (1, want) for have, want in zip(mask_lead, lead)):
        raise ArgumentValueError(
            f"attn_mask: expected leading dimensions that broadcast to {list(lead)}, got {list(mask_lead)}"
        )
    return _merge(attn_mask, lead)


def _grouped(name: str, tensor: Tensor, heads: int) -> Tensor:
    own = tensor.shape[-3]
    if own == 0 or heads % own:
        raise ArgumentValueError(f"{name}: expected a head count that divides query's {heads}, got {own}")
    return tensor


def _broadcast(shapes: tuple[tuple[int, ...], ...], query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError as error:
        given = ", ".join(str(list(tensor.shape)) for tensor in (query, key, value))
        raise ArgumentValueError(
            "query, key, value: expected head counts and leading dimensions that broadcast "
            f"(enable_gqa=True lets key heads divide query heads), got {given}"
        ) from error
