"""Ulysses: heads are exchanged for tokens, so that each rank attends over the whole sequence with its share of the
heads (Jacobs 2023, arXiv 2309.14509)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from posattn.distributed.group import Group
from posattn.distributed.layout import order


class TokensOfHeads(torch.autograd.Function):
    """[B, H / P, P T, D] in the order of the sequence, of each rank's [B, H, T, D]; `back` the other way."""

    @staticmethod
    def forward(ctx: Any, group: Group, layout: str, back: bool, x: Tensor) -> Tensor:
        ctx.rest = group, layout, back
        return _exchange(group, layout, back, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, Tensor]:
        group, layout, back = ctx.rest
        return None, None, None, _exchange(group, layout, not back, grad)


def _exchange(group: Group, layout: str, back: bool, x: Tensor) -> Tensor:
    ranks = group.size()
    tokens = x.shape[2] // ranks if back else x.shape[2]
    found = order(layout, tokens, ranks)
    if back:
        # The tokens as they lie on the ranks side by side, then a piece for each rank.
        by_rank = torch.cat([x[:, :, span.first : span.end] for span in sorted(found, key=lambda span: span.at)], 2)
        parts = list(by_rank.chunk(ranks, 2))
    else:
        parts = list(x.chunk(ranks, 1))
    sent = torch.stack([part.contiguous() for part in parts])
    came = torch.empty_like(sent)
    dist.all_to_all_single(came, sent, group=group)
    pieces = list(came.unbind(0))
    if back:
        return torch.cat(pieces, 1)
    together = torch.cat(pieces, 2)
    return torch.cat([together[:, :, span.at : span.at + span.length] for span in found], 2)
