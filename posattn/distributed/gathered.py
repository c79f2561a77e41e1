"""Attention over keys that are gathered from all ranks: one collective each way, O(T) memory for keys and values; best
for few key heads and short rings (Llama 3, arXiv 2407.21783)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from posattn.distributed.group import Group
from posattn.distributed.layout import order


class GatherTokens(torch.autograd.Function):
    """[B, H, P T, D] in the order of the sequence, of each rank's [B, H, T, D]; gradients are summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, group: Group, layout: str, x: Tensor) -> Tensor:
        ctx.rest = group, layout, x.shape[2]
        shards = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(shards, x.contiguous(), group=group)
        tokens = x.shape[2]
        return torch.cat(
            [shards[span.at // tokens][:, :, _within(span.at % tokens, span.length)] for span in order(*_of(ctx))], 2
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        group, _, tokens = ctx.rest
        # Summed in float32: a sum over ranks in 16 bits would round at each.
        total = grad.float() if grad.dtype in (torch.bfloat16, torch.float16) else grad.clone()
        dist.all_reduce(total, group=group)
        own = group.rank() * tokens
        parts = {span.at - own: total[:, :, span.first : span.end] for span in order(*_of(ctx))}
        mine = [parts[at] for at in sorted(parts) if 0 <= at < tokens]
        return None, None, torch.cat(mine, 2).to(grad.dtype)


def _of(ctx: Any) -> tuple[str, int, int]:
    group, layout, tokens = ctx.rest
    return layout, tokens, group.size()


def _within(first: int, length: int) -> slice:
    return slice(first, first + length)


class SumGradients(torch.autograd.Function):
    """The tensors as they are; their gradients summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = [grad.contiguous().clone() for grad in grads]
        for grad in found:
            dist.all_reduce(grad, group=ctx.group)
        return None, *found
