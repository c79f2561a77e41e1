"""HeadMix attention forward: one program owns BLOCK_M queries of all heads.

The heads' logits of a tile meet in registers, [HEADS, BLOCK_M, BLOCK_N], so the mixed logits never reach memory.
"""

import triton
import triton.language as tl

from .dropout import RANDOM_BITS
from .masks import key_spans, mask_offset, sequence
from .mix import load_heads
from .mix_scores import keep_heads, mixed_logits, weights_w1
from .scores import LN2, LOG2E, LOWEST


@triton.jit(do_not_specialize=RANDOM_BITS)
def mixed_forward(
    Q, K, V, Out, Lse, Sinks,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om,
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
    k_len - q_len
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
    m_i = tl.full([HEADS, BLOCK_M], LOWEST, tl.float32)
    l_i = tl.zeros([HEADS, BLOCK_M], tl.float32)
    acc = tl.zeros([HEADS, BLOCK_M, BLOCK_DV], tl.float32)
    last = tl.minimum(i0 + BLOCK_M, q_len) - 1
    lo, _full_lo, _full_hi, hi = key_spans(i0, last, k_len, offset, left, right, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    for j0 in tl.range(lo, hi, BLOCK_N):
        cols = tl.minimum(tl.arange(0, BLOCK_N), k_len - 1 - j0)
        col0 = (k_start + j0).to(tl.int64)
        k = load_heads(K + b64 * stride_kb + col0 * stride_kn, kv, cols, stride_kh, stride_kn, D, BLOCK_D)
        s, _slack, _x_rows, _inner_rows, _before = mixed_logits(
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
        m_new = tl.maximum(m_i, tl.max(s, 2) * LOG2E)
        p = tl.exp2(s * LOG2E - m_new[:, :, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 2)
        acc = acc * alpha[:, :, None]
        if threshold is not None:
            keep = keep_heads(
                seed_lo, seed_hi, threshold, q_start + i0, k_start + j0, b * num_heads + heads.to(tl.int32),
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
            p = tl.where(keep, p, 0.0)
        v = load_heads(V + b64 * stride_vb + col0 * stride_vn, kv, cols, stride_vh, stride_vn, DV, BLOCK_DV)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        m_i = m_new
    if Sinks is not None:
        sink = (tl.load(Sinks + heads) * LOG2E)[:, None]
        m_new = tl.maximum(m_i, sink)
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.exp2(sink - m_new)
        acc = acc * alpha[:, :, None]
        m_i = m_new
    empty = l_i == 0.0
    lse = tl.where(empty, float("-inf"), (m_i + tl.log2(l_i)) * LN2)
    out = acc / tl.where(empty, 1.0, l_i)[:, :, None]
    if threshold is not None:
        out = out * keep_scale
    offs_h = tl.arange(0, HEADS)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_DV)
    inside = (offs_h < num_heads)[:, None] & (offs_m < q_len - i0)[None, :]
    o_base = Out + b64 * stride_ob + row0 * stride_om
    offs = offs_h.to(tl.int64)[:, None, None] * stride_oh + offs_m[None, :, None] * stride_om + offs_d[None, None, :]
    tl.store(o_base + offs, out.to(Out.dtype.element_ty), mask=inside[:, :, None] & (offs_d < DV)[None, None, :])
    stat = (b64 * num_heads + offs_h)[:, None] * q_tokens + row0 + offs_m[None, :]
    tl.store(Lse + stat, lse, mask=inside)
