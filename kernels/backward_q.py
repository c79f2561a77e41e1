"""Gradients of the queries, and of what adds up along rows: slopes, row scales and the lines of a profile.

One program owns BLOCK_M queries of one head, walks their keys as the forward pass does and recomputes the weights from
the log-sum-exp. Sums over the program's rows go to a slot of its own (O(N) memory), which the host adds up, so there is
no atomic between programs and the result does not depend on their order.
"""

import triton
import triton.language as tl

from .bias import lookup
from .dropout import RANDOM_BITS, keep_tile
from .masks import key_spans, mask_offset, sequence
from .scores import LOG2E, load_rows, logits_tile, segments


@triton.jit(do_not_specialize=RANDOM_BITS)
def attention_backward_q(
    Q, K, V, GradOut, Lse2, Delta, DQ, DSlope, DRowScale, DSegments,
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
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, TOP_LEFT: tl.constexpr,
    SIGNED: tl.constexpr, LINEAR: tl.constexpr, CLAMP: tl.constexpr, NATURAL: tl.constexpr,
    KNOTS: tl.constexpr, BOUNDS_BLOCK: tl.constexpr, PRECISION: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """DQ [B, H, Tq, D] contiguous. DSlope [programs], DRowScale [B, H, Tq] and DSegments [programs, 2, W + 1] (sums of
    ds and of ds * y on each segment) are float32, or None where not wanted; DSegments comes zeroed."""
    EXPLICIT: tl.constexpr = QPositions is not None
    PACKED: tl.constexpr = CuQ is not None
    blocks = tl.cdiv(q_max, BLOCK_M)
    pid = tl.program_id(0)
    i0 = (blocks - 1 - pid % blocks) * BLOCK_M
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
    offset = mask_offset(q_len, k_len, TOP_LEFT)
    last = tl.minimum(i0 + BLOCK_M, q_len) - 1
    reference = i0 + shift

    rows = tl.minimum(tl.arange(0, BLOCK_M), q_len - 1 - i0)
    inside = tl.arange(0, BLOCK_M) < q_len - i0
    i = (i0 + tl.arange(0, BLOCK_M))[:, None]  # [BLOCK_M, 1]
    i_in = (i0 + rows)[:, None]
    row0 = (q_start + i0).to(tl.int64)
    q = load_rows(Q + b64 * stride_qb + h64 * stride_qh + row0 * stride_qm, rows, stride_qm, D, BLOCK_D)
    do = load_rows(GradOut + b64 * stride_gb + h64 * stride_gh + row0 * stride_gm, rows, stride_gm, DV, BLOCK_DV)
    stat = (b64 * num_heads + h64) * q_tokens + row0 + rows
    lse2 = tl.where(inside, tl.load(Lse2 + stat), float("inf"))
    delta = tl.load(Delta + stat)
    k_base = K + b64 * stride_kb + kv64 * stride_kh + k_start.to(tl.int64) * stride_kn
    v_base = V + b64 * stride_vb + kv64 * stride_vh + k_start.to(tl.int64) * stride_vn

    slope = None
    if Slope is not None:
        slope = tl.load(Slope + b * stride_slope_b + h)
    if LINEAR:
        # logits_tile leaves out what is constant along a row; so must the log-sum-exp.
        lse2 += slope * tl.arange(0, BLOCK_M).to(tl.float32) * LOG2E
    pi = i_in
    if EXPLICIT:
        pi = tl.load(QPositions + b64 * stride_qpos + row0 + rows)[:, None]
    row_scale = None
    if Psi is not None:
        position = pi if EXPLICIT else pi + shift
        row_scale = tl.load(RowScale + (tl.minimum(tl.maximum(position, row_first), row_last) - row_first))
    factor = LOG2E if NATURAL else scale * LOG2E
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dslope = tl.zeros([BLOCK_M], tl.float32)
    drow_scale = tl.zeros([BLOCK_M], tl.float32)

    lo, full_lo, full_hi, hi = key_spans(i0, last, k_len, offset, left, right, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    for span in tl.static_range(0, 3):
        if span != 0 or HAS_LEFT:
            if span == 0:
                span_lo, span_hi = lo, full_lo
            elif span == 1:
                span_lo, span_hi = full_lo, full_hi
            else:
                span_lo, span_hi = full_hi, hi
            for j0 in tl.range(span_lo, span_hi, BLOCK_N):
                cols = tl.arange(0, BLOCK_N)
                if span != 1:
                    cols = tl.minimum(cols, k_len - 1 - j0)
                j = (j0 + tl.arange(0, BLOCK_N))[None, :]
                j_in = (j0 + cols)[None, :]
                col0 = j0.to(tl.int64)
                k = load_rows(k_base + col0 * stride_kn, cols, stride_kn, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
                v = load_rows(v_base + col0 * stride_vn, cols, stride_vn, DV, BLOCK_DV)
                pj = j_in
                if EXPLICIT:
                    pj = tl.load(KPositions + b64 * stride_kpos + k_start + col0 + cols)[None, :]
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
                s, slack = logits_tile(
                    s, i, j, i_in, j_in, i0, j0, pi, pj, k_len, shift, offset, reference, slope, row_scale,
                    b, h, q_start, k_start, scale, softcap, Table, stride_table_h, table_first, table_last,
                    Psi, psi_first, psi_last, PsiBounds, row_first, row_last, RowBounds, Knots, num_knots,
                    SegmentSlope, SegmentIntercept, Dense, stride_db, stride_dh, stride_di, stride_dj,
                    Boolean, stride_bb, stride_bh, stride_bi, stride_bj, left, right, span != 1,
                    HAS_LEFT, HAS_RIGHT, SIGNED, LINEAR, CLAMP, EXPLICIT, NATURAL,
                    BLOCK_M, BLOCK_N, BOUNDS_BLOCK, KNOTS, NVIDIA,
                )  # fmt: skip
                p = tl.exp2(s * factor - lse2[:, None])
                dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
                if threshold is not None:
                    keep = keep_tile(
                        seed_lo, seed_hi, threshold, q_start + i0, k_start + j0, b * num_heads + h,
                        BLOCK_M, BLOCK_N, not PACKED,
                    )  # fmt: skip
                    dp = tl.where(keep, dp * keep_scale, 0.0)
                ds = p * (dp - delta[:, None])  # the gradient of the logits
                if DSlope is not None:
                    if EXPLICIT:
                        distance = (pi - pj).to(tl.float32)
                    else:
                        # Rows and keys apart, so that int becomes float once for each and not for each pair.
                        distance = (i_in - i0).to(tl.float32) - (j_in - reference).to(tl.float32)
                    dslope -= tl.sum(ds * (distance if SIGNED else tl.abs(distance)), 1)
                if DRowScale is not None:
                    low, high = segments(
                        i0, j0, pi, pj, shift, row_scale, Psi, psi_first, psi_last, PsiBounds,
                        row_first, row_last, RowBounds, Knots, num_knots,
                        CLAMP, EXPLICIT, BLOCK_M, BLOCK_N, BOUNDS_BLOCK, KNOTS, NVIDIA,
                    )  # fmt: skip
                    psi = lookup(Psi, pi, pj, i0, j0, shift, psi_first, psi_last, 0, CLAMP, EXPLICIT, NVIDIA)
                    sums = DSegments + pid.to(tl.int64) * 2 * (num_knots + 1)
                    slopes = SegmentSlope + h * (num_knots + 1)
                    rows_scale = tl.reshape(row_scale, [BLOCK_M])
                    ds_row = tl.sum(ds, 1)
                    ds_psi_row = tl.sum(ds * psi, 1)
                    if high > low:
                        for m in range(low + 1, high + 1):
                            y = psi * row_scale
                            on = y > tl.load(Knots + m - 1)
                            if m < num_knots:
                                on = on & (y <= tl.load(Knots + m))
                            part = tl.where(on, ds, 0.0)
                            part_row = tl.sum(part, 1)
                            part_psi_row = tl.sum(part * psi, 1)
                            drow_scale += tl.load(slopes + m) * part_psi_row
                            tl.atomic_add(sums + m, tl.sum(part_row), sem="relaxed")
                            tl.atomic_add(sums + num_knots + 1 + m, tl.sum(part_psi_row * rows_scale), sem="relaxed")
                            ds_row -= part_row
                            ds_psi_row -= part_psi_row
                    drow_scale += tl.load(slopes + low) * ds_psi_row
                    # No other program adds to these slots: the additions of one program come in its own order.
                    tl.atomic_add(sums + low, tl.sum(ds_row), sem="relaxed")
                    tl.atomic_add(sums + num_knots + 1 + low, tl.sum(ds_psi_row * rows_scale), sem="relaxed")
                dq = tl.dot((ds * slack).to(k.dtype), k, dq, input_precision=PRECISION)

    offs_d = tl.arange(0, BLOCK_D)
    stored = inside[:, None] & (offs_d < D)[None, :]
    base = DQ + ((b64 * num_heads + h64) * q_tokens + row0) * D
    tl.store(base + tl.arange(0, BLOCK_M)[:, None] * D + offs_d[None, :], (dq * scale).to(DQ.dtype.element_ty), stored)
    if DSlope is not None:
        tl.store(DSlope + pid, tl.sum(tl.where(inside, dslope, 0.0)))
    if DRowScale is not None:
        tl.store(DRowScale + stat, drow_scale, mask=inside)
