"""Gradients of the queries, keys and values, and of a slope, in one pass of five products a tile.

One program owns BLOCK_N keys of one key-value head and walks the queries that see them, of every query head in the
group. Tiles are held transposed, [BLOCK_N, BLOCK_M]: the weights then go from one product to the next in registers.
What a tile adds to its queries' gradient goes to float32 memory, one block of keys after another (dq_semaphore.py),
so the order of summation is fixed and no atomic adds to it.
"""

import triton
import triton.language as tl

from ..common.bf16x2 import widen_bf16
from ..common.bias import Operands, Place, distance_tile, gather
from ..common.codegen import apart, hidden, opaque
from ..common.diagonals import SLOTS, add_bands, finish_bands, start_bands, store_bands
from ..common.dq_semaphore import publish, wait_for
from ..common.dropout import RANDOM_BITS, Dropout, keep_tile
from ..common.masks import Mask, mask_offset, query_spans, sequence
from ..common.mma_layout import by_query, fragments, load_fragments, load_shared_inside, store_fragments, store_shared
from ..common.profile import line_on, next_line, no_line, psi_tile, row_scales, runs
from ..common.scores import LOG2E, load_rows, logits_tile, rows_ahead, start_logits
from .logit_gradient import softmax_gradient
from .profile_gradient import (
    SPLIT,
    LineSums,
    add_parts,
    by_thread,
    leave_segment,
    past_knots,
    psi_gradient,
    store_parts,
)


