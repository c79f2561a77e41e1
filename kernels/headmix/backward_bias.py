"""HeadMix gradients of what is indexed by distance or by (i, j), in the inner bias or the outer one.

As in attention/backward_bias.py: a program walks the tiles of one diagonal (tables, psi) or the batches that share a
tile (dense biases), so sums have a fixed order. Explicit positions have no diagonals: their sums are integers, whose
order does not matter.
"""

import triton
import triton.language as tl

from ..common.bias import Operands
from ..common.dropout import RANDOM_BITS
from .backward_step import open_tensors, score_gradients
from .bias import open_sequence, open_tile
from .mlp import load_weights
from .scores import Mix, head_groups, input_gradient, mlp_gradient
from .sums import psi_gradient


@triton.jit
def _entry(t, first, last):
    """The entry of a table that each distance falls on."""
    return tl.minimum(tl.maximum(t.pi - t.pj, first), last) - first


@triton.jit
def _add_units(to, sums, Units, inside):
    """Adds float32 `sums` to integers, so that the order of additions does not matter."""
    tl.atomic_add(to, (sums * tl.load(Units)).to(tl.int64), mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=RANDOM_BITS)
def mixed_gradient_by_tile(
    Q, K, V, GradOut, Lse2, Delta, DTable, DPsi, DDense, TableUnits, PsiUnits, DenseUnits,
    stride_gdb, stride_gdh, stride_gt, first_corner, num_sequences, batches_each,
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
    ALONG_DIAGONAL: tl.constexpr, OF_INNER: tl.constexpr, SHARED_HEADS: tl.constexpr, SUMMED: tl.constexpr,
    FORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEADS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """ALONG_DIAGONAL: DTable [H, bands, 2 * BLOCK] and DPsi [bands, 2 * BLOCK], of which entry x of band t is the sum
    at the distance first_corner + (t - 1) * BLOCK + x over the tiles of the band. Else
    DDense [B or 1, H or 1, Tq, Tk] (SHARED_HEADS sums over heads), and, zeroed, int64, DTable [H, L] and DPsi [L] of
    explicit positions, times TableUnits and PsiUnits ([1], powers of 2); and so DDense [.., Tk] or [.., Tq], times
    DenseUnits, where the kernel sums over queries (SUMMED = 2) or keys (SUMMED = 3)."""
    pid = tl.program_id(0)
    GROUPS: tl.constexpr = FORM.groups
    GROUP: tl.constexpr = FORM.group
    OWN: tl.constexpr = FORM.inner if OF_INNER else FORM.outer
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
    own = inner if OF_INNER else outer
    w = load_weights(W1X, W1B, B1, W2, FORM, Rows is not None)
    heads, kv = head_groups(num_heads, group, FORM)
    by_head = ()
    for _ in tl.static_range(GROUPS):
        by_head += (tl.zeros([GROUP, BLOCK_M, BLOCK_N], tl.float32),)
    psi = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    blocks_m = tl.cdiv(q_max, BLOCK_M)
    blocks_n = tl.cdiv(k_max, BLOCK_N)
    corner = first_corner + pid * BLOCK_N
    tile_i0 = (pid % blocks_m) * BLOCK_M
    tile_j0 = (pid // blocks_m % blocks_n) * BLOCK_N
    first = 0 if ALONG_DIAGONAL else pid // blocks_m // blocks_n
    count = num_sequences if ALONG_DIAGONAL else batches_each
    for index in range(first, first + count):
        seq = open_sequence(
            index, KLengths, CuQ, CuK, q_tokens, k_tokens,
            QPositions, stride_qpos, KPositions, stride_kpos, FORM.top_left,
        )  # fmt: skip
        x = open_tensors(
            seq, Q, K, V, GradOut, Lse2, Delta,
            stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_gb, stride_gh, num_heads, q_tokens,
            FORM,
        )  # fmt: skip
        shift = seq.k_len - seq.q_len
        if ALONG_DIAGONAL:
            lo = tl.maximum(corner - shift - (BLOCK_N - 1), 0) // BLOCK_M * BLOCK_M
            hi = tl.where(seq.k_len > 0, tl.minimum(corner - shift + seq.k_len, seq.q_len), 0)
            low_j0 = lo + shift - corner
        else:
            lo = tile_i0
            hi = tl.where((tile_i0 < seq.q_len) & (tile_j0 < seq.k_len), tile_i0 + BLOCK_M, tile_i0)
            low_j0 = tile_j0
        if FORM.has_right:
            hi = tl.where(low_j0 <= lo + (BLOCK_M - 1) + seq.offset + right, hi, lo)
        if FORM.has_left:
            hi = tl.where(low_j0 + (BLOCK_N - 1) >= lo + seq.offset - left, hi, lo)
        for i0 in range(lo, hi, BLOCK_M):
            tile = open_tile(seq, i0, i0 - lo + low_j0, BLOCK_M, BLOCK_N, False, FORM.explicit)
            _weights, gradients, _slack, _x_rows, _inner_rows, before = score_gradients(
                x, tile, seq, heads, kv, w, mix, FORM, True, NVIDIA
            )  # fmt: skip
            if OF_INNER:
                _ds_rows, dbefore = mlp_gradient(gradients, before, w, FORM)
                weights_of_inner = w.w1b if FORM.concat else w.w1x
                gradients = input_gradient(gradients, dbefore, weights_of_inner, tile, FORM, FORM.residual)
            if DPsi is not None:
                dpsi = psi_gradient(gradients, heads, num_heads, tile, own, OWN, FORM, NVIDIA)
                if ALONG_DIAGONAL:
                    psi += dpsi
                else:
                    entry = _entry(tile, own.psi_first, own.psi_last)
                    units = (dpsi * tl.load(PsiUnits)).to(tl.int64)
                    tl.atomic_add(DPsi + tl.reshape(entry, [BLOCK_M, BLOCK_N]), units, sem="relaxed")
            if DTable is not None and not ALONG_DIAGONAL:
                for g in tl.static_range(GROUPS):
                    real = (g * FORM.group + tl.arange(0, FORM.group) < num_heads)[:, None, None]
                    at = DTable + (heads[g] * stride_gt)[:, None, None] + _entry(tile, own.table_first, own.table_last)
                    units = (gradients[g] * tl.load(TableUnits)).to(tl.int64)
                    tl.atomic_add(at, units, mask=real & (units != 0), sem="relaxed")
            added = ()
            for g in tl.static_range(GROUPS):
                added += (by_head[g] + gradients[g],)
            by_head = added

    c = tl.arange(0, BLOCK_N)
    if ALONG_DIAGONAL:
        i = tl.arange(0, BLOCK_M)[:, None]
        out = pid.to(tl.int64) * 2 * BLOCK_N + c
        if DPsi is not None:
            sheared = tl.gather(psi, (i - c[None, :]) & (BLOCK_N - 1), 1)
            tl.store(DPsi + out, tl.sum(tl.where(i < c[None, :], sheared, 0.0), 0))
            tl.store(DPsi + out + BLOCK_N, tl.sum(tl.where(i >= c[None, :], sheared, 0.0), 0))
        if DTable is not None:
            row = tl.arange(0, FORM.group * BLOCK_M)[:, None]
            below = (i < c[None, :])[None, :, :]
            for g in tl.static_range(GROUPS):
                by_row = tl.reshape(by_head[g], [GROUP * BLOCK_M, BLOCK_N])
                sheared = tl.gather(by_row, ((row % BLOCK_M) - c[None, :]) & (BLOCK_N - 1), 1)
                sheared = tl.reshape(sheared, [GROUP, BLOCK_M, BLOCK_N])
                head = g * FORM.group + tl.arange(0, FORM.group)
                head_out = (head.to(tl.int64) * stride_gt)[:, None] + out[None, :]
                mask = (head < num_heads)[:, None] & (c >= 0)[None, :]
                tl.store(DTable + head_out, tl.sum(tl.where(below, sheared, 0.0), 1), mask=mask)
                tl.store(DTable + head_out + BLOCK_N, tl.sum(tl.where(below, 0.0, sheared), 1), mask=mask)
    elif DDense is not None:
        seq = open_sequence(
            first, KLengths, CuQ, CuK, q_tokens, k_tokens,
            QPositions, stride_qpos, KPositions, stride_kpos, FORM.top_left,
        )  # fmt: skip
        i_end = seq.q_len if CuQ is not None else q_tokens
        j_end = seq.k_len if CuQ is not None else k_tokens
        i = tile_i0 + tl.arange(0, BLOCK_M)
        j = tile_j0 + c
        base = DDense + seq.b.to(tl.int64) * stride_gdb
        i_in, j_in = i < i_end, j < j_end
        at = (seq.q_start + i).to(tl.int64)[:, None] * k_tokens + (seq.k_start + j)[None, :]
        inside = i_in[:, None] & j_in[None, :]
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for g in tl.static_range(GROUPS):
            head = g * FORM.group + tl.arange(0, FORM.group)
            real = head < num_heads
            if SHARED_HEADS:
                total += tl.sum(tl.where(real[:, None, None], by_head[g], 0.0), 0)
            elif SUMMED == 2:
                to = (head * stride_gdh)[:, None] + (seq.k_start + j)[None, :]
                _add_units(base + to, tl.sum(by_head[g], 1), DenseUnits, real[:, None] & j_in[None, :])
            elif SUMMED == 3:
                to = (head * stride_gdh)[:, None] + (seq.q_start + i)[None, :]
                _add_units(base + to, tl.sum(by_head[g], 2), DenseUnits, real[:, None] & i_in[None, :])
            else:
                heads_at = (head * stride_gdh)[:, None, None] + at[None, :, :]
                tl.store(base + heads_at, by_head[g], mask=real[:, None, None] & inside[None, :, :])
        if SHARED_HEADS:
            if SUMMED == 2:
                _add_units(base + seq.k_start + j, tl.sum(total, 0), DenseUnits, j_in)
            elif SUMMED == 3:
                _add_units(base + seq.q_start + i, tl.sum(total, 1), DenseUnits, i_in)
            else:
                tl.store(base + at, total, mask=inside)
