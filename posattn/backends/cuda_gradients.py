"""From the sums that the backward kernel leaves to gradients in their operands' shapes, in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from posattn.plan import Call, Profile, Slope
from posattn.positions import token_indices


def slope(call: Call, operand: Slope, by_sequence: Tensor) -> Tensor:
    """Sums [S, H] in the shape of the slopes, [H] or [B, H]."""
    if operand.slope.dim() == 1:
        return by_sequence.sum(0)
    return by_sequence.sum(0, keepdim=True) if call.mask.cu_seqlens_q is not None else by_sequence


def by_entry(sums: Tensor, start: int, first: int, length: int) -> Tensor:
    """Sums [H, n] by distance, from the distance `start` on, as sums [H, length] by entry of a table whose entry 0 is
    for `first`: distances outside belong to its ends."""
    begin, end = max(first - start, 0), max(first + length - start, 0)
    result = torch.zeros((sums.shape[0], length), dtype=sums.dtype, device=sums.device)
    within = sums[:, begin:end]
    result[:, start + begin - first :][:, : within.shape[1]] = within
    result[:, 0] += sums[:, :begin].sum(1)
    result[:, -1] += sums[:, max(begin, end) :].sum(1)
    return result


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
    mask = call.mask
    if call.q_positions is not None:
        position = call.q_positions
    else:
        index, _, shift = token_indices(
            call.q.shape[2], call.k.shape[2], rows.device, mask.k_lengths, mask.cu_seqlens_q, mask.cu_seqlens_k
        )
        position = index + shift
    entry = (position - profile.row_first).clamp(0, profile.row_scale.shape[0] - 1)
    if entry.shape[0] == 1:
        sums = sums.sum(0, keepdim=True)
    # index_put_ sorts before it adds: the result does not depend on the order of threads.
    return torch.zeros_like(profile.row_scale, dtype=torch.float32).index_put_((entry,), sums, accumulate=True)
