"""Ring attention: keys and values go round the ranks, and each rank attends from its own queries to what passes by
(Liu 2023, arXiv 2310.01889); the backward pass goes round again with the gradients of the keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from posattn.distributed import blocks
from posattn.distributed.blocks import Block, Settings
from posattn.distributed.group import Group, Passing, Ring
from posattn.distributed.layout import spans
from posattn.distributed.merge import Rows, sink_gradient
from posattn.encodings.base import Encoding


def pairs(
    group: Group, layout: str, tokens: int, step: int, settings: Settings, device: torch.device
) -> Iterator[Block]:
    """The blocks of this rank's queries and of the keys that are here in a step, without those that see nothing."""
    rank, ranks = group.rank(), group.size()
    for queries in spans(layout, tokens, rank, ranks):
        for keys in spans(layout, tokens, (rank - step) % ranks, ranks):
            block = blocks.block_of(queries, keys, settings, device)
            if block is not None:
                yield block


class RingAttention(torch.autograd.Function):
    """out and lse of the rank's queries over the keys of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        group: Group,
        layout: str,
        settings: Settings,
        position: Encoding | None,
        sum_gradients: bool,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        rows = Rows.empty(q, v.shape[3])
        here = [k.contiguous(), v.contiguous()]
        ring, ranks = Ring(group), group.size()
        for step in range(ranks):
            coming = ring.start(here) if step + 1 < ranks else None
            for block in pairs(group, layout, q.shape[2], step, settings, q.device):
                part = [here[0][:, :, block.keys], here[1][:, :, block.keys]]
                found = blocks.forward(q[:, :, block.queries], part[0], part[1], position, block, settings)
                rows.add(block.queries, *found)
            if coming is not None:
                here = coming.wait()
        if sinks is not None:
            rows.add_sinks(sinks)
        out = rows.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, rows.lse, *parameters)
        ctx.rest = group, layout, settings, position, sum_gradients
        ctx.set_materialize_grads(False)
        return out, rows.lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        group, layout, settings, position, sum_gradients = ctx.rest
        q, k, v, sinks, out, lse, *parameters = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        wide = lse.dtype
        dq = torch.zeros(q.shape, dtype=wide, device=q.device)
        of_parameters = [torch.zeros(p.shape, dtype=wide, device=p.device) for p in parameters]
        here = [k.contiguous(), v.contiguous()]
        # The gradients of the keys that are here, so far; they travel a step behind them.
        gradients = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in here]
        ring, ranks = Ring(group), group.size()
        travelling: Passing | None = None
        for step in range(ranks):
            coming = ring.start(here) if step + 1 < ranks else None
            own = [torch.zeros_like(x) for x in gradients] if step else gradients
            for block in pairs(group, layout, q.shape[2], step, settings, q.device):
                rows, keys = block.queries, block.keys
                tensors = q[:, :, rows], here[0][:, :, keys], here[1][:, :, keys]
                whole = out[:, :, rows], lse[:, :, rows]
                given = grad_out[:, :, rows], None if grad_lse is None else grad_lse[:, :, rows]
                found = blocks.backward(tensors, position, parameters, block, settings, whole, given)
                to = [dq[:, :, rows], own[0][:, :, keys], own[1][:, :, keys], *of_parameters]
                for total, more in zip(to, found):
                    if more is not None:
                        total += more
            if travelling is not None:
                gradients = travelling.wait()  # those of the ranks before, for the keys that are here
                for total, more in zip(gradients, own):
                    total += more
            travelling = ring.start(gradients) if ranks > 1 else None
            if coming is not None:
                here = coming.wait()
        dk, dv = gradients if travelling is None else travelling.wait()
        d_sinks = None if sinks is None else sink_gradient(out, lse, sinks, grad_out, grad_lse)
        if sum_gradients:
            for gradient in (*of_parameters, *([] if d_sinks is None else [d_sinks])):
                dist.all_reduce(gradient, group=group)
        like = (q, k, v, sinks, *parameters)
        grads = (dq, dk, dv, d_sinks, *of_parameters)
        return (None,) * 5 + tuple(None if g is None else g.to(x.dtype) for g, x in zip(grads, like))
