"""HeadMix gradients of the queries, of the MLP, and of what adds up along rows (slopes, row scales, profile lines).

One program owns BLOCK_M queries of all heads and walks their keys. Its share of every parameter's gradient goes to a
slot of its own, which the host adds up: O(N) memory, no atomic between programs, a fixed order.
"""

import triton
import triton.language as tl

from .bias import lookup
from .dropout import RANDOM_BITS
from .masks import key_spans, mask_offset, sequence
from .mix import load_heads, row_scales, rows_of_heads, tiles_of_heads
from .mix_scores import logit_gradients, mixed_logits, mlp_gradients, weights_w1
from .scores import segments


@triton.jit
def inner_gradient(
    ds, dz, dbefore, w1b, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEADS: tl.constexpr, CONCAT: tl.constexpr,
    RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the inner bias, [HEADS, BLOCK_M, BLOCK_N]."""
    if CONCAT:
        dz = tl.dot(dbefore.to(w1b.dtype), tl.trans(w1b), input_precision=PRECISION)
    dz = tiles_of_heads(dz, BLOCK_M, BLOCK_N, HEADS)
    if RESIDUAL:
        dz += ds
    return dz


@triton.jit
def _add_outer(acc, left, right, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """acc [PARTS, A, B] plus left.T @ right of rows [R, A] and [R, B], cut into PARTS along the rows, so that
    warps share the product out; each part costs A * B registers among all warps."""
    rows: tl.constexpr = left.shape[0] // PARTS
    left = tl.permute(tl.reshape(left, [PARTS, rows, left.shape[1]]), (0, 2, 1))
    return tl.dot(left, tl.reshape(right, [PARTS, rows, right.shape[1]]), acc, input_precision=PRECISION)


@triton.jit
def _slope_sums(g, i0, j0, shift, pi, pj, SIGNED: tl.constexpr, EXPLICIT: tl.constexpr):
    """Minus the sum of g times the distance, [HEADS]."""
    distance = (pi - pj).to(tl.float32) if EXPLICIT else (pi + shift - pj).to(tl.float32)
    return -tl.sum(tl.sum(g * (distance if SIGNED else tl.abs(distance)), 2), 1)


@triton.jit
def _profile_sums(
    g, Sums, heads, real, i0, j0, pi, pj, shift,
    Psi, psi_first, psi_last, PsiBounds, RowScale, row_first, row_last, RowBounds, Knots, num_knots, SegmentSlope,
    CLAMP: tl.constexpr, EXPLICIT: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BOUNDS_BLOCK: tl.constexpr, KNOTS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Adds the sums of g and of g * y on each segment to Sums [2, HEADS, W + 1]; returns the row scale's, [BLOCK_M]."""
    row_scale = row_scales(pi, shift, RowScale, row_first, row_last, EXPLICIT)
    low, high = segments(
        i0, j0, pi, pj, shift, row_scale, Psi, psi_first, psi_last, PsiBounds, row_first, row_last, RowBounds,
        Knots, num_knots, CLAMP, EXPLICIT, BLOCK_M, BLOCK_N, BOUNDS_BLOCK, KNOTS, NVIDIA,
    )  # fmt: skip
    psi = lookup(Psi, pi, pj, i0, j0, shift, psi_first, psi_last, 0, CLAMP, EXPLICIT, NVIDIA)
    y = psi * row_scale
    width = num_knots + 1
    slot = tl.arange(0, HEADS) * width
    total = tl.zeros([BLOCK_M], tl.float32)
    for m in range(low, high + 1):
        on = y == y
        if m > 0:
            on = on & (y > tl.load(Knots + m - 1))
        if m < num_knots:
            on = on & (y <= tl.load(Knots + m))
        part = tl.where(on, g, 0.0)
        # One program adds to these slots, in its own order.
        tl.atomic_add(Sums + slot + m, tl.sum(tl.sum(part, 2), 1), sem="relaxed")
        tl.atomic_add(Sums + HEADS * width + slot + m, tl.sum(tl.sum(part * y, 2), 1), sem="relaxed")
        slope = tl.where(real, tl.load(SegmentSlope + heads * width + m), 0.0)[:, None, None]
        total += tl.sum(tl.sum(part * psi * slope, 0), 1)
    return total


@triton.jit(do_not_specialize=RANDOM_BITS)
def mixed_backward_q(
    Q, K, V, GradOut, Lse2, Delta, DQ, DW1X, DW1B, DB1, DW2, DB2,
    DSlope, DRowScale, DSegments, DInnerSlope, DInnerRowScale, DInnerSegments,
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
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    CONCAT: tl.constexpr, RESIDUAL: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, TOP_LEFT: tl.constexpr,
    SIGNED: tl.constexpr, CLAMP: tl.constexpr, KNOTS: tl.constexpr,
    INNER_SIGNED: tl.constexpr, INNER_CLAMP: tl.constexpr, INNER_KNOTS: tl.constexpr,
    BOUNDS_BLOCK: tl.constexpr, PRECISION: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """DQ [B, H, Tq, D] contiguous. By program, zeroed, float32, None where not wanted: DW1X and DW1B [HEADS, WIDTH],
    DB1 [WIDTH], DW2 [WIDTH, HEADS], DB2 [HEADS], DSlope [HEADS], DSegments [2, HEADS, W + 1]. DRowScale [B, Tq]."""
    EXPLICIT: tl.constexpr = QPositions is not None
    blocks = tl.cdiv(q_max, BLOCK_M)
    pid = tl.program_id(0)
    i0 = (blocks - 1 - pid % blocks) * BLOCK_M
    b = pid // blocks
    q_start, k_start, q_len, k_len = sequence(KLengths, CuQ, CuK, b, q_tokens, k_tokens)
    if i0 >= q_len:
        return
    if CuQ is not None:
        b = b * 0
    b64 = b.to(tl.int64)
    heads = tl.minimum(tl.arange(0, HEADS), num_heads - 1).to(tl.int64)  # padded heads repeat the last one
    kv = heads // group
    shift = k_len - q_len
    offset = mask_offset(q_len, k_len, TOP_LEFT)
    w1x = weights_w1(W1X, HEADS, WIDTH)
    w1b = w1x
    if CONCAT:
        w1b = weights_w1(W1B, HEADS, WIDTH)
    b1 = tl.load(B1 + tl.arange(0, WIDTH))
    w2 = weights_w1(W2, WIDTH, HEADS)
    b2 = tl.load(B2 + tl.arange(0, HEADS))
    rows = tl.minimum(tl.arange(0, BLOCK_M), q_len - 1 - i0)
    row0 = (q_start + i0).to(tl.int64)
    q = load_heads(Q + b64 * stride_qb + row0 * stride_qm, heads, rows, stride_qh, stride_qm, D, BLOCK_D)
    do = load_heads(GradOut + b64 * stride_gb + row0 * stride_gm, heads, rows, stride_gh, stride_gm, DV, BLOCK_DV)
    stat = (b64 * num_heads + heads)[:, None] * q_tokens + row0 + rows[None, :]
    lse2 = tl.where((tl.arange(0, BLOCK_M) < q_len - i0)[None, :], tl.load(Lse2 + stat), float("inf"))
    delta = tl.load(Delta + stat)  # [HEADS, BLOCK_M]
    real = tl.arange(0, HEADS) < num_heads
    pi = (i0 + rows)[None, :, None]
    if EXPLICIT:
        pi = tl.load(QPositions + b64 * stride_qpos + row0 + rows)[None, :, None]
    dq = tl.zeros([HEADS, BLOCK_M, BLOCK_D], tl.float32)
    PARTS: tl.constexpr = BLOCK_M * BLOCK_N // 64
    dw1x = tl.zeros([PARTS, HEADS, WIDTH], tl.float32)
    dw1b = tl.zeros([PARTS, HEADS, WIDTH], tl.float32)
    dw2 = tl.zeros([PARTS, WIDTH, HEADS], tl.float32)
    db1 = tl.zeros([WIDTH], tl.float32)
    db2 = tl.zeros([HEADS], tl.float32)
    dslope = tl.zeros([HEADS], tl.float32)
    dinner_slope = tl.zeros([HEADS], tl.float32)
    drow = tl.zeros([BLOCK_M], tl.float32)
    dinner_row = tl.zeros([BLOCK_M], tl.float32)
    last = tl.minimum(i0 + BLOCK_M, q_len) - 1
    lo, _full_lo, _full_hi, hi = key_spans(i0, last, k_len, offset, left, right, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    for j0 in tl.range(lo, hi, BLOCK_N):
        cols = tl.maximum(tl.minimum(tl.arange(0, BLOCK_N), k_len - 1 - j0), -j0)
        col0 = (k_start + j0).to(tl.int64)
        k = load_heads(K + b64 * stride_kb + col0 * stride_kn, kv, cols, stride_kh, stride_kn, D, BLOCK_D)
        v = load_heads(V + b64 * stride_vb + col0 * stride_vn, kv, cols, stride_vh, stride_vn, DV, BLOCK_DV)
        pj = (j0 + cols)[None, None, :]
        if EXPLICIT:
            pj = tl.load(KPositions + b64 * stride_kpos + col0 + cols)[None, None, :]
        s, slack, x_rows, inner_rows, before = mixed_logits(
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
        if DW1X is not None:
            dbefore_rows = dbefore.to(q.dtype)
            hidden = tl.maximum(before, 0.01 * before).to(q.dtype)
            dw2 = _add_outer(dw2, hidden, ds_rows, PARTS, PRECISION)
            dw1x = _add_outer(dw1x, x_rows, dbefore_rows, PARTS, PRECISION)
            if CONCAT:
                dw1b = _add_outer(dw1b, inner_rows, dbefore_rows, PARTS, PRECISION)
            db1 += tl.sum(dbefore, 0)
            db2 += tl.sum(tl.sum(ds, 2), 1)
        if DSlope is not None:
            dslope += _slope_sums(ds, i0, j0, shift, pi, pj, SIGNED, EXPLICIT)
        if DSegments is not None:
            drow += _profile_sums(
                ds, DSegments + pid.to(tl.int64) * 2 * HEADS * (num_knots + 1), heads, real, i0, j0, pi, pj, shift,
                Psi, psi_first, psi_last, PsiBounds, RowScale, row_first, row_last, RowBounds,
                Knots, num_knots, SegmentSlope,
                CLAMP, EXPLICIT, HEADS, BLOCK_M, BLOCK_N, BOUNDS_BLOCK, KNOTS, NVIDIA,
            )  # fmt: skip
        if DInnerSlope is not None:
            db = inner_gradient(ds, dz, dbefore, w1b, BLOCK_M, BLOCK_N, HEADS, CONCAT, RESIDUAL, PRECISION)
            dinner_slope += _slope_sums(db, i0, j0, shift, pi, pj, INNER_SIGNED, EXPLICIT)
        if DInnerSegments is not None:
            db = inner_gradient(ds, dz, dbefore, w1b, BLOCK_M, BLOCK_N, HEADS, CONCAT, RESIDUAL, PRECISION)
            dinner_row += _profile_sums(
                db, DInnerSegments + pid.to(tl.int64) * 2 * HEADS * (inner_num_knots + 1), heads, real,
                i0, j0, pi, pj, shift,
                InnerPsi, inner_psi_first, inner_psi_last, InnerPsiBounds, InnerRowScale, inner_row_first,
                inner_row_last,
                InnerRowBounds, InnerKnots, inner_num_knots, InnerSegmentSlope,
                INNER_CLAMP, EXPLICIT, HEADS, BLOCK_M, BLOCK_N, BOUNDS_BLOCK, INNER_KNOTS, NVIDIA,
            )  # fmt: skip
        dx = (ds + tiles_of_heads(dz, BLOCK_M, BLOCK_N, HEADS)) * slack
        dq = tl.dot(dx.to(k.dtype), k, dq, input_precision=PRECISION)

    offs_h = tl.arange(0, HEADS)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)[None, None, :]
    inside = real[:, None, None] & (offs_m < q_len - i0)[None, :, None] & (offs_d < D)
    row = ((b64 * num_heads + offs_h)[:, None] * q_tokens + row0 + offs_m[None, :])[:, :, None]
    tl.store(DQ + row * D + offs_d, (dq * scale).to(DQ.dtype.element_ty), mask=inside)
    offs_w = tl.arange(0, WIDTH)
    pid64 = pid.to(tl.int64)
    if DW1X is not None:
        slot = pid64 * HEADS * WIDTH
        tl.store(DW1X + slot + offs_h[:, None] * WIDTH + offs_w[None, :], tl.sum(dw1x, 0))
        if CONCAT:
            tl.store(DW1B + slot + offs_h[:, None] * WIDTH + offs_w[None, :], tl.sum(dw1b, 0))
        tl.store(DW2 + slot + offs_w[:, None] * HEADS + offs_h[None, :], tl.sum(dw2, 0))
        tl.store(DB1 + pid64 * WIDTH + offs_w, db1)
        tl.store(DB2 + pid64 * HEADS + offs_h, db2)
    if DSlope is not None:
        tl.store(DSlope + pid64 * HEADS + offs_h, dslope)
    if DInnerSlope is not None:
        tl.store(DInnerSlope + pid64 * HEADS + offs_h, dinner_slope)
    out_row = b64 * q_tokens + row0 + offs_m
    if DSegments is not None:
        tl.store(DRowScale + out_row, drow, mask=offs_m < q_len - i0)
    if DInnerSegments is not None:
        tl.store(DInnerRowScale + out_row, dinner_row, mask=offs_m < q_len - i0)
