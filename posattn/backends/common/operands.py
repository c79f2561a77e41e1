"""A Call as what GPU kernels of every backend take, by the names of csrc/cuda/params.h: runtime values and tensors,
and what kernels are compiled for. Absent operands are None.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from posattn.backends.common.strides import steps
from posattn.plan import Bias, Call, Slope
from posattn.positions import offset_bounds

PairStrides = tuple[int, int, int, int]  # batch, head, query, key
_NO_STRIDES: PairStrides = (0, 0, 0, 0)


def power_of_two(dim: int, least: int = 16) -> int:
    """The power of two that holds `dim`, at least what a tensor-core product needs."""
    return max(least, 1 << max(dim - 1, 0).bit_length())


def sequences(call: Call) -> int:
    """How many sequences attend on their own: packed documents, else the batch."""
    cu = call.mask.cu_seqlens_q
    return call.q.shape[0] if cu is None else cu.shape[0] - 1


def all_blocks(call: Call, tokens: int, longest: int, block: int) -> int:
    """Blocks of all sequences; of packed documents as many as tokens can fill, however long the longest is."""
    if call.mask.cu_seqlens_q is not None:
        return tokens // block + sequences(call)
    return -(-longest // block) * sequences(call)


def q_max(call: Call) -> int:
    return call.mask.max_q or call.q.shape[2]


def k_max(call: Call) -> int:
    return call.mask.max_k or call.k_tokens


def distances(call: Call) -> tuple[int, int]:
    """The least and the greatest implicit distance of a query and a key."""
    offsets = offset_bounds(call.mask.offset, call.mask.offset_range)
    if offsets is None:
        return 1 - q_max(call), k_max(call) - 1
    return offsets[0] - (k_max(call) - 1), offsets[1] + q_max(call) - 1


def pair_strides(x: Tensor) -> PairStrides:
    """Of a [B, H, Tq, Tk] tensor whose dimensions of size 1 serve every index."""
    batch, head, query, key = steps(x)
    return batch, head, query, key


@dataclass(frozen=True)
class MaskOperands:
    """MaskParams, and which of its bounds there are."""

    k_lengths: Tensor | None
    k_starts: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    offsets: Tensor | None
    offset: int
    left: int
    right: int
    boolean: Tensor | None
    boolean_strides: PairStrides
    has_left: bool
    has_right: bool
    has_offset: bool


def mask_operands(call: Call) -> MaskOperands:
    mask = call.mask
    left, right = mask.left, mask.right
    if mask.causal:
        right = 0 if right is None else min(right, 0)
    # As good as unlimited, and no sum of it and an index overflows.
    far = q_max(call) + k_max(call) + max(map(abs, distances(call)))
    offset = mask.offset
    return MaskOperands(
        k_lengths=mask.k_lengths,
        k_starts=mask.k_starts,
        cu_q=mask.cu_seqlens_q,
        cu_k=mask.cu_seqlens_k,
        offsets=offset if isinstance(offset, Tensor) else None,
        offset=0 if offset is None or isinstance(offset, Tensor) else offset,
        left=0 if left is None else min(left, far),
        right=0 if right is None else min(right, far),
        boolean=mask.boolean,
        boolean_strides=_NO_STRIDES if mask.boolean is None else pair_strides(mask.boolean),
        has_left=left is not None,
        has_right=right is not None,
        has_offset=offset is not None and not isinstance(offset, Tensor),
    )


@dataclass(frozen=True)
class PositionOperands:
    """PositionParams."""

    q: Tensor | None
    k: Tensor | None
    q_batch: int
    k_batch: int


def position_operands(call: Call) -> PositionOperands:
    q, k = call.q_positions, call.k_positions
    return PositionOperands(q, k, 0 if q is None else steps(q)[0], 0 if k is None else steps(k)[0])


@dataclass(frozen=True)
class DropoutOperands:
    """DropoutParams: a word of Philox at least `threshold` keeps its element, unsigned; seed is int64 [1]
    on the device, which kernels read, so that a captured graph draws anew each time it is replayed."""

    threshold: int
    keep_scale: float
    seed: Tensor


def dropout_operands(call: Call) -> DropoutOperands | None:
    if call.dropout_p == 0.0 or call.seed is None:
        return None
    return DropoutOperands(
        threshold=min(math.ceil(call.dropout_p * 2**32), 2**32 - 1),
        keep_scale=1.0 / (1.0 - call.dropout_p),
        seed=call.seed,
    )


@dataclass(frozen=True)
class BiasOperands:
    """BiasParams, and what a bias is compiled for: a signed slope; whether it is linear along the keys; lookups that
    may fall outside; the padded number of knots; entries of psi and of row scales that one of their bounds covers."""

    slope: Tensor | None
    slope_batch: int
    table: Tensor | None
    table_head: int
    table_first: int
    table_last: int
    psi: Tensor | None
    psi_first: int
    psi_last: int
    psi_bounds: Tensor | None
    row_scale: Tensor | None
    row_first: int
    row_last: int
    row_bounds: Tensor | None
    knots: Tensor | None
    num_knots: int
    segment_slope: Tensor | None
    segment_intercept: Tensor | None
    dense: Tensor | None
    dense_strides: PairStrides
    signed: bool
    linear: bool
    clamp: bool
    padded_knots: int
    bounds_block: int


def bias_operands(call: Call, bias: Bias, rows: int, columns: int) -> BiasOperands:
    """`rows` x `columns` logits (a tile, or a warp's part of one) share bounds of a profile."""
    # A tile on the border holds distances beyond those of the sequence, which nobody uses but kernels read.
    beyond = 0 if call.q_positions is not None else rows + columns
    bounds_block = power_of_two(rows + columns)
    slope, slope_batch = slopes(bias.slope)
    table = None if bias.table is None else _extended(bias.table.values.float(), beyond)
    table_first = 0 if bias.table is None else bias.table.first - beyond
    dense = None if bias.dense is None else bias.dense.bias
    if dense is not None and dense.dtype == torch.float64:
        dense = dense.float()
    profile = bias.profile
    psi = row_scale = knots = None
    num_knots, padded_knots = 0, 1
    if profile is not None:
        psi, row_scale = _extended(profile.psi.float(), beyond), profile.row_scale.float().contiguous()
        num_knots = profile.knots.shape[0]
        padded_knots = power_of_two(num_knots + 1, 1)  # at least one is +inf
        knots = pad(profile.knots.float(), (0, padded_knots - num_knots), value=math.inf)
    inside = (bias.table is None or covers(call, bias.table.first, bias.table.values.shape[1])) and (
        profile is None or covers(call, profile.first, profile.psi.shape[0])
    )
    return BiasOperands(
        slope=slope,
        slope_batch=slope_batch,
        table=table,
        table_head=0 if table is None else table.stride(0),
        table_first=table_first,
        table_last=0 if table is None else table_first + table.shape[1] - 1,
        psi=psi,
        psi_first=0 if profile is None else profile.first - beyond,
        psi_last=0 if profile is None or psi is None else profile.first - beyond + psi.shape[0] - 1,
        psi_bounds=None if psi is None else _block_bounds(psi, bounds_block),
        row_scale=row_scale,
        row_first=0 if profile is None else profile.row_first,
        row_last=0 if profile is None or row_scale is None else profile.row_first + row_scale.shape[0] - 1,
        row_bounds=None if row_scale is None else _block_bounds(row_scale, bounds_block),
        knots=knots,
        num_knots=num_knots,
        segment_slope=None if profile is None else profile.segment_slope.float().contiguous(),
        segment_intercept=None if profile is None else profile.segment_intercept.float().contiguous(),
        dense=dense,
        dense_strides=_NO_STRIDES if dense is None else pair_strides(dense),
        signed=bias.slope is not None and bias.slope.signed,
        linear=linear(call, bias),
        clamp=not inside,
        padded_knots=padded_knots,
        bounds_block=bounds_block,
    )


def slopes(slope: Slope | None) -> tuple[Tensor | None, int]:
    """Slopes [H] or [B, H] as float32, and the stride of their batch."""
    if slope is None:
        return None, 0
    values = slope.slope.float().contiguous()
    return values, values.stride(0) if values.dim() == 2 else 0


def covers(call: Call, first: int, length: int) -> bool:
    """True if a table from `first` on holds every implicit distance, so that no index needs clamping."""
    least, greatest = distances(call)
    return call.q_positions is None and first <= least and first + length - 1 >= greatest


def linear(call: Call, bias: Bias) -> bool:
    """True if no visible distance is negative, or the sign is kept: the slope's |d| is then linear in j.

    Not in float32, which would be rounded at the size of a whole tile's bias where the logit's own is small."""
    if bias.slope is None or call.q_positions is not None or call.q.dtype == torch.float32:
        return False
    mask = call.mask
    right = 0 if mask.causal else mask.right
    return bias.slope.signed or (right is not None and right <= 0)


def _extended(x: Tensor, by: int) -> Tensor:
    """x [..., L] with its first and last entry repeated `by` times more: what clamping the index gives."""
    return torch.cat([x[..., :1].expand(*x.shape[:-1], by), x, x[..., -1:].expand(*x.shape[:-1], by)], dim=-1)


def _block_bounds(x: Tensor, block: int) -> Tensor:
    """Least and greatest of blocks n and n + 1, `block` entries each, for every n: [blocks, 2]."""
    padding = -x.shape[0] % block
    low, high = torch.aminmax(torch.cat([x, x[-1:].expand(padding)]).view(-1, block), dim=1)
    low = torch.minimum(low, torch.cat([low[1:], low[-1:]]))
    high = torch.maximum(high, torch.cat([high[1:], high[-1:]]))
    return torch.stack([low, high], dim=1)
