"""Nested tensors of jagged layout, [B, H, T of each, D], as packed documents and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posattn.errors import ArgumentTypeError, ArgumentValueError
from posattn.plan import Mask


@dataclass(frozen=True)
class Documents:
    """query, key and value as [1, H, all tokens, D], their mask, and the offsets of query's documents."""

    tensors: tuple[Tensor, Tensor, Tensor]
    mask: Mask
    offsets: Tensor

    def unpacked(self, out: Tensor) -> Tensor:
        """out [1, H, all tokens, Dv] as a nested tensor [B, H, T of each, Dv]."""
        return torch.nested.nested_tensor_from_jagged(out[0].transpose(0, 1).contiguous(), self.offsets).transpose(1, 2)


def is_jagged(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.is_nested and tensor.layout == torch.jagged


def packed(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Documents:
    """What scaled_dot_product_attention is given, checked for what only nested tensors can have wrong."""
    if attn_mask is not None:
        raise ArgumentValueError("attn_mask: expected None with nested tensors, got a mask")
    values, offsets, longest = [], [], []
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not is_jagged(tensor):
            raise ArgumentTypeError(f"{name}: expected a nested tensor of jagged layout like query, got a dense one")
        if tensor.dim() != 4:
            raise ArgumentValueError(f"{name}: expected nested [B, H, T of each, D], got {tensor.dim()} dimensions")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ArgumentTypeError(
                f"{name}: expected {query.dtype} on {query.device} like query, got {tensor.dtype} on {tensor.device}"
            )
        by_token: Any = tensor.transpose(1, 2)  # [B, T of each, H, D]
        values.append(by_token.values().transpose(0, 1)[None])
        offsets.append(by_token.offsets())
        longest.append(by_token._get_max_seqlen())
    if offsets[0].shape != offsets[1].shape or not torch.equal(offsets[1], offsets[2]):
        raise ArgumentValueError("key, value: expected as many documents as query, and the same lengths of both")
    mask = Mask(
        cu_seqlens_q=offsets[0].to(torch.int32),
        cu_seqlens_k=offsets[1].to(torch.int32),
        max_q=longest[0],
        max_k=longest[1],
    )
    return Documents((values[0], values[1], values[2]), mask, offsets[0])
