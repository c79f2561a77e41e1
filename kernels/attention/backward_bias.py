"""Gradients of dense biases and, for explicit positions, of tables and psi.

A program owns one tile and walks the batches and heads that share the bias. Where tiles share entries too, of a bias
that broadcasts over queries or keys (one sum a row or column of the tile) or of a table that explicit positions index
(no two elements of a tile need share one), they are added by atomics: of integers, in units so small that nothing is
lost, since sums of integers do not depend on their order.
"""

import triton
import triton.language as tl

from ..common.bias import Operands
from ..common.dropout import RANDOM_BITS, Dropout
from ..common.masks import Mask, mask_offset, sequence
from .logit_gradient import Tensors, logit_gradient, place_tile
from .profile_gradient import past_knots, psi_gradient


@triton.jit(do_not_specialize=RANDOM_BITS)
def gradient_by_tile(
    Q, K, V, GradOut, Lse2, Delta, DDense, DSums, stride_gdb, stride_gdh, out_heads, batches_each, heads_each,
    DTable, DPsi, SumUnits, TableUnits, PsiUnits, num_sequences,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm,
    scale, softcap, num_heads, group, q_tokens, q_max, k_tokens, k_max,
    Slope, stride_slope_b, Table, stride_table_h, table_first, table_last,
    Psi, psi_first, psi_last, PsiBounds, RowScale, row_first, row_last, RowBounds,
    Knots, num_knots, SegmentSlope, SegmentIntercept,
    Dense, stride_db, stride_dh, stride_di, stride_dj,
    QPositions, stride_qpos, KPositions, stride_kpos,
    Boolean, stride_bb, stride_bh, stride_bi, stride_bj,
    KLengths, CuQ, CuK, left, right, threshold, keep_scale, seed_lo, seed_hi,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    OVER_QUERIES: tl.constexpr, FORM: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """DDense [1 or B, 1 or H, Tq, Tk] float32: the sum over the batches and heads that share an element (batches_each
    and heads_each of them). It comes zeroed where documents are packed, and one program has one document.

    In int64 and zeroed, and times units that are powers of 2: DSums [1 or B, 1 or H, Tk], the sum over queries too if
    OVER_QUERIES, else [.., Tq], over keys; DTable [H, L] and DPsi [L], explicit positions' gradients. Units are [1]."""
    x = Tensors(
        Q, K, V, GradOut, Lse2, Delta, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
        stride_vb, stride_vh, stride_vn, stride_gb, stride_gh, stride_gm,
    )  # fmt: skip
    o = Operands(
        Slope, stride_slope_b, Table, stride_table_h, table_first, table_last,
        Psi, psi_first, psi_last, PsiBounds, RowScale, row_first, row_last, RowBounds,
        Knots, num_knots, SegmentSlope, SegmentIntercept, Dense, stride_db, stride_dh, stride_di, stride_dj,
    )  # fmt: skip
    dropout = Dropout(threshold, keep_scale, seed_lo, seed_hi)
    blocks_m = tl.cdiv(q_max, BLOCK_M)
    blocks_n = tl.cdiv(k_max, BLOCK_N)
    pid = tl.program_id(0)
    i0 = (pid % blocks_m) * BLOCK_M
    j0 = (pid // blocks_m % blocks_n) * BLOCK_N
    head = pid // blocks_m // blocks_n % out_heads
    first = pid // blocks_m // blocks_n // out_heads
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    q_start, k_start, q_len, k_len = sequence(KLengths, CuQ, CuK, first, q_tokens, k_tokens)
    for n in range(batches_each * heads_each):
        index = first + n // heads_each
        h = head + n % heads_each
        q_start, k_start, q_len, k_len = sequence(KLengths, CuQ, CuK, index, q_tokens, k_tokens)
        b = index if CuQ is None else index * 0
        offset = mask_offset(q_len, k_len, FORM.top_left)
        seen = (i0 < q_len) & (j0 < k_len)
        if FORM.has_right:
            seen = seen & (j0 <= i0 + (BLOCK_M - 1) + offset + right)
        if FORM.has_left:
            seen = seen & (j0 + (BLOCK_N - 1) >= i0 + offset - left)
        if seen:
            t = place_tile(
                b, h, i0, j0, q_start, k_start, q_len, k_len, QPositions, stride_qpos, KPositions, stride_kpos,
                BLOCK_M, BLOCK_N, FORM,
            )  # fmt: skip
            mask = Mask(k_len, offset, left, right, Boolean, stride_bb, stride_bh, stride_bi, stride_bj)
            ds, row_scale, line, high = logit_gradient(
                x, t, o, mask, dropout, q_len, scale, softcap, num_heads, group, q_tokens,
                D, BLOCK_D, DV, BLOCK_DV, FORM, NVIDIA,
            )  # fmt: skip
            acc += ds
            if DTable is not None:
                units = (ds * tl.load(TableUnits)).to(tl.int64)
                entry = tl.minimum(tl.maximum(t.pi - t.pj, table_first), table_last) - table_first
                tl.atomic_add(DTable + h.to(tl.int64) * stride_table_h + entry, units, sem="relaxed")
            if DPsi is not None:
                dpsi = psi_gradient(ds, line, row_scale)
                if high > line.segment:
                    dpsi = past_knots(ds, dpsi, line, high, None, q_len, t, row_scale, o, 0, FORM, NVIDIA)
                entry = tl.minimum(tl.maximum(t.pi - t.pj, psi_first), psi_last) - psi_first
                units = (dpsi * tl.load(PsiUnits)).to(tl.int64)
                tl.atomic_add(DPsi + entry, units, sem="relaxed")
    b_out = first if CuQ is None else first * 0
    i = i0 + tl.arange(0, BLOCK_M)
    j = j0 + tl.arange(0, BLOCK_N)
    row_in = i < (q_len if CuQ is not None else q_tokens)
    column_in = j < (k_len if CuQ is not None else k_tokens)
    shared = b_out.to(tl.int64) * stride_gdb + head.to(tl.int64) * stride_gdh
    if DDense is not None:
        at = (q_start + i).to(tl.int64)[:, None] * k_tokens + (k_start + j)[None, :]
        tl.store(DDense + shared + at, acc, mask=row_in[:, None] & column_in[None, :])
    if DSums is not None:
        if OVER_QUERIES:
            sums = (tl.sum(acc, 0) * tl.load(SumUnits)).to(tl.int64)
            tl.atomic_add(DSums + shared + k_start + j, sums, mask=column_in, sem="relaxed")
        else:
            sums = (tl.sum(acc, 1) * tl.load(SumUnits)).to(tl.int64)
            tl.atomic_add(DSums + shared + q_start + i, sums, mask=row_in, sem="relaxed")
