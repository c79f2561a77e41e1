"""HeadMix scores: the logits of every head on one tile, from dot products to mask, and their gradient on the way back.

The forward and backward kernels of the family share these two functions, so they cannot disagree.
"""

import triton
import triton.language as tl

from .masks import allowed, mask_offset
from .mix import heads_bias, mlp, rows_of_heads, tiles_of_heads
from .scores import LOG2E, cap


@triton.jit
def mixed_logits(
    q, k, b, heads, i0, j0, q_start, k_start, q_len, k_len,
    scale, softcap, num_heads, group, q_tokens, q_max, k_tokens, k_max,
    Slope, stride_slope_b,
    Table, stride_table_h, table_first, table_last,
    Psi, psi_first, psi_last, PsiBounds, RowScale, row_first, row_last, RowBounds,
    Knots, num_knots, SegmentSlope, SegmentIntercept,
    Dense, stride_db, stride_dh, stride_di, stride_dj,
    InnerSlope, inner_stride_slope_b,
    InnerTable, inner_stride_table_h, inner_table_first, inner_table_last,
    InnerPsi, inner_psi_first, inner_psi_last, InnerPsiBounds, InnerRowScale, inner_row_first, inner_row_last,
    InnerRowBounds,
    InnerKnots, inner_num_knots, InnerSegmentSlope, InnerSegmentIntercept,
    InnerDense, inner_stride_db, inner_stride_dh, inner_stride_di, inner_stride_dj,
    W1X, W1B, B1, W2, B2,
    QPositions, stride_qpos, KPositions, stride_kpos,
    Boolean, stride_bb, stride_bh, stride_bi, stride_bj,
    KLengths, CuQ, CuK, left, right, threshold, keep_scale, seed_lo, seed_hi,
    EXPLICIT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    CONCAT: tl.constexpr, RESIDUAL: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, TOP_LEFT: tl.constexpr,
    SIGNED: tl.constexpr, CLAMP: tl.constexpr, KNOTS: tl.constexpr,
    INNER_SIGNED: tl.constexpr, INNER_CLAMP: tl.constexpr, INNER_KNOTS: tl.constexpr,
    BOUNDS_BLOCK: tl.constexpr, PRECISION: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """(logits, x's derivative by the dot product, rows of x, rows of the inner bias, pre-activation).

    q [HEADS, BLOCK_M, BLOCK_D] and k [HEADS, BLOCK_N, BLOCK_D]; logits [HEADS, BLOCK_M, BLOCK_N]; -inf where masked."""
    shift = k_len - q_len
    offset = mask_offset(q_len, k_len, TOP_LEFT)
    rows = tl.minimum(tl.arange(0, BLOCK_M), q_len - 1 - i0)
    cols = tl.maximum(tl.minimum(tl.arange(0, BLOCK_N), k_len - 1 - j0), -j0)
    i = (i0 + tl.arange(0, BLOCK_M))[None, :, None]
    j = (j0 + tl.arange(0, BLOCK_N))[None, None, :]
    i_in = (i0 + rows)[None, :, None]
    j_in = (j0 + cols)[None, None, :]
    pi = i_in
    pj = j_in
    if EXPLICIT:
        pi = tl.load(QPositions + b.to(tl.int64) * stride_qpos + q_start + i_in)
        pj = tl.load(KPositions + b.to(tl.int64) * stride_kpos + k_start + j_in)
    x = tl.dot(q, tl.permute(k, (0, 2, 1)), input_precision=PRECISION) * scale
    slack = 1.0
    if softcap is not None:
        x, slack = cap(x, softcap)
    T: tl.constexpr = q.dtype
    if INNER:
        inner = heads_bias(
            i_in, j_in, i0, j0, pi, pj, shift, b, heads, q_start, k_start,
            InnerSlope, inner_stride_slope_b,
            InnerTable, inner_stride_table_h, inner_table_first, inner_table_last,
            InnerPsi, inner_psi_first, inner_psi_last, InnerPsiBounds, InnerRowScale, inner_row_first, inner_row_last,
            InnerRowBounds,
            InnerKnots, inner_num_knots, InnerSegmentSlope, InnerSegmentIntercept,
            InnerDense, inner_stride_db, inner_stride_dh, inner_stride_di, inner_stride_dj,
            INNER_SIGNED, INNER_CLAMP, EXPLICIT, HEADS, BLOCK_M, BLOCK_N, BOUNDS_BLOCK, INNER_KNOTS, NVIDIA,
        )  # fmt: skip
        if CONCAT:
            x_rows = rows_of_heads(x.to(T), BLOCK_M, BLOCK_N, HEADS)
            inner_rows = rows_of_heads(inner.to(T), BLOCK_M, BLOCK_N, HEADS)
        else:
            x_rows = rows_of_heads((x + inner).to(T), BLOCK_M, BLOCK_N, HEADS)
            inner_rows = x_rows
        if RESIDUAL:
            x += inner
    else:
        x_rows = rows_of_heads(x.to(T), BLOCK_M, BLOCK_N, HEADS)
        inner_rows = x_rows
    mixed, before = mlp(x_rows, inner_rows, W1X, W1B, B1, W2, B2, CONCAT, PRECISION)
    s = x + tiles_of_heads(mixed, BLOCK_M, BLOCK_N, HEADS)
    if OUTER:
        s += heads_bias(
            i_in, j_in, i0, j0, pi, pj, shift, b, heads, q_start, k_start,
            Slope, stride_slope_b,
            Table, stride_table_h, table_first, table_last,
            Psi, psi_first, psi_last, PsiBounds, RowScale, row_first, row_last, RowBounds,
            Knots, num_knots, SegmentSlope, SegmentIntercept,
            Dense, stride_db, stride_dh, stride_di, stride_dj,
            SIGNED, CLAMP, EXPLICIT, HEADS, BLOCK_M, BLOCK_N, BOUNDS_BLOCK, KNOTS, NVIDIA,
        )  # fmt: skip
    # Every tile takes the mask: beside the MLP it costs little, and a kernel without a second loop compiles in half
    # the time.
    ok = allowed(i, j, k_len, offset, left, right, HAS_LEFT, HAS_RIGHT) & (j >= 0)
    s = tl.where(ok, s, float("-inf"))
    if Boolean is not None:
        tile = Boolean + b.to(tl.int64) * stride_bb + heads[:, None, None] * stride_bh
        tile += (q_start + i0).to(tl.int64) * stride_bi + (k_start + j0).to(tl.int64) * stride_bj
        sees = tl.load(tile + rows[None, :, None] * stride_bi + cols[None, None, :] * stride_bj)
        s = tl.where(sees, s, float("-inf"))
    return s, slack, x_rows, inner_rows, before


@triton.jit
def weights_w1(W, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """A [HEADS, WIDTH] weight, loaded whole."""
    return tl.load(W + tl.arange(0, HEADS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])


@triton.jit
def keep_heads(seed_lo, seed_hi, threshold, i0, j0, bh, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dropout.keep_tile for all heads, [HEADS, BLOCK_M, BLOCK_N]; bh [HEADS]."""
    seed = (seed_hi.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | seed_lo.to(tl.uint32, bitcast=True).to(tl.uint64)
    i = (i0 + tl.arange(0, BLOCK_M))[None, :, None]
    j = (j0 + tl.arange(0, BLOCK_N))[None, None, :]
    w0, w1, w2, w3 = tl.philox(seed, j >> 2, i, bh[:, None, None], 0, 10)
    low = tl.where(j % 2 == 0, w0, w1)
    high = tl.where(j % 2 == 0, w2, w3)
    return tl.where(j % 4 < 2, low, high) >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def logit_gradients(
    s, lse2, delta, do, v, b, heads, num_heads, i0, j0, q_start, k_start, threshold, keep_scale, seed_lo, seed_hi,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(weights as they met the values, gradient of the logits), both [HEADS, BLOCK_M, BLOCK_N]."""
    p = tl.exp2(s * LOG2E - lse2[:, :, None])
    dp = tl.dot(do, tl.permute(v, (0, 2, 1)), input_precision=PRECISION)
    kept = p
    if threshold is not None:
        bh = b * num_heads + heads
        keep = keep_heads(seed_lo, seed_hi, threshold, q_start + i0, k_start + j0, bh, BLOCK_M, BLOCK_N)
        kept = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    return kept, p * (dp - delta[:, :, None])


@triton.jit
def mlp_gradients(ds_rows, before, W1, W2, PRECISION: tl.constexpr):
    """(gradient of the pre-activation [rows, WIDTH], and of the rows that W1 multiplied [rows, HEADS])."""
    dhidden = tl.dot(ds_rows, tl.trans(W2), input_precision=PRECISION)
    dbefore = tl.where(before > 0.0, dhidden, 0.01 * dhidden)
    return dbefore, tl.dot(dbefore.to(ds_rows.dtype), tl.trans(W1), input_precision=PRECISION)
