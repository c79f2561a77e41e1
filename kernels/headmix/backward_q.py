"""HeadMix gradients of the queries, of the MLP, and of what adds up along rows (slopes, row scales, profile lines).

One program owns BLOCK_M queries of all heads and walks their keys. Its share of every parameter's gradient goes to a
slot of its own, which the host adds up: O(N) memory, no atomic between programs, a fixed order.
"""

import triton
import triton.language as tl

from ..common.bias import Operands
from ..common.dropout import RANDOM_BITS
from ..common.masks import key_spans
from .backward_step import open_tensors, score_gradients
from .bias import head_offsets, keys_exist, open_sequence, open_tile
from .layout import column_of, summed
from .mlp import leaky, load_weights, operand_order
from .scores import Mix, head_groups, input_gradient, mlp_gradient
from .sums import add_outer, profile_sums, slope_sums


@triton.jit(do_not_specialize=RANDOM_BITS)
def mixed_backward_q(
    Q, K, V, GradOut, Lse2, Delta, DQ, DW1X, DW1B, DB1, DW2,
    DSlope, DRowScale, DSegments, DInnerSlope, DInnerRowScale, DInnerSegments,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_gb, stride_gh,
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
    """DQ [B, H, Tq, D] contiguous. By block of queries (operands.all_blocks), zeroed, float32: DW1X and DW1B
    [HEADS, WIDTH], DB1 [WIDTH], DW2 [HEADS, WIDTH], DSlope [HEADS], DSegments [2, HEADS, W + 1]. DRowScale [B, Tq].
    What is None is not computed; the registers hold either DQ's rows or the sums of the MLP's gradients."""
    PRECISION: tl.constexpr = FORM.precision
    blocks = tl.cdiv(q_max, BLOCK_M)
    pid = tl.program_id(0)
    GROUPS: tl.constexpr = FORM.groups
    GROUP: tl.constexpr = FORM.group
    INNER: tl.constexpr = FORM.inner
    OUTER: tl.constexpr = FORM.outer
    WIDTH: tl.constexpr = FORM.width
    BLOCK_D: tl.constexpr = FORM.block_dim
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
    x = open_tensors(
        seq, Q, K, V, GradOut, Lse2, Delta,
        stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_gb, stride_gh, num_heads, q_tokens,
        FORM,
    )  # fmt: skip
    w = load_weights(W1X, W1B, B1, W2, FORM, Rows is not None)
    heads, kv = head_groups(num_heads, group, FORM)
    PARTS: tl.constexpr = FORM.group
    dw1x = tl.zeros([PARTS, HEADS, WIDTH], tl.float32)
    dw1b = tl.zeros([PARTS, HEADS, WIDTH], tl.float32)
    dw2 = tl.zeros([PARTS, HEADS, WIDTH], tl.float32)
    db1 = tl.zeros([WIDTH], tl.float32)
    drow = tl.zeros([BLOCK_M], tl.float32)
    dinner_row = tl.zeros([BLOCK_M], tl.float32)
    dq = ()
    dslope = ()
    dinner_slope = ()
    for _ in tl.static_range(GROUPS):
        if DQ is not None:
            dq += (tl.zeros([GROUP, BLOCK_M, BLOCK_D], tl.float32),)
        dslope += (tl.zeros([GROUP], tl.float32),)
        dinner_slope += (tl.zeros([GROUP], tl.float32),)
    # Packed documents are numbered by tokens: one may be far longer than the others.
    earlier = seq.q_start // BLOCK_M + pid // blocks if CuQ is not None else pid // blocks * blocks
    slot = (earlier + i0 // BLOCK_M).to(tl.int64)
    last = tl.minimum(i0 + BLOCK_M, seq.q_len) - 1
    lo, _full_lo, _full_hi, hi = key_spans(
        i0, last, seq.k_len, seq.offset, left, right, BLOCK_N, FORM.has_left, FORM.has_right
    )  # fmt: skip
    for j0 in tl.range(lo, hi, BLOCK_N):
        tile = open_tile(seq, i0, j0, BLOCK_M, BLOCK_N, False, FORM.explicit)
        _weights, ds, slack, x_rows, inner_rows, before = score_gradients(
            x, tile, seq, heads, kv, w, mix, FORM, True, NVIDIA
        )  # fmt: skip
        ds_rows, dbefore = mlp_gradient(ds, before, w, FORM)
        if DW1X is not None:
            dbefore_rows = dbefore.to(Q.dtype.element_ty)
            dw2 = add_outer(dw2, ds_rows, leaky(before, Q.dtype.element_ty, NVIDIA), PRECISION)
            dw1x = add_outer(dw1x, x_rows, dbefore_rows, PRECISION)
            if FORM.concat:
                dw1b = add_outer(dw1b, tl.permute(inner_rows, (1, 0)), dbefore_rows, PRECISION)
            if DB1 is not None:
                db1 += tl.sum(dbefore, 0)
        if DSlope is not None:
            dslope = slope_sums(dslope, ds, tile, FORM.outer.signed, FORM.explicit)
        if DSegments is not None:
            at = DSegments + slot * 2 * HEADS * (num_knots + 1)
            drow += profile_sums(ds, at, heads, num_heads, tile, outer, OUTER, FORM, NVIDIA)
        if DInnerSlope is not None or DInnerSegments is not None:
            weights_of_inner = w.w1b if FORM.concat else w.w1x
            db = input_gradient(ds, dbefore, weights_of_inner, tile, FORM, FORM.residual)
            if DInnerSlope is not None:
                dinner_slope = slope_sums(dinner_slope, db, tile, FORM.inner.signed, FORM.explicit)
            if DInnerSegments is not None:
                at = DInnerSegments + slot * 2 * HEADS * (inner_num_knots + 1)
                dinner_row += profile_sums(db, at, heads, num_heads, tile, inner, INNER, FORM, NVIDIA)
        if DQ is not None:
            dx = input_gradient(ds, dbefore, w.w1x, tile, FORM, True)
            added = ()
            for g in tl.static_range(GROUPS):
                k = summed(
                    x.k + j0.to(tl.int64) * FORM.k_step,
                    head_offsets(kv[g], stride_kh, FORM),
                    keys_exist(tile, seq),
                    BLOCK_N,
                    FORM.k_step,
                    FORM.dim,
                    FORM.block_dim,
                )
                added += (tl.dot((dx[g] * slack[g]).to(k.dtype), k, dq[g], input_precision=PRECISION),)
            dq = added

    offs_m = tl.arange(0, BLOCK_M)
    offs_w = tl.arange(0, FORM.width)
    offs_h = tl.arange(0, HEADS)
    b64 = seq.b.to(tl.int64)
    out_row = seq.q_start + i0 + offs_m
    exists = offs_m < seq.q_len - i0
    for g in tl.static_range(GROUPS):
        own = g * FORM.group + tl.arange(0, FORM.group)
        if DQ is not None:
            column = column_of(tl.arange(0, FORM.block_dim), FORM.block_dim)[None, None, :]
            inside = (own < num_heads)[:, None, None] & exists[None, :, None] & (column < FORM.dim)
            row = ((b64 * num_heads + own)[:, None] * q_tokens + out_row[None, :])[:, :, None]
            tl.store(DQ + row * FORM.dim + column, (dq[g] * scale).to(DQ.dtype.element_ty), mask=inside)
        if DSlope is not None:
            tl.store(DSlope + slot * HEADS + own, dslope[g])
        if DInnerSlope is not None:
            tl.store(DInnerSlope + slot * HEADS + own, dinner_slope[g])
    if DW1X is not None:
        at = slot * HEADS * FORM.width + offs_h[:, None] * FORM.width + offs_w[None, :]
        tl.store(DW1X + at, tl.sum(dw1x, 0))
        if FORM.concat:
            order = operand_order(HEADS) if Rows is not None else offs_h
            at_inner = slot * HEADS * FORM.width + order[:, None] * FORM.width + offs_w[None, :]
            tl.store(DW1B + at_inner, tl.sum(dw1b, 0))
        tl.store(DW2 + at, tl.sum(dw2, 0))
        if DB1 is not None:
            tl.store(DB1 + slot * FORM.width + offs_w, db1)
    if DSegments is not None:
        tl.store(DRowScale + b64 * q_tokens + out_row, drow, mask=exists)
    if DInnerSegments is not None:
        tl.store(DInnerRowScale + b64 * q_tokens + out_row, dinner_row, mask=exists)
