"""HeadMix attention forward: one program owns BLOCK_M queries of all heads, so the mixed logits never reach memory."""

import triton
import triton.language as tl

from ..common.bias import Operands
from ..common.dropout import RANDOM_BITS
from ..common.masks import key_spans
from ..common.scores import LN2, LOG2E, LOWEST
from .bias import group_tile, head_offsets, key_offsets, keys_exist, open_sequence, open_tile
from .layout import column_of, contracted, summed
from .mlp import load_weights
from .scores import Mix, head_groups, keep_heads, mixed_logits


@triton.jit
def _again(pointer, j0, NVIDIA: tl.constexpr):
    """The same pointer, as if it depended on j0: queries too many for the registers are loaded in every step."""
    if NVIDIA:
        zero = tl.inline_asm_elementwise("and.b32 $0, $1, 0;", "=r,r", [j0], tl.int32, is_pure=True, pack=1)
        return pointer + tl.multiple_of(zero, 16)
    else:
        return pointer


@triton.jit
def _both_halves(m, l, o):
    """Running maxima and sums [GROUP, M] and outputs [GROUP, M, D] of halves of the keys, as those of their heads."""
    H: tl.constexpr = m.shape[0] // 2
    M: tl.constexpr = m.shape[1]
    top = tl.max(tl.reshape(m, [2, H, M]), 0)
    alpha = tl.exp2(m - tl.reshape(tl.broadcast_to(top[None, :, :], [2, H, M]), [2 * H, M]))
    o = tl.sum(tl.reshape(o * alpha[:, :, None], [2, H, M, o.shape[2]]), 0)
    return top, tl.sum(tl.reshape(l * alpha, [2, H, M]), 0), o


