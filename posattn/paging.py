"""Keys in pages, [pages, page, heads, dim] and a block table, brought to the kernels' own layout.

`gathered` is the one seam between pages and kernels: it copies the pages that a call names, O(Tk) memory a call, until
kernels read through the table themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gathered(pages: Tensor, block_table: Tensor, k_lengths: Tensor) -> Tensor:
    """pages [P, page, H, D] as [B, H, n * page, D] for a checked block_table [B, n]; differentiable in the pages.

    Entries that lie wholly past k_lengths [B] may hold anything: page 0 is taken in their place.
    """
    page, heads, dim = pages.shape[1:]
    batch, entries = block_table.shape
    first = torch.arange(entries, device=block_table.device) * page
    wanted = torch.where(first < k_lengths[:, None], block_table, 0)
    if pages.device.type != "cpu":
        # Nobody looked at these values, and an index out of bounds would end the process's use of the device.
        wanted = wanted.clamp(0, max(pages.shape[0] - 1, 0))
    found = pages.index_select(0, wanted.reshape(-1))
    return found.view(batch, entries * page, heads, dim).transpose(1, 2)
