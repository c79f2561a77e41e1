"""HeadMix gradients of the keys and values: one program owns BLOCK_N keys of all heads and walks the queries."""

import triton
import triton.language as tl

from .dropout import RANDOM_BITS
from .masks import mask_offset, query_spans, sequence
from .mix import load_heads, rows_of_heads, tiles_of_heads
from .mix_scores import logit_gradients, mixed_logits, mlp_gradients, weights_w1


@triton.jit(do_not_specialize=RANDOM_BITS)
def mixed_backward_kv(
    Q, K, V, GradOut, Lse2, Delta, DK, DV_,
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
    """DK [B, Hq, Tk, D] and DV_ [B, Hq, Tk, DV] contiguous, by query head; one of them None where the accumulators of
    both do not fit in registers."""
    EXPLICIT: tl.constexpr = QPositions is not None
    blocks = tl.cdiv(k_max, BLOCK_N)
    pid = tl.program_id(0)
    j0 = (pid % blocks) * BLOCK_N
    b = pid // blocks
    q_start, k_start, q_len, k_len = sequence(KLengths, CuQ, CuK, b, q_tokens, k_tokens)
    if j0 >= k_len:
        return
    if CuQ is not None:
        b = b * 0
    b64 = b.to(tl.int64)
    heads = tl.minimum(tl.arange(0, HEADS), num_heads - 1).to(tl.int64)  # padded heads repeat the last one
    kv = heads // group
    k_len - q_len
    offset = mask_offset(q_len, k_len, TOP_LEFT)
    w1x = weights_w1(W1X, HEADS, WIDTH)
    w1b = w1x
    if CONCAT:
        w1b = weights_w1(W1B, HEADS, WIDTH)
    b1 = tl.load(B1 + tl.arange(0, WIDTH))
    w2 = weights_w1(W2, WIDTH, HEADS)
    b2 = tl.load(B2 + tl.arange(0, HEADS))
    cols = tl.maximum(tl.minimum(tl.arange(0, BLOCK_N), k_len - 1 - j0), -j0)
    col0 = (k_start + j0).to(tl.int64)
    k = load_heads(K + b64 * stride_kb + col0 * stride_kn, kv, cols, stride_kh, stride_kn, D, BLOCK_D)
    v = load_heads(V + b64 * stride_vb + col0 * stride_vn, kv, cols, stride_vh, stride_vn, DV, BLOCK_DV)
    dk = tl.zeros([HEADS, BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([HEADS, BLOCK_N, BLOCK_DV], tl.float32)
    last = tl.minimum(j0 + BLOCK_N, k_len) - 1
    lo, _full_lo, _full_hi, hi = query_spans(j0, last, q_len, offset, left, right, BLOCK_M, HAS_LEFT, HAS_RIGHT)
    for i0 in tl.range(lo, hi, BLOCK_M):
        rows = tl.minimum(tl.arange(0, BLOCK_M), q_len - 1 - i0)
        row0 = (q_start + i0).to(tl.int64)
        q = load_heads(Q + b64 * stride_qb + row0 * stride_qm, heads, rows, stride_qh, stride_qm, D, BLOCK_D)
        do = load_heads(GradOut + b64 * stride_gb + row0 * stride_gm, heads, rows, stride_gh, stride_gm, DV, BLOCK_DV)
        stat = (b64 * num_heads + heads)[:, None] * q_tokens + row0 + rows[None, :]
        lse2 = tl.where((tl.arange(0, BLOCK_M) < q_len - i0)[None, :], tl.load(Lse2 + stat), float("inf"))
        delta = tl.load(Delta + stat)  # [HEADS, BLOCK_M]
        s, slack, _x_rows, _inner_rows, before = mixed_logits(
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
        kept, ds = logit_gradients(
            s, lse2, delta, do, v, b, heads.to(tl.int32), num_heads, i0, j0, q_start, k_start,
            threshold, keep_scale, seed_lo, seed_hi, BLOCK_M, BLOCK_N, PRECISION,
        )  # fmt: skip
        ds_rows = rows_of_heads(ds.to(q.dtype), BLOCK_M, BLOCK_N, HEADS)
        _dbefore, dz = mlp_gradients(ds_rows, before, w1x, w2, PRECISION)
        if DV_ is not None:
            dv = tl.dot(tl.permute(kept.to(do.dtype), (0, 2, 1)), do, dv, input_precision=PRECISION)
        if DK is not None:
            dx = (ds + tiles_of_heads(dz, BLOCK_M, BLOCK_N, HEADS)) * slack
            dk = tl.dot(tl.permute(dx.to(q.dtype), (0, 2, 1)), q, dk, input_precision=PRECISION)

    offs_h = tl.arange(0, HEADS)
    offs_n = tl.arange(0, BLOCK_N)
    inside = (offs_h < num_heads)[:, None, None] & (offs_n < k_len - j0)[None, :, None]
    row = ((b64 * num_heads + offs_h)[:, None] * k_tokens + col0 + offs_n[None, :])[:, :, None]
    if DK is not None:
        offs_d = tl.arange(0, BLOCK_D)[None, None, :]
        tl.store(DK + row * D + offs_d, (dk * scale).to(DK.dtype.element_ty), mask=inside & (offs_d < D))
    if DV_ is not None:
        offs_d = tl.arange(0, BLOCK_DV)[None, None, :]
        tl.store(DV_ + row * DV + offs_d, dv.to(DV_.dtype.element_ty), mask=inside & (offs_d < DV))
