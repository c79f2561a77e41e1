"""HeadMix gradients of what is indexed by distance or by (i, j), in the inner bias or the outer one.

As in backward_bias.py: a program walks the tiles of one diagonal (tables, psi) or the batches that share a tile (dense
biases), so sums have a fixed order and take no atomic, but for explicit positions.
"""

import triton
import triton.language as tl

from .bias import lookup
from .dropout import RANDOM_BITS
from .masks import mask_offset, sequence
from .mix import load_heads, row_scales, rows_of_heads
from .mix_backward_q import inner_gradient
from .mix_scores import logit_gradients, mixed_logits, mlp_gradients, weights_w1
from .scores import segments


@triton.jit
def _psi_gradient(
    g, heads, real, i0, j0, pi, pj, shift,
    Psi, psi_first, psi_last, PsiBounds, RowScale, row_first, row_last, RowBounds, Knots, num_knots, SegmentSlope,
    CLAMP: tl.constexpr, EXPLICIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BOUNDS_BLOCK: tl.constexpr, KNOTS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """g times the slope of the profile's segment times the row scale, summed over heads: [BLOCK_M, BLOCK_N]."""
    row_scale = row_scales(pi, shift, RowScale, row_first, row_last, EXPLICIT)
    low, high = segments(
        i0, j0, pi, pj, shift, row_scale, Psi, psi_first, psi_last, PsiBounds, row_first, row_last, RowBounds,
        Knots, num_knots, CLAMP, EXPLICIT, BLOCK_M, BLOCK_N, BOUNDS_BLOCK, KNOTS, NVIDIA,
    )  # fmt: skip
    slopes = SegmentSlope + (heads * (num_knots + 1))[:, None, None]
    y = row_scale * lookup(Psi, pi, pj, i0, j0, shift, psi_first, psi_last, 0, CLAMP, EXPLICIT, NVIDIA)
    steepness = tl.zeros(g.shape, tl.float32) + tl.load(slopes + low)
    if high > low:
        for m in range(low, high):
            steepness = tl.where(y > tl.load(Knots + m), tl.load(slopes + m + 1), steepness)
    return tl.sum(tl.where(real[:, None, None], g * steepness * row_scale, 0.0), 0)


@triton.jit(do_not_specialize=RANDOM_BITS)
def mixed_gradient_by_tile(
    Q, K, V, GradOut, Lse2, Delta, DTable, DPsi, DDense, stride_gdb, stride_gdh, stride_gt,
    first_corner, num_sequences, batches_each,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm,
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
    ALONG_DIAGONAL: tl.constexpr, OF_INNER: tl.constexpr, SHARED_HEADS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    CONCAT: tl.constexpr, RESIDUAL: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, TOP_LEFT: tl.constexpr,
    SIGNED: tl.constexpr, CLAMP: tl.constexpr, KNOTS: tl.constexpr,
    INNER_SIGNED: tl.constexpr, INNER_CLAMP: tl.constexpr, INNER_KNOTS: tl.constexpr,
    BOUNDS_BLOCK: tl.constexpr, PRECISION: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """ALONG_DIAGONAL: DTable [H, bands, 2 * BLOCK] and DPsi [bands, 2 * BLOCK] as in gradient_by_distance. Else
    DDense [B or 1, H or 1, Tq, Tk] (SHARED_HEADS sums over heads), and by atomics, zeroed, DTable [H, L] and DPsi [L]
    of explicit positions."""
    EXPLICIT: tl.constexpr = QPositions is not None
    pid = tl.program_id(0)
    real = tl.arange(0, HEADS) < num_heads
    b = pid * 0
    heads = tl.minimum(tl.arange(0, HEADS), num_heads - 1).to(tl.int64)  # padded heads repeat the last one
    kv = heads // group
    w1x = weights_w1(W1X, HEADS, WIDTH)
    w1b = w1x
    if CONCAT:
        w1b = weights_w1(W1B, HEADS, WIDTH)
    b1 = tl.load(B1 + tl.arange(0, WIDTH))
    w2 = weights_w1(W2, WIDTH, HEADS)
    b2 = tl.load(B2 + tl.arange(0, HEADS))
    by_head = tl.zeros([HEADS, BLOCK_M, BLOCK_N], tl.float32)
    psi = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    blocks_m = tl.cdiv(q_max, BLOCK_M)
    blocks_n = tl.cdiv(k_max, BLOCK_N)
    corner = first_corner + pid * BLOCK_N
    tile_i0 = (pid % blocks_m) * BLOCK_M
    tile_j0 = (pid // blocks_m % blocks_n) * BLOCK_N
    first = 0 if ALONG_DIAGONAL else pid // blocks_m // blocks_n
    count = num_sequences if ALONG_DIAGONAL else batches_each
    for index in range(first, first + count):
        q_start, k_start, q_len, k_len = sequence(KLengths, CuQ, CuK, index, q_tokens, k_tokens)
        b = index if CuQ is None else index * 0
        b64 = b.to(tl.int64)
        shift = k_len - q_len
        offset = mask_offset(q_len, k_len, TOP_LEFT)
        if ALONG_DIAGONAL:
            lo = tl.maximum(corner - shift - (BLOCK_N - 1), 0) // BLOCK_M * BLOCK_M
            hi = tl.where(k_len > 0, tl.minimum(corner - shift + k_len, q_len), 0)
            low_j0 = lo + shift - corner
        else:
            lo = tile_i0
            hi = tl.where((tile_i0 < q_len) & (tile_j0 < k_len), tile_i0 + BLOCK_M, tile_i0)
            low_j0 = tile_j0
        if HAS_RIGHT:
            hi = tl.where(low_j0 <= lo + (BLOCK_M - 1) + offset + right, hi, lo)
        if HAS_LEFT:
            hi = tl.where(low_j0 + (BLOCK_N - 1) >= lo + offset - left, hi, lo)
        for i0 in range(lo, hi, BLOCK_M):
            j0 = i0 - lo + low_j0
            rows = tl.minimum(tl.arange(0, BLOCK_M), q_len - 1 - i0)
            row0 = (q_start + i0).to(tl.int64)
            q = load_heads(Q + b64 * stride_qb + row0 * stride_qm, heads, rows, stride_qh, stride_qm, D, BLOCK_D)
            do = load_heads(
                GradOut + b64 * stride_gb + row0 * stride_gm, heads, rows, stride_gh, stride_gm, DV, BLOCK_DV
            )
            stat = (b64 * num_heads + heads)[:, None] * q_tokens + row0 + rows[None, :]
            lse2 = tl.where((tl.arange(0, BLOCK_M) < q_len - i0)[None, :], tl.load(Lse2 + stat), float("inf"))
            delta = tl.load(Delta + stat)  # [HEADS, BLOCK_M]
            cols = tl.maximum(tl.minimum(tl.arange(0, BLOCK_N), k_len - 1 - j0), -j0)
            col0 = (k_start + j0).to(tl.int64)
            k = load_heads(K + b64 * stride_kb + col0 * stride_kn, kv, cols, stride_kh, stride_kn, D, BLOCK_D)
            v = load_heads(V + b64 * stride_vb + col0 * stride_vn, kv, cols, stride_vh, stride_vn, DV, BLOCK_DV)
            pi = (i0 + rows)[None, :, None]
            pj = (j0 + cols)[None, None, :]
            if EXPLICIT:
                pi = tl.load(QPositions + b64 * stride_qpos + row0 + rows)[None, :, None]
                pj = tl.load(KPositions + b64 * stride_kpos + col0 + cols)[None, None, :]
            s, _slack, _x_rows, _inner_rows, before = mixed_logits(
                q, k, b, heads, i0, j0, q_start, k_start, q_len, k_len,
                scale, softcap, num_heads, group, q_tokens, q_max, k_tokens, k_max,
                Slope, stride_slope_b,
                Table, stride_table_h, table_first, table_last,
                Psi, psi_first, psi_last, PsiBounds, RowScale, row_first, row_last, RowBounds,
                Knots, num_knots, SegmentSlope, SegmentIntercept,
                Dense, stride_db, stride_dh, stride_di, stride_dj,
                InnerSlope, inner_stride_slope_b,
                InnerTable, inner_stride_table_h, inner_table_first, inner_table_last,
                InnerPsi, inner_psi_first, inner_psi_last, InnerPsiBounds, InnerRowScale, inner_row_first,
                inner_row_last, InnerRowBounds,
                InnerKnots, inner_num_knots, InnerSegmentSlope, InnerSegmentIntercept,
                InnerDense, inner_stride_db, inner_stride_dh, inner_stride_di, inner_stride_dj,
                w1x, w1b, b1, w2, b2,
                QPositions, stride_qpos, KPositions, stride_kpos,
                Boolean, stride_bb, stride_bh, stride_bi, stride_bj,
                KLengths, CuQ, CuK, left, right, threshold, keep_scale, seed_lo, seed_hi,
                EXPLICIT,
                D, BLOCK_D, DV, BLOCK_DV,
                BLOCK_M, BLOCK_N, HEADS, WIDTH,
                CONCAT, RESIDUAL, OUTER, INNER,
                HAS_LEFT, HAS_RIGHT, TOP_LEFT,
                SIGNED, CLAMP, KNOTS,
                INNER_SIGNED, INNER_CLAMP, INNER_KNOTS,
                BOUNDS_BLOCK, PRECISION, NVIDIA,
            )  # fmt: skip
            _kept, ds = logit_gradients(
                s, lse2, delta, do, v, b, heads.to(tl.int32), num_heads, i0, j0, q_start, k_start,
                threshold, keep_scale, seed_lo, seed_hi, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
            ds_rows = rows_of_heads(ds.to(q.dtype), BLOCK_M, BLOCK_N, HEADS)
            dbefore, dz = mlp_gradients(ds_rows, before, w1x, w2, PRECISION)
            g = ds
            if OF_INNER:
                g = inner_gradient(ds, dz, dbefore, w1b, BLOCK_M, BLOCK_N, HEADS, CONCAT, RESIDUAL, PRECISION)
            if DPsi is not None:
                if OF_INNER:
                    dpsi = _psi_gradient(
                        g, heads, real, i0, j0, pi, pj, shift,
                        InnerPsi, inner_psi_first, inner_psi_last, InnerPsiBounds, InnerRowScale, inner_row_first,
                        inner_row_last,
                        InnerRowBounds, InnerKnots, inner_num_knots, InnerSegmentSlope,
                        INNER_CLAMP, EXPLICIT, BLOCK_M, BLOCK_N, BOUNDS_BLOCK, INNER_KNOTS, NVIDIA,
                    )  # fmt: skip
                else:
                    dpsi = _psi_gradient(
                        g, heads, real, i0, j0, pi, pj, shift,
                        Psi, psi_first, psi_last, PsiBounds, RowScale, row_first, row_last, RowBounds,
                        Knots, num_knots, SegmentSlope,
                        CLAMP, EXPLICIT, BLOCK_M, BLOCK_N, BOUNDS_BLOCK, KNOTS, NVIDIA,
                    )  # fmt: skip
                if ALONG_DIAGONAL:
                    psi += dpsi
                else:
                    if OF_INNER:
                        entry = lookup_entry(pi, pj, inner_psi_first, inner_psi_last)
                    else:
                        entry = lookup_entry(pi, pj, psi_first, psi_last)
                    tl.atomic_add(DPsi + tl.reshape(entry, [BLOCK_M, BLOCK_N]), dpsi, sem="relaxed")
            if DTable is not None and not ALONG_DIAGONAL:
                if OF_INNER:
                    entry = lookup_entry(pi, pj, inner_table_first, inner_table_last)
                else:
                    entry = lookup_entry(pi, pj, table_first, table_last)
                tl.atomic_add(
                    DTable + (heads * stride_gt)[:, None, None] + entry,
                    g,
                    mask=real[:, None, None] & (g == g),
                    sem="relaxed",
                )
            by_head += g

    x = tl.arange(0, BLOCK_N)
    if ALONG_DIAGONAL:
        i = tl.arange(0, BLOCK_M)[:, None]
        source = (i - x[None, :]) & (BLOCK_N - 1)
        out = pid.to(tl.int64) * 2 * BLOCK_N + x
        if DPsi is not None:
            sheared = tl.gather(psi, source, 1)
            tl.store(DPsi + out, tl.sum(tl.where(i < x[None, :], sheared, 0.0), 0))
            tl.store(DPsi + out + BLOCK_N, tl.sum(tl.where(i >= x[None, :], sheared, 0.0), 0))
        if DTable is not None:
            by_row = tl.reshape(by_head, [HEADS * BLOCK_M, BLOCK_N])
            row = tl.arange(0, HEADS * BLOCK_M)[:, None]
            sheared = tl.gather(by_row, ((row % BLOCK_M) - x[None, :]) & (BLOCK_N - 1), 1)
            sheared = tl.reshape(sheared, [HEADS, BLOCK_M, BLOCK_N])
            below = (i < x[None, :])[None, :, :]
            head_out = (tl.arange(0, HEADS).to(tl.int64) * stride_gt)[:, None] + out[None, :]
            mask = real[:, None] & (x >= 0)[None, :]
            tl.store(DTable + head_out, tl.sum(tl.where(below, sheared, 0.0), 1), mask=mask)
            tl.store(DTable + head_out + BLOCK_N, tl.sum(tl.where(below, 0.0, sheared), 1), mask=mask)
    elif DDense is not None:
        q_start, k_start, q_len, k_len = sequence(KLengths, CuQ, CuK, first, q_tokens, k_tokens)
        i_end = q_len if CuQ is not None else q_tokens
        j_end = k_len if CuQ is not None else k_tokens
        b_out = first if CuQ is None else first * 0
        i = tile_i0 + tl.arange(0, BLOCK_M)
        j = tile_j0 + tl.arange(0, BLOCK_N)
        base = DDense + b_out.to(tl.int64) * stride_gdb
        at = (q_start + i).to(tl.int64)[:, None] * k_tokens + (k_start + j)[None, :]
        inside = (i < i_end)[:, None] & (j < j_end)[None, :]
        if SHARED_HEADS:
            tl.store(base + at, tl.sum(tl.where(real[:, None, None], by_head, 0.0), 0), mask=inside)
        else:
            heads_at = (tl.arange(0, HEADS) * stride_gdh)[:, None, None] + at[None, :, :]
            tl.store(base + heads_at, by_head, mask=real[:, None, None] & inside[None, :, :])


@triton.jit
def lookup_entry(pi, pj, first, last):
    """The entry of a table that a distance falls on."""
    return tl.minimum(tl.maximum(pi - pj, first), last) - first
