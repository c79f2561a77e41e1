"""The rows of the backward kernels' tiles: where each query's is, and the row scale's gradient from sums by row."""

from __future__ import annotations

import torch
from torch import Tensor

from posattn.backends.common.reductions import row_scale_gradient
from posattn.plan import Call, Profile


def padded_rows(call: Call, block_m: int) -> Tensor:
    """[B, Tq] int64: the padded row of each query token; -1 for tokens of no document. See BackwardRowsParams."""
    batch, _, tokens, _ = call.q.shape
    token = torch.arange(tokens, device=call.q.device)
    cu = call.mask.cu_seqlens_q
    if cu is None:
        blocks = -(-tokens // block_m)
        return torch.arange(batch, device=token.device)[:, None] * (blocks * block_m) + token
    if cu.shape[0] == 1:
        return torch.full_like(token, -1)[None]
    start = cu.long()
    document = torch.searchsorted(start[1:], token, right=True)
    inside = document < cu.shape[0] - 1
    document = document.clamp(max=cu.shape[0] - 2)
    row = (start[document] // block_m + document) * block_m + token - start[document]
    return torch.where(inside, row, -1)[None]


def row_scale(call: Call, profile: Profile, rows: Tensor, block_m: int) -> Tensor:
    """Sums [padded rows] by query, in the row scale's entries."""
    at = padded_rows(call, block_m)
    sums = torch.where(at >= 0, rows[at.clamp(min=0)], 0.0)
    return row_scale_gradient(call, profile, sums)
