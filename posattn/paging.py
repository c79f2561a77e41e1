"""Keys in pages, [pages, page, heads, dim] and a block table: how they enter a call, and how they are gathered.

Kernels read through the table where they can (a backend's `unsupported_pages`). Everything else, and every call that
needs a gradient, goes through `gathered_call`: a copy of the pages that the call names, O(Tk) memory, one more pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from posattn.plan import Call


class Pages(NamedTuple):
    """k [P, page, H, D], v [P, page, H, Dv] and a checked block_table [B, n]."""

    k: Tensor
    v: Tensor
    block_table: Tensor

    def stand_ins(self) -> tuple[Tensor, Tensor]:
        """Tensors of the shape that k and v would have side by side, [B, H, n * page, D], for whoever asks for no more
        than that: they hold the first token alone."""
        batch, entries = self.block_table.shape
        tokens = entries * self.k.shape[1]
        return _stand_in(self.k, batch, tokens), _stand_in(self.v, batch, tokens)

    def put_into(self, call: Call) -> Call:
        """The call over these pages in the place of its keys and values."""
        return replace(call, k=self.k.transpose(1, 2), v=self.v.transpose(1, 2), block_table=self.block_table)


def _stand_in(pages: Tensor, batch: int, tokens: int) -> Tensor:
    return pages[:1, :1].transpose(1, 2).expand(batch, -1, tokens, -1)


def gathered_call(call: Call) -> Call:
    """The call with its keys and values side by side; itself if they lie so. Differentiable in the pages."""
    if call.block_table is None:
        return call
    end = call.mask.max_k
    k, v = (
        gathered(pages.transpose(1, 2), call.block_table, call.mask.k_lengths)[:, :, :end] for pages in (call.k, call.v)
    )
    return replace(call, k=k, v=v, block_table=None)


def gathered(pages: Tensor, block_table: Tensor, k_lengths: Tensor | None) -> Tensor:
    """pages [P, page, H, D] as [B, H, n * page, D] for a checked block_table [B, n]; differentiable in the pages.

    Entries that lie wholly past k_lengths [B] may hold anything: page 0 is taken in their place.
    """
    page, heads, dim = pages.shape[1:]
    batch, entries = block_table.shape
    wanted = block_table
    if k_lengths is not None:
        first = torch.arange(entries, device=block_table.device) * page
        wanted = torch.where(first < k_lengths[:, None], block_table, 0)
    if pages.device.type != "cpu":
        # Nobody looked at these values, and an index out of bounds would end the process's use of the device.
        wanted = wanted.clamp(0, max(pages.shape[0] - 1, 0))
    found = pages.index_select(0, wanted.reshape(-1))
    return found.view(batch, entries * page, heads, dim).transpose(1, 2)
