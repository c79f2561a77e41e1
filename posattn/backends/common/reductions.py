"""From a backward kernel's sums to gradients in their operands' shapes, in torch and in a fixed order.

What the sums are by (sequence, query, distance) is the same for Triton's kernels and CUDA's, so both call this.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posattn.backends.common.operands import sequences
from posattn.plan import Call, Profile, Slope
from posattn.positions import token_indices

# The gradients of a profile that add up along rows, by name.
LINES = frozenset(("row_scale", "segment_slope", "segment_intercept"))


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """[H]: a sink is a logit without a value, so its gradient is -weight * delta [B, H, T] summed over rows. The
    log-sum-exp [B, H, T] is in natural units; a row that sees nothing (-inf, or +inf as backward passes have it) has no
    share."""
    weight = torch.exp(sinks.detach().float()[:, None] - lse)
    return -(torch.where(lse.isinf(), 0.0, weight) * delta).sum((0, 2))


def in_documents(call: Call, rows: Tensor) -> Tensor:
    """rows [B, H, T] with zeros at tokens of no document, which bounds that nobody read may leave before or behind."""
    bounds = call.mask.cu_seqlens_q
    if bounds is None:
        return rows
    token = torch.arange(rows.shape[2], device=rows.device)
    return torch.where((token >= bounds[0]) & (token < bounds[-1]), rows, 0.0)


def by_sequence(call: Call, sums: Tensor) -> Tensor:
    """Sums [all_blocks, H] as [sequences, H], or [1, H] of packed documents."""
    count = 1 if call.mask.cu_seqlens_q is not None else sequences(call)
    return sums.view(count, -1, sums.shape[1]).sum(1)


def slope_gradient(call: Call, operand: Slope, sums: Tensor) -> Tensor:
    """Sums [sequences, H] in the shape of the slopes, [H] or [B, H]."""
    if operand.slope.dim() == 1:
        return sums.sum(0)
    return sums.sum(0, keepdim=True) if call.mask.cu_seqlens_q is not None else sums


def row_scale_gradient(call: Call, profile: Profile, rows: Tensor) -> Tensor:
    """Sums [B, Tq] by query, in the row scale's entries."""
    if call.q_positions is not None:
        position = call.q_positions
    else:
        index, _, offset = token_indices(call.q.shape[2], call.k.shape[2], rows.device, call.mask)
        position = index + offset
    entry = (position - profile.row_first).clamp(0, profile.row_scale.shape[0] - 1)
    if entry.shape[0] == 1:
        rows = rows.sum(0, keepdim=True)
    # index_put_ sorts before it adds: the result does not depend on the order of threads.
    return torch.zeros_like(profile.row_scale, dtype=torch.float32).index_put_((entry,), rows, accumulate=True)


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