@triton.jit
def _lane_sums(p):
    """Sums over keys [GROUP, M, 8], over those that one register of 8 neighbours holds: the last sum waits for the end,
    and 8 columns lie as products leave them."""
    return tl.sum(tl.reshape(p, [p.shape[0], p.shape[1], p.shape[2] // 8, 8]), 2)


@triton.jit(do_not_specialize=RANDOM_BITS)
def mixed_forward(
    Q, K, V, Out, Lse, Sinks, B2,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_ob, stride_oh, stride_om,
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
    W1X, W1B, B1, W2, Rows, rows_first,
    QPositions, stride_qpos, KPositions, stride_kpos,
    Boolean, stride_bb, stride_bh, stride_bi, stride_bj,
    KLengths, CuQ, CuK, left, right, threshold, keep_scale, seed_lo, seed_hi,
    FORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEADS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    PRECISION: tl.constexpr = FORM.precision
    blocks = tl.cdiv(q_max, BLOCK_M)
    pid = tl.program_id(0)
    GROUPS: tl.constexpr = FORM.groups
    GROUP: tl.constexpr = FORM.group
    BLOCK_DV: tl.constexpr = FORM.block_value_dim
    i0 = (blocks - 1 - pid % blocks) * BLOCK_M
    seq = open_sequence(
        pid // blocks, KLengths, CuQ, CuK, q_tokens, k_tokens,
        QPositions, stride_qpos, KPositions, stride_kpos, FORM.top_left,
    )  # fmt: skip
    if i0 >= seq.q_len:
        return
    outer = Operands(
        Slope, stride_slope_b, Table, stride_table_h, table_first, table_last,
        Psi, psi_first, psi_last, PsiBounds, RowScale, row_first, row_last, RowBounds,
        Knots, num_knots, SegmentSlope, SegmentIntercept, Dense, stride_db, stride_dh, stride_di, stride_dj,
    )  # fmt: skip
    inner = Operands(
        InnerSlope, inner_stride_slope_b, InnerTable, inner_stride_table_h, inner_table_first, inner_table_last,
        InnerPsi, inner_psi_first, inner_psi_last, InnerPsiBounds, InnerRowScale, inner_row_first, inner_row_last,
        InnerRowBounds, InnerKnots, inner_num_knots, InnerSegmentSlope, InnerSegmentIntercept,
        InnerDense, inner_stride_db, inner_stride_dh, inner_stride_di, inner_stride_dj,
    )  # fmt: skip
    mix = Mix(
        inner, outer, Rows, rows_first, scale, softcap, num_heads,
        Boolean, stride_bb, stride_bh, stride_bi, stride_bj, left, right,
        threshold, keep_scale, seed_lo, seed_hi,
    )  # fmt: skip
    w = load_weights(W1X, W1B, B1, W2, FORM, Rows is not None)
    b64 = seq.b.to(tl.int64)
    heads, kv = head_groups(num_heads, group, FORM)
    exist = (tl.arange(0, BLOCK_M) < seq.q_len - i0)[None, :]
    row0 = (seq.q_start + i0).to(tl.int64)
    q_base = Q + b64 * stride_qb + row0 * FORM.q_step
    k_base = K + b64 * stride_kb + seq.k_start.to(tl.int64) * FORM.k_step
    v_base = V + b64 * stride_vb + seq.k_start.to(tl.int64) * FORM.v_step
    q = ()
    m_i = ()
    l_i = ()
    acc = ()
    for g in tl.static_range(GROUPS):
        if FORM.keep_queries:
            offsets = head_offsets(heads[g], stride_qh, FORM)
            kept = contracted(q_base, offsets, exist, BLOCK_M, FORM.q_step, FORM.dim, FORM.block_dim)
            if FORM.scaled_queries:
                kept = (kept.to(tl.float32) * scale).to(kept.dtype)
            q += (tl.permute(kept, (0, 2, 1)),)
        m_i += (tl.full([GROUP, BLOCK_M], LOWEST, tl.float32),)
        l_i += (tl.zeros([GROUP, BLOCK_M, 8], tl.float32),)
        acc += (tl.zeros([GROUP, BLOCK_M, BLOCK_DV], tl.float32),)
    last = tl.minimum(i0 + BLOCK_M, seq.q_len) - 1
    lo, full_lo, full_hi, hi = key_spans(
        i0, last, seq.k_len, seq.offset, left, right, BLOCK_N, FORM.has_left, FORM.has_right
    )  # fmt: skip
    # Tiles inside the mask, then those on its border, left and right in one loop, since each loop is code.
    for INSIDE in tl.static_range(1, -1, -1):
        before = 0
        if INSIDE:
            steps = tl.maximum(full_hi - full_lo, 0) // BLOCK_N
        else:
            before = tl.cdiv(full_lo - lo, BLOCK_N)
            steps = before + tl.cdiv(tl.maximum(hi - full_hi, 0), BLOCK_N)
        for step in tl.range(0, steps):
            if INSIDE:
                j0 = full_lo + step * BLOCK_N
            else:
                j0 = tl.where(step < before, lo + step * BLOCK_N, full_hi + (step - before) * BLOCK_N)
            tile = open_tile(seq, i0, j0, BLOCK_M, BLOCK_N, INSIDE, FORM.explicit)
            k_tile = k_base + j0.to(tl.int64) * FORM.k_step
            v_tile = v_base + j0.to(tl.int64) * FORM.v_step
            q_again = _again(q_base, j0, NVIDIA)
            dots = ()
            for g in tl.static_range(GROUPS):
                if FORM.keep_queries:
                    queries = q[g]
                else:
                    offsets = head_offsets(heads[g], stride_qh, FORM)
                    queries = contracted(q_again, offsets, exist, BLOCK_M, FORM.q_step, FORM.dim, FORM.block_dim)
                    queries = tl.permute(queries, (0, 2, 1))
                own = group_tile(tile, seq, g, FORM, INSIDE)
                there = None if INSIDE else keys_exist(own, seq)
                offsets = key_offsets(kv[g], stride_kh, own, FORM.k_step, FORM)
                keys = contracted(k_tile, offsets, there, own.j.shape[2], FORM.k_step, FORM.dim, FORM.block_dim)
                dots += (tl.dot(queries, keys, input_precision=PRECISION),)
            s, _slack, _x_rows, _inner_rows, _before = mixed_logits(
                dots, tile, seq, heads, w, mix, FORM, FORM.scaled_queries, INSIDE, FORM.chunks, NVIDIA
            )
            m_next = ()
            l_next = ()
            acc_next = ()
            for g in tl.static_range(GROUPS):
                own = group_tile(tile, seq, g, FORM, INSIDE)
                m_new = tl.maximum(m_i[g], tl.max(s[g], 2) * LOG2E)
                p = tl.exp2(s[g] * LOG2E - m_new[:, :, None])
                alpha = tl.exp2(m_i[g] - m_new)
                l_next += (l_i[g] * alpha[:, :, None] + _lane_sums(p),)
                if threshold is not None:
                    p = tl.where(keep_heads(own, heads[g], mix), p, 0.0)
                there = None if INSIDE else keys_exist(own, seq)
                offsets = key_offsets(kv[g], stride_vh, own, FORM.v_step, FORM)
                values = summed(
                    v_tile, offsets, there, own.j.shape[2], FORM.v_step, FORM.value_dim, FORM.block_value_dim
                )
                scaled = acc[g] * alpha[:, :, None]
                acc_next += (tl.dot(p.to(values.dtype), values, scaled, input_precision=PRECISION),)
                m_next += (m_new,)
            m_i = m_next
            l_i = l_next
            acc = acc_next
    offs_m = tl.arange(0, BLOCK_M)
    column = column_of(tl.arange(0, FORM.block_value_dim), FORM.block_value_dim)
    o_base = Out + b64 * stride_ob + row0 * stride_om
    for g in tl.static_range(GROUPS):
        m = m_i[g]
        l = tl.sum(l_i[g], 2)
        o = acc[g]
        if FORM.halves and g == GROUPS - 1:
            m, l, o = _both_halves(m, l, o)
        offs_h = g * GROUP + tl.arange(0, m.shape[0])
        head = tl.minimum(offs_h, num_heads - 1).to(tl.int64)
        b2 = tl.load(B2 + head)[:, None]
        if Sinks is not None:
            sink = tl.load(Sinks + head)[:, None] * LOG2E - b2 * LOG2E
            m_new = tl.maximum(m, sink)
            alpha = tl.exp2(m - m_new)
            l = l * alpha + tl.exp2(sink - m_new)
            o = o * alpha[:, :, None]
            m = m_new
        empty = l == 0.0
        lse = tl.where(empty, float("-inf"), (m + tl.log2(l)) * LN2 + b2)
        out = o / tl.where(empty, 1.0, l)[:, :, None]
        if threshold is not None:
            out = out * keep_scale
        inside = (offs_h < num_heads)[:, None] & (offs_m < seq.q_len - i0)[None, :]
        at = head[:, None, None] * stride_oh + offs_m[None, :, None] * stride_om + column[None, None, :]
        tl.store(
            o_base + at,
            out.to(Out.dtype.element_ty),
            mask=inside[:, :, None] & (column < FORM.value_dim)[None, None, :],
        )
        stat = (b64 * num_heads + offs_h)[:, None] * q_tokens + row0 + offs_m[None, :]
        tl.store(Lse + stat, lse, mask=inside)
