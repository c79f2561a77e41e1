"""Attention forward: flash tiling with online softmax, every operand of a plan but HeadMix added on the tile.

One program owns BLOCK_M queries of one head and walks its keys in three spans (masks.py). With SPLITS > 1 it walks
its share of them and leaves a partial output for combine.py. Logits are kept in natural units where anything is added
to them; else the scale is folded into the exponent (natural false), which saves a multiply an element.
"""

import triton
import triton.language as tl

from ..common.bias import Operands, Place
from ..common.codegen import hidden
from ..common.dropout import RANDOM_BITS, Dropout, keep_tile
from ..common.masks import Mask, key_spans, mask_offset, sequence
from ..common.profile import next_line, no_line, row_scales
from ..common.rotary import load_turned
from ..common.scores import LN2, LOG2E, LOWEST, load_rows, logits_tile, start_logits


@triton.jit(do_not_specialize=RANDOM_BITS)
def attention_forward(
    Q, K, V, Out, Lse, Sinks,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_os, stride_ob, stride_oh, stride_om, stride_ls,
    scale, softcap, num_heads, group, q_tokens, q_max, k_tokens, split_tiles,
    Slope, stride_slope_b, Table, stride_table_h, table_first, table_last,
    Psi, psi_first, psi_last, PsiBounds, RowScale, row_first, row_last, RowBounds,
    Knots, num_knots, SegmentSlope, SegmentIntercept,
    Dense, stride_db, stride_dh, stride_di, stride_dj,
    QCos, QSin, stride_q_angle, KCos, KSin, stride_k_angle,
    QPositions, stride_qpos, KPositions, stride_kpos,
    Boolean, stride_bb, stride_bh, stride_bi, stride_bj,
    KLengths, CuQ, CuK, left, right, threshold, keep_scale, seed_lo, seed_hi,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    SPLITS: tl.constexpr, FORM: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    PRECISION: tl.constexpr = FORM.precision
    PACKED: tl.constexpr = CuQ is not None
    blocks = tl.cdiv(q_max, BLOCK_M)
    pid = tl.program_id(0)
    i0 = (blocks - 1 - pid % blocks) * BLOCK_M  # the longest rows of a causal head first
    bh = pid // blocks
    h = bh % num_heads
    b = bh // num_heads
    q_start, k_start, q_len, k_len = sequence(KLengths, CuQ, CuK, b, q_tokens, k_tokens)
    if i0 >= q_len:
        return
    if PACKED:
        b = b * 0
    b64 = b.to(tl.int64)
    h64 = h.to(tl.int64)
    kv64 = (h // group).to(tl.int64)
    shift = k_len - q_len
    offset = mask_offset(q_len, k_len, FORM.top_left)
    o = Operands(
        Slope, stride_slope_b, Table, stride_table_h, table_first, table_last,
        Psi, psi_first, psi_last, PsiBounds, RowScale, row_first, row_last, RowBounds,
        Knots, num_knots, SegmentSlope, SegmentIntercept, Dense, stride_db, stride_dh, stride_di, stride_dj,
    )  # fmt: skip
    mask = Mask(k_len, offset, left, right, Boolean, stride_bb, stride_bh, stride_bi, stride_bj)
    dropout = Dropout(threshold, keep_scale, seed_lo, seed_hi)
    last = tl.minimum(i0 + BLOCK_M, q_len) - 1

    rows = tl.minimum(tl.arange(0, BLOCK_M), q_len - 1 - i0)  # past the end: the last row again, never stored
    i = (i0 + tl.arange(0, BLOCK_M))[:, None]  # [BLOCK_M, 1]
    i_in = (i0 + rows)[:, None]
    row0 = (q_start + i0).to(tl.int64)
    q_base = Q + b64 * stride_qb + h64 * stride_qh + row0 * stride_qm
    if QCos is not None:
        angle = b64 * stride_q_angle + row0 * HALF
        turned = load_turned(q_base, rows, stride_qm, QCos + angle, QSin + angle, HALF, D, BLOCK_D, INTERLEAVED, 1)
        q = turned.to(Q.dtype.element_ty)
    else:
        q = load_rows(q_base, rows, stride_qm, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    k_base = K + b64 * stride_kb + kv64 * stride_kh
    v_base = V + b64 * stride_vb + kv64 * stride_vh
    if PACKED:
        k_base += k_start.to(tl.int64) * stride_kn
        v_base += k_start.to(tl.int64) * stride_vn

    slope = None
    if Slope is not None:
        slope = tl.load(Slope + b * stride_slope_b + h)
    pi = i_in
    if FORM.explicit:
        pi = tl.load(QPositions + b64 * stride_qpos + row0 + rows)[:, None]
    row_scale = None
    if Psi is not None:
        row_scale = tl.load(row_scales(pi, shift, o, FORM.explicit))

    line = no_line()
    high = line.segment
    m_i = tl.full([BLOCK_M], LOWEST, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    factor = LOG2E if FORM.natural else scale * LOG2E

    lo, full_lo, full_hi, hi = key_spans(i0, last, k_len, offset, left, right, BLOCK_N, FORM.has_left, FORM.has_right)
    share_lo = 0
    share_hi = k_len
    if SPLITS > 1:
        share_lo = tl.program_id(1) * split_tiles * BLOCK_N
        share_hi = tl.minimum(share_lo + split_tiles * BLOCK_N, k_len)
    for span in tl.static_range(0, 3):
        if span != 0 or FORM.has_left:
            if span == 0:
                span_lo, span_hi = lo, full_lo
            elif span == 1:
                span_lo, span_hi = full_lo, full_hi
            else:
                span_lo, span_hi = full_hi, hi
            if SPLITS > 1:
                span_lo = tl.maximum(span_lo, share_lo)
                span_hi = tl.minimum(span_hi, share_hi)
            for j_loop in tl.range(span_lo, span_hi, BLOCK_N):
                j0 = hidden(j_loop, NVIDIA and Dense is None)
                cols = tl.arange(0, BLOCK_N)
                if span != 1:
                    cols = tl.minimum(cols, k_len - 1 - j0)
                j = (j0 + tl.arange(0, BLOCK_N))[None, :]
                j_in = (j0 + cols)[None, :]
                col0 = tl.cast(j0, tl.int64)
                k_tile = k_base + col0 * stride_kn
                if KCos is not None:
                    k_angle = b64 * stride_k_angle + (k_start + col0) * HALF
                    k_turned = load_turned(
                        k_tile, cols, stride_kn, KCos + k_angle, KSin + k_angle, HALF, D, BLOCK_D, INTERLEAVED, 1
                    )
                    k = k_turned.to(K.dtype.element_ty)
                else:
                    k = load_rows(k_tile, cols, stride_kn, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
                pj = j_in
                if FORM.explicit:
                    pj = tl.load(KPositions + b64 * stride_kpos + k_start + col0 + cols)[None, :]
                t = Place(b, h, q_start, k_start, i0, j0, shift, i, j, i_in, j_in, pi, pj)
                if Psi is not None:
                    line, high = next_line(line, t, row_scale, o, BLOCK_N, FORM, NVIDIA)
                s = start_logits(t, o, BLOCK_M, BLOCK_N, FORM, NVIDIA)
                s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
                s, _ = logits_tile(
                    s, line, high, t, o, mask, slope, j0, row_scale, scale, softcap, span != 1, FORM, NVIDIA
                )
                # What a tile's logits share is added to what is one number a row: the intercept of a profile's line,
                # and a slope's bias of the tile's first key.
                level = 0.0
                if FORM.linear:
                    level = slope * LOG2E * (j0 - i0 - shift).to(tl.float32)
                if Psi is not None:
                    level += line.intercept * LOG2E
                m_new = tl.maximum(m_i, tl.max(s, 1) * factor + level)
                p = tl.exp2(s * factor - (m_new - level)[:, None])
                alpha = tl.exp2(m_i - m_new)
                l_i = l_i * alpha + tl.sum(p, 1)
                acc = acc * alpha[:, None]
                if threshold is not None:
                    keep = keep_tile(dropout, t, num_heads, BLOCK_M, BLOCK_N, not PACKED)
                    p = tl.where(keep, p, 0.0)
                v = load_rows(v_base + col0 * stride_vn, cols, stride_vn, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
                m_i = m_new

    if FORM.linear:
        # The part of the bias that is constant along a row, left out above.
        m_i = tl.where(l_i > 0.0, m_i - slope * tl.arange(0, BLOCK_M).to(tl.float32) * LOG2E, m_i)
    if Sinks is not None:
        if SPLITS == 1:
            sink = tl.load(Sinks + h) * LOG2E
            m_new = tl.maximum(m_i, sink)
            alpha = tl.exp2(m_i - m_new)
            l_i = l_i * alpha + tl.exp2(sink - m_new)
            acc = acc * alpha[:, None]
            m_i = m_new
    empty = l_i == 0.0
    lse = tl.where(empty, float("-inf"), (m_i + tl.log2(l_i)) * LN2)
    out = acc / tl.where(empty, 1.0, l_i)[:, None]
    if threshold is not None:
        out = out * keep_scale

    offs_d = tl.arange(0, BLOCK_DV)
    split64 = tl.program_id(1).to(tl.int64)
    o_base = Out + split64 * stride_os + b64 * stride_ob + h64 * stride_oh + row0 * stride_om
    inside = tl.arange(0, BLOCK_M) < q_len - i0
    stored = inside[:, None]
    if DV != BLOCK_DV:
        stored = stored & (offs_d < DV)[None, :]
    tl.store(
        o_base + tl.arange(0, BLOCK_M)[:, None] * stride_om + offs_d[None, :],
        out.to(Out.dtype.element_ty),
        mask=stored,
    )
    lse_base = Lse + split64 * stride_ls + (b64 * num_heads + h64) * q_tokens + row0
    tl.store(lse_base + tl.arange(0, BLOCK_M), lse, mask=inside)