@triton.jit(do_not_specialize=RANDOM_BITS)
def attention_backward(
    Q, K, V, GradOut, Lse2, Delta, DQ, DK, DV_, DSlope, DTable, TableUnits, TableBands,
    DPsi, PsiUnits, PsiBands, DRowScale, RowUnits, RowParts, DSegments, Ticket, Progress, num_sequences,
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
    HOIST: tl.constexpr, HIDE: tl.constexpr, WHOLE: tl.constexpr, SHARES: tl.constexpr, SPREAD: tl.constexpr,
    PARTS: tl.constexpr, FORM: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """DQ [B, H, Tq, BLOCK_D] float32, zeroed, takes the gradient of the queries times -1 / scale, in tiles of BLOCK_M
    queries as mma_layout.fragments keeps them (the last one whole too; transposed unless SPREAD) but for packed
    documents. DK [B, Hkv, Tk, D] and DV_ [B, Hkv, Tk, DV] are contiguous; keys of no sequence are not written. By
    block of keys (operands.all_blocks), DSlope [B, H, blocks] and DSegments [B, H, blocks, 2, W + 1] (sums of ds and
    of ds * y on each segment) are float32 and zeroed, or None where not wanted. In int64, zeroed, and times units
    that are powers of 2 (TableUnits, PsiUnits, RowUnits, [1]), or None: DTable [H, table_last - table_first + 1] and
    DPsi [psi_last - psi_first + 1] take the gradients of a table and of psi over implicit distances, DRowScale [B,
    Tq] those of the queries' row scales. TableBands and PsiBands are diagonals.py's memory, RowParts is
    profile_gradient.py's. Ticket [1] and Progress [B, Hkv, blocks] are int32 and zeroed."""
    PRECISION: tl.constexpr = FORM.precision
    PACKED: tl.constexpr = CuQ is not None
    # Logit gradients are rounded to 16 bits for the products anyway. In bfloat16, which has float32's range, they are
    # made in it: half the instructions, and the weights hold half the registers until then. A profile's sums weigh them
    # by psi, whose mean makes most of the roundings of a row count alike: there only the weights are rounded.
    WEIGHTS_BF16: tl.constexpr = Q.dtype.element_ty == tl.bfloat16 and threshold is None and softcap is None
    IN_BF16: tl.constexpr = WEIGHTS_BF16 and DRowScale is None
    # A slope's gradient, the sum of ds times distance, is linear in the query: then tensor cores take its moments. But
    # on the mask's border: under a steep slope the key at distance 0 has nearly all of a row's weight, and what its ds
    # adds to both moments, which cancels, would round the rest away.
    MOMENTS: tl.constexpr = DSlope is not None and FORM.linear and softcap is None and Q.dtype.element_ty != tl.float32
    KEEPS_SIGN: tl.constexpr = FORM.bias.signed or FORM.linear  # no distance is negative, or its sign counts
    # Whether the logits too are spread over both axes. Sums by distance and by query need 16 keys of a warp's own.
    APART: tl.constexpr = SPREAD and DTable is None and DPsi is None and DRowScale is None
    START_AT_DELTA: tl.constexpr = threshold is None and not APART
    COLUMNS: tl.constexpr = 8 if NVIDIA else 16  # the narrowest product
    GROUPS: tl.constexpr = BLOCK_N // 16
    blocks = tl.cdiv(k_max, BLOCK_N)
    kv_heads = num_heads // group
    pid = tl.atomic_add(Ticket, 1, sem="relaxed")
    walks = num_sequences * kv_heads
    n = blocks - 1 - pid // walks  # the last keys first: their programs are whom the others wait for
    j0 = n * BLOCK_N
    kv = pid % walks % kv_heads
    b = pid % walks // kv_heads
    program = pid
    progress = Progress + (pid % walks) * blocks + n
    q_start, k_start, q_len, k_len = sequence(KLengths, CuQ, CuK, b, q_tokens, k_tokens)
    if j0 >= k_len:
        return
    if SPREAD and PACKED:
        if q_len == 0:
            return
    sequence64 = b.to(tl.int64)
    if PACKED:
        # Blocks of all documents are numbered by tokens, for one document may be far longer than the others.
        n += k_start // BLOCK_N + b
        blocks = k_tokens // BLOCK_N + num_sequences
        sequence64 *= 0
        program = kv * blocks + n
        progress = Progress + program
        b = b * 0
    b64 = b.to(tl.int64)
    kv64 = kv.to(tl.int64)
    shift = k_len - q_len
    offset = mask_offset(q_len, k_len, FORM.top_left)
    o = Operands(
        Slope, stride_slope_b, Table, stride_table_h, table_first, table_last,
        Psi, psi_first, psi_last, PsiBounds, RowScale, row_first, row_last, RowBounds,
        Knots, num_knots, SegmentSlope, SegmentIntercept, Dense, stride_db, stride_dh, stride_di, stride_dj,
    )  # fmt: skip
    mask = Mask(k_len, offset, left, right, Boolean, stride_bb, stride_bh, stride_bi, stride_bj)
    dropout = Dropout(threshold, keep_scale, seed_lo, seed_hi)
    last = tl.minimum(j0 + BLOCK_N, k_len) - 1
    # The next block of keys sees the queries from next_lo on. The last block waits for nobody.
    next_lo = tl.cdiv(q_len, BLOCK_M) * BLOCK_M
    awaited = progress
    if j0 + BLOCK_N < k_len:
        awaited = progress + 1
        next_lo = tl.maximum(j0 + BLOCK_N - offset - right, 0) // BLOCK_M * BLOCK_M if FORM.has_right else 0
    done = 0

    own = tl.arange(0, BLOCK_N) < k_len - j0
    cols = tl.minimum(tl.arange(0, BLOCK_N), k_len - 1 - j0)
    j = (j0 + tl.arange(0, BLOCK_N))[:, None]  # [BLOCK_N, 1]
    j_in = (j0 + cols)[:, None]
    col0 = (k_start + j0).to(tl.int64)
    k = load_rows(K + b64 * stride_kb + kv64 * stride_kh + col0 * stride_kn, cols, stride_kn, D, BLOCK_D)
    # Negated, as all that follows from it: the product with the output's gradient then starts at delta, as it is.
    v = -load_rows(V + b64 * stride_vb + kv64 * stride_vh + col0 * stride_vn, cols, stride_vn, DV, BLOCK_DV)
    pj = j_in
    q_positions = None
    if FORM.explicit:
        pj = tl.load(KPositions + b64 * stride_kpos + col0 + cols)[:, None]
        q_positions = QPositions + b64 * stride_qpos + q_start
    factor = LOG2E if FORM.natural else scale * LOG2E
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    lo, full_lo, full_hi, hi = query_spans(
        j0, last, q_len, offset, left, right, BLOCK_M, FORM.has_left, FORM.has_right
    )  # fmt: skip
    if j0 + BLOCK_N > k_len:
        full_hi = full_lo  # keys past the end are masked everywhere: their logits must not reach dq
    for h in range(kv * group, (kv + 1) * group):
        h64 = tl.cast(h, tl.int64)
        q_base = Q + b64 * stride_qb + h64 * stride_qh + q_start.to(tl.int64) * stride_qm
        do_base = GradOut + b64 * stride_gb + h64 * stride_gh + q_start.to(tl.int64) * stride_gm
        stat_base = (b64 * num_heads + h64) * q_tokens + q_start
        if PACKED:
            dq_base = DQ + stat_base * BLOCK_D
        else:
            dq_base = DQ + (b64 * num_heads + h64) * (tl.cdiv(q_tokens, BLOCK_M) * BLOCK_M * BLOCK_D)
        slope = None
        dslope = tl.zeros([BLOCK_N], tl.float32)
        if MOMENTS:
            # In pairs of columns, of tiles inside the mask, the sum of ds over the queries so far and of ds times their
            # distance from the first of the step. Ones and numbers below 256 are exact in 16 bits.
            moments = tl.zeros([BLOCK_N, COLUMNS], tl.float32)
            query = tl.arange(0, BLOCK_M)[:, None].to(tl.float32)
            columns = tl.where(tl.arange(0, COLUMNS)[None, :] % 2 == 0, 1.0, query).to(Q.dtype.element_ty)
        slot = (sequence64 * num_heads + h64) * blocks + n  # where this program's sums for this head go
        if DTable is not None:
            dtable = DTable + h64 * stride_table_h
            table_units = -gather(TableUnits, h, NVIDIA)
            table_bands = TableBands + tl.cast(program, tl.int64) * (SLOTS * (BLOCK_N // 2) * (BLOCK_M + 8))
            table_carried = start_bands(table_bands, lo, GROUPS, BLOCK_M, NVIDIA)
        if DPsi is not None:
            psi_units = gather(PsiUnits, h, NVIDIA)
            psi_bands = PsiBands + tl.cast(program, tl.int64) * (SLOTS * (BLOCK_N // 2) * (BLOCK_M + 8))
            psi_carried = start_bands(psi_bands, lo, GROUPS, BLOCK_M, NVIDIA)
        line = no_line()
        high = line.segment
        if DRowScale is not None:
            sums = LineSums(
                DSegments + slot * 2 * (num_knots + 1),
                DRowScale + b64 * q_tokens + q_start,
                tl.load(RowUnits),
                RowParts + tl.cast(program, tl.int64) * (2 * 8 * PARTS * BLOCK_M),
            )
            of_ds = tl.zeros([PARTS, 8, 4], tl.float32)
            of_dsy = tl.zeros([SPLIT, BLOCK_M], tl.float32)
        told = 0
        if Slope is not None:
            slope = tl.load(Slope + b * stride_slope_b + h)
        if SPREAD:
            first_row = tl.minimum(lo, q_len - 1)
            q = rows_ahead(q_base, first_row, q_len, stride_qm, D, BLOCK_M, BLOCK_D)
            do = rows_ahead(do_base, first_row, q_len, stride_gm, DV, BLOCK_M, BLOCK_DV)
        at, begin, straight, bent = lo, full_lo, full_hi, full_hi
        for _ in tl.range(0, tl.cdiv(hi - lo, BLOCK_M) if Psi is not None else 1):
            # A profile's tiles come in runs: of one segment, then of several each. Others are one run.
            if Psi is not None:
                begin = tl.maximum(at, full_lo)
                straight = begin
                bent = begin
                of_run = line.segment
                if at < hi:
                    straight, bent, of_run = runs(begin, full_hi, j0, shift, o, BLOCK_M, BLOCK_N, FORM, NVIDIA)
            for span in tl.static_range(0, 4):
                # Span 0 is the border on the side of causal masking, span 1 is straight, span 2 bent; span 3 is the
                # window's border, and rows past the end.
                if (span != 0 or FORM.has_right) and (span != 2 or Psi is not None):
                    if span == 0:
                        span_lo, span_hi = at, full_lo
                    elif span == 1:
                        span_lo, span_hi = begin, straight
                        if Psi is not None:
                            if DRowScale is not None:
                                of_ds, of_dsy = leave_segment(sums, line.segment, of_run, num_knots, of_ds, of_dsy)
                            line = line_on(of_run, o, h, NVIDIA)
                    elif span == 2:
                        span_lo, span_hi = straight, bent
                    else:
                        span_lo, span_hi = bent, hi if Psi is None else tl.where(bent >= full_hi, hi, bent)
                    for i_loop in tl.range(span_lo, span_hi, BLOCK_M, disable_licm=not HOIST):
                        i0 = hidden(i_loop, HIDE and NVIDIA)
                        rows = tl.arange(0, BLOCK_M)
                        if span % 3 == 0:
                            rows = tl.minimum(rows, q_len - 1 - i0)
                        i = (i0 + tl.arange(0, BLOCK_M))[None, :]  # [1, BLOCK_M]
                        i_in = (i0 + rows)[None, :]
                        row0 = tl.cast(i0, tl.int64)
                        if not SPREAD:
                            q = load_rows(q_base + row0 * stride_qm, rows, stride_qm, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
                            do = load_rows(do_base + row0 * stride_gm, rows, stride_gm, DV, BLOCK_DV)
                        pi = i_in
                        if FORM.explicit:
                            pi = tl.load(q_positions + row0 + rows)[None, :]
                        t = Place(b, h, q_start, k_start, i0, j0, shift, i, j, i_in, j_in, pi, pj)
                        if DRowScale is not None and span != 1:
                            of_dsy = add_parts(
                                sums, i0 // BLOCK_M - 1, told, i0 > span_lo, line.slope, of_dsy, q_len, shift,
                                q_positions, o, PARTS, BLOCK_M, NVIDIA,
                            )  # fmt: skip
                        row_scale = None
                        if Psi is not None:
                            row_scale = tl.load(row_scales(pi, shift, o, FORM.explicit))
                        if Psi is not None and span != 1:
                            segment = line.segment
                            line, high = next_line(line, t, row_scale, o, BLOCK_N, FORM, NVIDIA)
                        lse2 = tl.load(Lse2 + stat_base + row0 + rows)
                        if span % 3 != 0 and BLOCK_M > 32 and not SPREAD:
                            delta = by_query(Delta + stat_base + row0, 1, i0, BLOCK_M, NVIDIA)
                            delta = gather(delta, i0, NVIDIA)
                        else:
                            delta = tl.load(Delta + stat_base + row0 + rows)
                        if span % 3 == 0:
                            # A row past the end has no weight.
                            lse2 = tl.where(tl.arange(0, BLOCK_M) < q_len - i0, lse2, float("inf"))
                        if Psi is not None:
                            lse2 -= line.intercept * LOG2E
                        if FORM.linear and not SHARES:
                            lse2 += (slope * LOG2E) * tl.arange(0, BLOCK_M).to(tl.float32)
                        s = start_logits(t, o, BLOCK_N, BLOCK_M, FORM, NVIDIA)
                        s = tl.dot(k, tl.trans(q), s, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
                        s, slack = logits_tile(
                            s, line, high if span != 1 else None, t, o, mask, slope, i0 + shift, row_scale,
                            scale, softcap, span % 3 == 0, FORM, NVIDIA,
                        )  # fmt: skip
                        p = tl.exp2(s * factor - lse2[None, :])
                        kept = p
                        keep = None
                        if threshold is not None:
                            keep = tl.trans(keep_tile(dropout, t, num_heads, BLOCK_M, BLOCK_N, not PACKED))
                            kept = tl.where(keep, p * keep_scale, 0.0)
                        kept = kept.to(do.dtype)
                        if not SPREAD:
                            dv = tl.dot(kept, do, dv, input_precision=PRECISION)
                        if START_AT_DELTA:
                            # This costs what adding it would, and holds fewer registers.
                            dp = tl.broadcast_to(delta[None, :], [BLOCK_N, BLOCK_M])
                            dp = tl.dot(v, tl.trans(do), dp, input_precision=PRECISION)
                        else:
                            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
                        if WEIGHTS_BF16:
                            p = widen_bf16(kept, NVIDIA)
                        if APART:
                            ds, ds_half = p, kept
                            if apart(i_loop, 0, NVIDIA):
                                ds, ds_half = softmax_gradient(
                                    p, kept, dp, delta, keep, keep_scale, slack, START_AT_DELTA, IN_BF16, NVIDIA
                                )
                        else:
                            ds, ds_half = softmax_gradient(
                                p, kept, dp, delta, keep, keep_scale, slack, START_AT_DELTA, IN_BF16, NVIDIA
                            )
                        if DSlope is not None and (not MOMENTS or span % 3 == 0):
                            distance = distance_tile(t, FORM.explicit)
                            dslope += tl.sum(ds * (distance if KEEPS_SIGN else tl.abs(distance)), 1)
                        if DTable is not None:
                            of_table = ds_half if TableBands.dtype.element_ty == tl.bfloat16 else -ds
                            table_carried = store_bands(table_bands, i0, of_table, table_carried, WHOLE, NVIDIA)
                        if DRowScale is not None:
                            if span != 1:
                                of_ds, of_dsy = leave_segment(sums, segment, line.segment, num_knots, of_ds, of_dsy)
                            psi = psi_tile(t, o, 1, BLOCK_N, BLOCK_M, FORM, NVIDIA)
                            store_parts(sums.Parts, i0 // BLOCK_M, ds, psi, PARTS, WHOLE, NVIDIA)
                            of_ds += by_thread(ds, PARTS)
                        if DPsi is not None or DRowScale is not None:
                            dpsi = psi_gradient(ds, line, row_scale)
                            if span != 1:
                                if high > line.segment:
                                    dpsi = past_knots(
                                        ds, dpsi, line, high, sums if DRowScale is not None else None, q_len,
                                        t, row_scale, o, 1, FORM, NVIDIA,
                                    )  # fmt: skip
                        if DPsi is not None:
                            psi_carried = store_bands(psi_bands, i0, dpsi, psi_carried, WHOLE, NVIDIA)
                        if MOMENTS and span % 3 != 0:
                            total, first = tl.split(moments.reshape([BLOCK_N, COLUMNS // 2, 2]))
                            first -= BLOCK_M * total
                            moments = tl.join(total, first).reshape([BLOCK_N, COLUMNS])
                            if APART:
                                if apart(i_loop, 4, NVIDIA):
                                    moments = tl.dot(ds_half, columns, moments, input_precision=PRECISION)
                            else:
                                moments = tl.dot(ds_half, columns, moments, input_precision=PRECISION)
                        if SPREAD:
                            if apart(i_loop, 1, NVIDIA):
                                dv = tl.dot(kept, do, dv, input_precision=PRECISION)
                            if apart(i_loop, 2, NVIDIA):
                                dk = tl.dot(ds_half, q, dk, input_precision=PRECISION)
                        else:
                            dk = tl.dot(ds_half, q, dk, input_precision=PRECISION)
                        turn = wait_for(awaited, tl.where(i0 >= next_lo, done + i0 + BLOCK_M, 0), NVIDIA)
                        if DTable is not None:
                            add_bands(
                                dtable, table_units, table_bands, i0, turn, j0, shift,
                                table_first, table_last, GROUPS, BLOCK_M, FORM.bias.clamp, NVIDIA,
                            )  # fmt: skip
                        if DPsi is not None:
                            add_bands(
                                DPsi, psi_units, psi_bands, i0, turn, j0, shift,
                                psi_first, psi_last, GROUPS, BLOCK_M, FORM.bias.clamp, NVIDIA,
                            )  # fmt: skip
                        if DRowScale is not None and span == 1:
                            of_dsy = add_parts(
                                sums, i0 // BLOCK_M - 1, turn, i0 > span_lo, line.slope, of_dsy, q_len, shift,
                                q_positions, o, PARTS, BLOCK_M, NVIDIA,
                            )  # fmt: skip
                        dq_tile = dq_base + row0 * BLOCK_D
                        inside = tl.arange(0, BLOCK_M) < q_len - i0
                        if SPREAD:
                            if PACKED:
                                dq_tile = opaque(dq_tile + rows[:, None] * BLOCK_D, turn, NVIDIA)
                                dq_tile += tl.arange(0, BLOCK_D)[None, :]  # [BLOCK_M, BLOCK_D]
                                dq = load_shared_inside(dq_tile, inside[:, None], turn, span % 3 == 0, NVIDIA)
                            else:
                                dq_tile = fragments(dq_tile, turn, BLOCK_M, BLOCK_D, NVIDIA)
                                dq = load_fragments(dq_tile, turn, NVIDIA)
                            if apart(i_loop, 3, NVIDIA):
                                dq = tl.dot(tl.trans(ds_half), k, dq, input_precision=PRECISION)
                            if PACKED:
                                store_shared(dq_tile, dq, inside[:, None], span % 3 == 0, NVIDIA)
                            else:
                                store_fragments(dq_tile, dq, NVIDIA)
                            # The wait for what was stored to be visible hides the time that these take.
                            q = rows_ahead(q_base, i0 + BLOCK_M, q_len, stride_qm, D, BLOCK_M, BLOCK_D)
                            do = rows_ahead(do_base, i0 + BLOCK_M, q_len, stride_gm, DV, BLOCK_M, BLOCK_DV)
                        else:
                            if PACKED:
                                dq_tile += tl.arange(0, BLOCK_D)[:, None]  # [BLOCK_D, BLOCK_M]
                                if span % 3 != 0 and BLOCK_M > 32:
                                    dq_tile = by_query(dq_tile, BLOCK_D, turn, BLOCK_M, NVIDIA)
                                else:
                                    dq_tile = opaque(dq_tile, turn, NVIDIA) + rows[None, :] * BLOCK_D
                                dq = load_shared_inside(dq_tile, inside[None, :], turn, span % 3 == 0, NVIDIA)
                            else:
                                dq_tile = fragments(dq_tile, turn, BLOCK_D, BLOCK_M, NVIDIA)
                                dq = load_fragments(dq_tile, turn, NVIDIA)
                            dq = tl.dot(tl.trans(k), ds_half, dq, input_precision=PRECISION)
                            if PACKED:
                                store_shared(dq_tile, dq, inside[None, :], span % 3 == 0, NVIDIA)
                            else:
                                store_fragments(dq_tile, dq, NVIDIA)
                        told = publish(progress, done + i0 + BLOCK_M, NVIDIA)
                    if DRowScale is not None:
                        of_dsy = add_parts(
                            sums, tl.cdiv(span_hi, BLOCK_M) - 1, told, span_hi > span_lo, line.slope, of_dsy, q_len,
                            shift, q_positions, o, PARTS, BLOCK_M, NVIDIA,
                        )  # fmt: skip
            if Psi is not None:
                at = tl.where(bent >= full_hi, tl.maximum(hi, full_hi), bent)
        if hi > lo:
            end = tl.cdiv(hi, BLOCK_M) * BLOCK_M
            if DTable is not None:
                finish_bands(
                    dtable, table_units, table_bands, end, table_carried, progress, done + end, j0, shift,
                    table_first, table_last, GROUPS, BLOCK_M, WHOLE, FORM.bias.clamp, NVIDIA,
                )  # fmt: skip
            if DPsi is not None:
                finish_bands(
                    DPsi, psi_units, psi_bands, end, psi_carried, progress, done + end, j0, shift,
                    psi_first, psi_last, GROUPS, BLOCK_M, WHOLE, FORM.bias.clamp, NVIDIA,
                )  # fmt: skip
        if DRowScale is not None:
            of_ds, of_dsy = leave_segment(sums, line.segment, -1, num_knots, of_ds, of_dsy)
        if MOMENTS:
            total, first = tl.split(-moments.reshape([BLOCK_N, COLUMNS // 2, 2]))
            at_last = full_hi - BLOCK_M + shift - j
            dslope += tl.sum(tl.where(tl.arange(0, COLUMNS // 2)[None, :] == 0, first + total * at_last, 0.0), 1)
        if DSlope is not None:
            tl.store(DSlope + slot, -tl.sum(tl.where(own, dslope, 0.0)))
        done += tl.cdiv(q_len, BLOCK_M) * BLOCK_M
        publish(progress, done, NVIDIA)

    inside = own[:, None]
    out0 = (b64 * kv_heads + kv64) * k_tokens + col0
    offs_n = tl.arange(0, BLOCK_N)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(DK + out0 * D + offs_n * D + offs_d, (dk * -scale).to(DK.dtype.element_ty), mask=inside & (offs_d < D))
    offs_d = tl.arange(0, BLOCK_DV)[None, :]
    tl.store(DV_ + out0 * DV + offs_n * DV + offs_d, dv.to(DV_.dtype.element_ty), mask=inside & (offs_d < DV))
