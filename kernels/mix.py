"""HeadMix on a tile: the logits of all heads, [HEADS, BLOCK_M, BLOCK_N], through an MLP over the heads.

The MLP is three small products with one row for each (i, j), on tensor cores: [BLOCK_M * BLOCK_N, HEADS] by W1, then by
W2. Its weights come transposed and zero-padded to powers of two, so padded heads and units add nothing.
"""

import triton
import triton.language as tl

from .bias import lookup, slope_tile
from .scores import segments


@triton.jit
def rows_of_heads(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEADS: tl.constexpr):
    """[HEADS, BLOCK_M, BLOCK_N] as the rows of a product, [BLOCK_M * BLOCK_N, HEADS]."""
    return tl.reshape(tl.permute(x, (1, 2, 0)), [BLOCK_M * BLOCK_N, HEADS])


@triton.jit
def tiles_of_heads(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEADS: tl.constexpr):
    """The inverse of rows_of_heads."""
    return tl.permute(tl.reshape(x, [BLOCK_M, BLOCK_N, HEADS]), (2, 0, 1))


@triton.jit
def load_heads(base, heads, rows, stride_h, stride_t, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[HEADS, rows, BLOCK_D] of a [H, T, D] tensor, zeros past D."""
    offs_d = tl.arange(0, BLOCK_D)[None, None, :]
    pointers = base + heads[:, None, None] * stride_h + rows[None, :, None] * stride_t + offs_d
    if D == BLOCK_D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=offs_d < D, other=0.0)


@triton.jit
def heads_bias(
    i, j, i0, j0, pi, pj, shift, b, heads, i_first, j_first, Slope, stride_slope_b,
    Table, stride_table_h, table_first, table_last,
    Psi, psi_first, psi_last, PsiBounds, RowScale, row_first, row_last, RowBounds,
    Knots, num_knots, SegmentSlope, SegmentIntercept, Dense, stride_db, stride_dh, stride_di, stride_dj,
    SIGNED: tl.constexpr, CLAMP: tl.constexpr, EXPLICIT: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDS_BLOCK: tl.constexpr, KNOTS: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """The sum of a Bias's operands for all heads, [HEADS, BLOCK_M, BLOCK_N]; i, pi [1, M, 1], j, pj [1, 1, N]."""
    h = heads[:, None, None]
    bias = tl.zeros([HEADS, BLOCK_M, BLOCK_N], tl.float32)
    if Slope is not None:
        slope = tl.load(Slope + b * stride_slope_b + h)
        bias += slope_tile(slope, pi, pj, i0, j0, shift, i0 + shift, False, SIGNED, EXPLICIT)
    if Table is not None:
        table = Table + h * stride_table_h
        bias += lookup(table, pi, pj, i0, j0, shift, table_first, table_last, 0, CLAMP, EXPLICIT, NVIDIA)
    if Psi is not None:
        row_scale = row_scales(pi, shift, RowScale, row_first, row_last, EXPLICIT)
        low, high = segments(
            i0, j0, pi, pj, shift, row_scale, Psi, psi_first, psi_last, PsiBounds, row_first, row_last, RowBounds,
            Knots, num_knots, CLAMP, EXPLICIT, BLOCK_M, BLOCK_N, BOUNDS_BLOCK, KNOTS, NVIDIA,
        )  # fmt: skip
        line = h * (num_knots + 1)
        y = row_scale * lookup(Psi, pi, pj, i0, j0, shift, psi_first, psi_last, 0, CLAMP, EXPLICIT, NVIDIA)
        slope = tl.load(SegmentSlope + line + low)
        bias += y * slope + tl.load(SegmentIntercept + line + low)
        if high > low:
            for m in range(low, high):
                steeper = tl.load(SegmentSlope + line + m + 1)
                bias += (steeper - slope) * tl.maximum(y - tl.load(Knots + m), 0.0)
                slope = steeper
    if Dense is not None:
        tile = Dense + b.to(tl.int64) * stride_db + h * stride_dh
        tile += (i_first + i0).to(tl.int64) * stride_di + (j_first + j0).to(tl.int64) * stride_dj
        bias += tl.load(tile + (i - i0) * stride_di + (j - j0) * stride_dj).to(tl.float32)
    return bias


@triton.jit
def row_scales(pi, shift, RowScale, row_first, row_last, EXPLICIT: tl.constexpr):
    position = pi if EXPLICIT else pi + shift
    return tl.load(RowScale + (tl.minimum(tl.maximum(position, row_first), row_last) - row_first))


@triton.jit
def mlp(z, bias, W1X, W1B, B1, W2, B2, CONCAT: tl.constexpr, PRECISION: tl.constexpr):
    """Rows z (and, for CONCAT, bias) [rows, HEADS] to (MLP output [rows, HEADS], pre-activation [rows, WIDTH]).

    W1X, W1B are [HEADS, WIDTH], W2 [WIDTH, HEADS], in the rows' dtype; B1 [WIDTH] and B2 [HEADS] float32."""
    before = tl.dot(z, W1X, input_precision=PRECISION) + B1[None, :]
    if CONCAT:
        before = tl.dot(bias, W1B, before, input_precision=PRECISION)
    hidden = tl.maximum(before, 0.01 * before)
    return tl.dot(hidden.to(z.dtype), W2, input_precision=PRECISION) + B2[None, :], before
