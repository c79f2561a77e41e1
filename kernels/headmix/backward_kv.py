"""HeadMix gradients of the keys and values: one program owns BLOCK_N keys of all heads and walks the queries."""

import triton
import triton.language as tl

from ..common.bias import Operands
from ..common.dropout import RANDOM_BITS
from ..common.masks import query_spans
from .backward_step import open_tensors, score_gradients
from .bias import head_offsets, open_sequence, open_tile, queries_exist
from .layout import column_of, summed
from .mlp import load_weights
from .scores import Mix, head_groups, input_gradient, mlp_gradient


@triton.jit
def _transposed_product(a, b, acc, PRECISION: tl.constexpr):
    return tl.dot(tl.permute(a.to(b.dtype), (0, 2, 1)), b, acc, input_precision=PRECISION)


@triton.jit
def _store(Target, acc, offs_h, num_heads, tokens, row0, count, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows row0 .. row0 + count of [H, tokens, D]."""
    offs_n = tl.arange(0, acc.shape[1])
    column = column_of(tl.arange(0, BLOCK_D), BLOCK_D)[None, None, :]
    inside = (offs_h < num_heads)[:, None, None] & (offs_n < count)[None, :, None] & (column < D)
    row = (offs_h.to(tl.int64)[:, None] * tokens + row0 + offs_n[None, :])[:, :, None]
    tl.store(Target + row * D + column, acc.to(Target.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=RANDOM_BITS)
def mixed_backward_kv(
    Q, K, V, GradOut, Lse2, Delta, DK, DV_,
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
    """DK [B, Hq, Tk, D] or DV_ [B, Hq, Tk, DV], contiguous, by query head; the other is None, as the accumulators of
    both do not fit in registers."""
    PRECISION: tl.constexpr = FORM.precision
    blocks = tl.cdiv(k_max, BLOCK_N)
    pid = tl.program_id(0)
    GROUPS: tl.constexpr = FORM.groups
    GROUP: tl.constexpr = FORM.group
    j0 = (pid % blocks) * BLOCK_N
    seq = open_sequence(
        pid // blocks, KLengths, CuQ, CuK, q_tokens, k_tokens,
        QPositions, stride_qpos, KPositions, stride_kpos, FORM.top_left,
    )  # fmt: skip
    if j0 >= seq.k_len:
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
    WIDE: tl.constexpr = FORM.block_dim if DV_ is None else FORM.block_value_dim
    acc = ()
    for _ in tl.static_range(GROUPS):
        acc += (tl.zeros([GROUP, BLOCK_N, WIDE], tl.float32),)
    last = tl.minimum(j0 + BLOCK_N, seq.k_len) - 1
    lo, _full_lo, _full_hi, hi = query_spans(
        j0, last, seq.q_len, seq.offset, left, right, BLOCK_M, FORM.has_left, FORM.has_right
    )  # fmt: skip
    for i0 in tl.range(lo, hi, BLOCK_M):
        tile = open_tile(seq, i0, j0, BLOCK_M, BLOCK_N, False, FORM.explicit)
        weights, ds, slack, _x_rows, _inner_rows, before = score_gradients(
            x, tile, seq, heads, kv, w, mix, FORM, DV_ is None, NVIDIA
        )  # fmt: skip
        i64 = i0.to(tl.int64)
        added = ()
        if DV_ is not None:
            for g in tl.static_range(GROUPS):
                do = summed(
                    x.do + i64 * FORM.grad_step,
                    head_offsets(heads[g], stride_gh, FORM),
                    queries_exist(tile, seq),
                    BLOCK_M,
                    FORM.grad_step,
                    FORM.value_dim,
                    FORM.block_value_dim,
                )
                added += (_transposed_product(weights[g], do, acc[g], PRECISION),)
        else:
            _ds_rows, dbefore = mlp_gradient(ds, before, w, FORM)
            dx = input_gradient(ds, dbefore, w.w1x, tile, FORM, True)
            for g in tl.static_range(GROUPS):
                q = summed(
                    x.q + i64 * FORM.q_step,
                    head_offsets(heads[g], stride_qh, FORM),
                    queries_exist(tile, seq),
                    BLOCK_M,
                    FORM.q_step,
                    FORM.dim,
                    FORM.block_dim,
                )
                added += (_transposed_product(dx[g] * slack[g], q, acc[g], PRECISION),)
        acc = added

    for g in tl.static_range(GROUPS):
        offs_h = g * FORM.group + tl.arange(0, FORM.group)
        first = seq.b.to(tl.int64) * num_heads * k_tokens
        row0 = seq.k_start + j0
        if DV_ is not None:
            _store(
                DV_ + first * FORM.value_dim,
                acc[g],
                offs_h,
                num_heads,
                k_tokens,
                row0,
                seq.k_len - j0,
                FORM.value_dim,
                FORM.block_value_dim,
            )
        else:
            _store(
                DK + first * FORM.dim,
                acc[g] * scale,
                offs_h,
                num_heads,
                k_tokens,
                row0,
                seq.k_len - j0,
                FORM.dim,
                FORM.block_dim,
            )
