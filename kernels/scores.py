"""What turns scaled dot products into attention logits on one tile, the same in every kernel.

Index vectors come shaped to broadcast, [BLOCK_M, 1] and [1, BLOCK_N] or transposed, so forward and backward kernels
share this whatever way round they hold the tile. Rows and keys past the end are clamped to the last one before
anything is loaded: no operand is read outside, and what such elements hold is masked or never stored.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .bias import lookup, profile_segments, profile_tile, slope_tile

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Below every finite logit in base 2, so that a row with no key yet has weight exp2(-inf - LOWEST) = 0 and never NaN.
LOWEST: tl.constexpr = tl.constexpr(-3.0e38)


@triton.jit
def load_rows(base, rows, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a [T, D] tensor with unit stride along D, [rows, BLOCK_D], zeros past D."""
    offs_d = tl.arange(0, BLOCK_D)
    pointers = base + rows[:, None] * stride + offs_d[None, :]
    if D == BLOCK_D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(offs_d < D)[None, :], other=0.0)


@triton.jit
def cap(x, softcap):
    """softcap * tanh(x / softcap) and its derivative."""
    t = libdevice.tanh(x / softcap)
    return softcap * t, 1.0 - t * t


@triton.jit
def tile_bias(
    i, j, i0, j0, pi, pj, shift, reference, slope, row_scale,
    Table, table_first, table_last, Psi, psi_first, psi_last, PsiBounds, RowBounds, row_first, row_last,
    Knots, num_knots, SegmentSlope, SegmentIntercept, Dense, stride_di, stride_dj,
    SIGNED: tl.constexpr, LINEAR: tl.constexpr, CLAMP: tl.constexpr, EXPLICIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDS_BLOCK: tl.constexpr, KNOTS: tl.constexpr,
):
    """The sum of the operands that are not None, broadcastable to the tile. pi and pj are the positions (i and j
    themselves if implicit); slope, Table, SegmentSlope and SegmentIntercept are the head's, Dense the batch and
    head's."""
    bias = tl.zeros([1, 1], tl.float32)
    if slope is not None:
        bias += slope_tile(slope, pi, pj, shift, reference, LINEAR, SIGNED, EXPLICIT)
    if Table is not None:
        bias += lookup(Table, pi, pj, shift, table_first, table_last, CLAMP, EXPLICIT)
    if Psi is not None:
        psi = lookup(Psi, pi, pj, shift, psi_first, psi_last, CLAMP, EXPLICIT)
        if EXPLICIT:
            y = psi * row_scale
            offs = tl.arange(0, KNOTS)
            knots = tl.load(Knots + offs, mask=offs < num_knots, other=float("inf"))
            low = tl.sum((knots < tl.min(y)).to(tl.int32))
            high = tl.sum((knots < tl.max(y)).to(tl.int32))
        else:
            low, high = profile_segments(
                PsiBounds, RowBounds, Knots, num_knots, i0, j0, shift, psi_first, psi_last, row_first, row_last,
                BLOCK_M, BLOCK_N, BOUNDS_BLOCK, KNOTS,
            )  # fmt: skip
        bias += profile_tile(psi, row_scale, Knots, SegmentSlope, SegmentIntercept, low, high)
    if Dense is not None:
        tile = Dense + i0.to(tl.int64) * stride_di + j0.to(tl.int64) * stride_dj
        bias += tl.load(tile + (i - i0) * stride_di + (j - j0) * stride_dj).to(tl.float32)
    return bias
