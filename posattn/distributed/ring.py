"""Ring attention: keys and values go round the ranks, and each rank attends from its own queries to what passes by
(Liu 2023, arXiv 2310.01889); the backward pass goes round again with the gradients of the keys."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from posattn.distributed import blocks
from posattn.distributed.blocks import Settings
from posattn.distributed.group import Group, Passing, Ring
from posattn.distributed.merge import Rows, sink_gradient
from posattn.distributed.pairs import Schedule
from posattn.encodings.base import Encoding


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
        ring, schedule = Ring(group), Schedule(group, layout, settings, position, q, k)
        for step in range(schedule.steps):
            coming = ring.start(here) if step + 1 < schedule.steps else None
            for block in schedule.blocks(step):
                part = [here[0][:, :, block.keys], here[1][:, :, block.keys]]
                found = blocks.forward(q[:, :, block.queries], part[0], part[1], position, block, settings)
                rows.add(block.queries, *found)
            if coming is not None:
                here = coming.wait()
        if sinks is not None:
            rows.add_sinks(sinks)
        out = rows.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, rows.lse, *parameters)
        ctx.rest = group, settings, position, sum_gradients, schedule
        ctx.set_materialize_grads(False)
        return out, rows.lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        group, settings, position, sum_gradients, schedule = ctx.rest
        q, k, v, sinks, out, lse, *parameters = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        wide = lse.dtype
        dq = torch.zeros(q.shape, dtype=wide, device=q.device)
        of_parameters = [torch.zeros(p.shape, dtype=wide, device=p.device) for p in parameters]
        here = [k.contiguous(), v.contiguous()]
        # The gradients of the keys that are here, so far; they travel a step behind them.
        gradients = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in here]
        ring, last = Ring(group), schedule.steps - 1
        travelling: Passing | None = None
        for step in range(last + 1):
            coming = ring.start(here) if step < last else None
            own = [torch.zeros_like(x) for x in gradients] if step else gradients
            for block in schedule.blocks(step):
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
            # On with their keys, and from the last step straight home.
            travelling = ring.start(gradients, 1 if step < last else -last) if last else None
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
