"""Gradients of what is indexed by distance or by (i, j): tables, psi and dense biases.

Each program owns one tile-shaped accumulator. For tables and psi it walks the tiles along one diagonal, where every
tile holds the same distances, and only at the end sums its accumulator along the diagonals; for a dense bias it walks
the batches and heads that share the bias. So there is one plain addition an element and no atomic, and the order of
summation is fixed. With explicit positions no two tiles hold the same distances, and each element is added to the
table by an atomic: of integers, in units so small that nothing is lost, since sums of integers do not depend on their
order.
"""

import triton
import triton.language as tl

from .bias import lookup
from .dropout import RANDOM_BITS, keep_tile
from .masks import mask_offset, sequence
from .scores import LOG2E, load_rows, logits_tile, segments


@triton.jit
def _logit_gradient(
    b, h, i0, j0, q_start, k_start, q_len, k_len, Q, K, V, GradOut, Lse2, Delta,
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
    EXPLICIT: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, TOP_LEFT: tl.constexpr,
    SIGNED: tl.constexpr, LINEAR: tl.constexpr, CLAMP: tl.constexpr, NATURAL: tl.constexpr,
    KNOTS: tl.constexpr, BOUNDS_BLOCK: tl.constexpr, PRECISION: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """ds on the tile at (i0, j0), zero outside the sequence; also pi, pj and the row scale."""
    b64 = tl.cast(b, tl.int64)
    h64 = tl.cast(h, tl.int64)
    kv64 = (h // group).to(tl.int64)
    shift = k_len - q_len
    offset = mask_offset(q_len, k_len, TOP_LEFT)
    rows = tl.minimum(tl.arange(0, BLOCK_M), q_len - 1 - i0)
    cols = tl.maximum(tl.minimum(tl.arange(0, BLOCK_N), k_len - 1 - j0), -j0)
    i = (i0 + tl.arange(0, BLOCK_M))[:, None]
    j = (j0 + tl.arange(0, BLOCK_N))[None, :]
    i_in = (i0 + rows)[:, None]
    j_in = (j0 + cols)[None, :]
    row0 = (q_start + i0).to(tl.int64)
    col0 = (k_start + j0).to(tl.int64)
    q = load_rows(Q + b64 * stride_qb + h64 * stride_qh + row0 * stride_qm, rows, stride_qm, D, BLOCK_D)
    do = load_rows(GradOut + b64 * stride_gb + h64 * stride_gh + row0 * stride_gm, rows, stride_gm, DV, BLOCK_DV)
    k = load_rows(K + b64 * stride_kb + kv64 * stride_kh + col0 * stride_kn, cols, stride_kn, D, BLOCK_D)
    v = load_rows(V + b64 * stride_vb + kv64 * stride_vh + col0 * stride_vn, cols, stride_vn, DV, BLOCK_DV)
    stat = (b64 * num_heads + h64) * q_tokens + row0 + rows
    lse2 = tl.where(tl.arange(0, BLOCK_M) < q_len - i0, tl.load(Lse2 + stat), float("inf"))
    delta = tl.load(Delta + stat)
    slope = None
    if Slope is not None:
        slope = tl.load(Slope + b * stride_slope_b + h)
    if LINEAR:
        lse2 += slope * tl.arange(0, BLOCK_M).to(tl.float32) * LOG2E
    pi = i_in
    pj = j_in
    if EXPLICIT:
        pi = tl.load(QPositions + b64 * stride_qpos + row0 + rows)[:, None]
        pj = tl.load(KPositions + b64 * stride_kpos + col0 + cols)[None, :]
    row_scale = None
    if Psi is not None:
        position = pi if EXPLICIT else pi + shift
        row_scale = tl.load(RowScale + (tl.minimum(tl.maximum(position, row_first), row_last) - row_first))
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    s, _ = logits_tile(
        s, i, j, i_in, j_in, i0, j0, pi, pj, k_len, shift, offset, i0 + shift, slope, row_scale,
        b, h, q_start, k_start, scale, softcap, Table, stride_table_h, table_first, table_last,
        Psi, psi_first, psi_last, PsiBounds, row_first, row_last, RowBounds, Knots, num_knots,
        SegmentSlope, SegmentIntercept, Dense, stride_db, stride_dh, stride_di, stride_dj,
        Boolean, stride_bb, stride_bh, stride_bi, stride_bj, left, right, True,
        HAS_LEFT, HAS_RIGHT, SIGNED, LINEAR, CLAMP, EXPLICIT, NATURAL,
        BLOCK_M, BLOCK_N, BOUNDS_BLOCK, KNOTS, NVIDIA,
    )  # fmt: skip
    s = tl.where(j >= 0, s, float("-inf"))
    factor = LOG2E if NATURAL else scale * LOG2E
    p = tl.exp2(s * factor - lse2[:, None])
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    if threshold is not None:
        keep = keep_tile(
            seed_lo, seed_hi, threshold, q_start + i0, k_start + j0, b * num_heads + h, BLOCK_M, BLOCK_N, False
        )
        dp = tl.where(keep, dp * keep_scale, 0.0)
    if Psi is None:
        row_scale = pi  # every element of a returned tuple is a tensor
    return p * (dp - delta[:, None]), pi, pj, row_scale


@triton.jit
def _psi_gradient(
    ds, i0, j0, pi, pj, shift, row_scale, h, Psi, psi_first, psi_last, PsiBounds, row_first, row_last, RowBounds,
    Knots, num_knots, SegmentSlope, CLAMP: tl.constexpr, EXPLICIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDS_BLOCK: tl.constexpr, KNOTS: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """ds times the slope of the profile's segment times the row scale."""
    low, high = segments(
        i0, j0, pi, pj, shift, row_scale, Psi, psi_first, psi_last, PsiBounds, row_first, row_last, RowBounds,
        Knots, num_knots, CLAMP, EXPLICIT, BLOCK_M, BLOCK_N, BOUNDS_BLOCK, KNOTS, NVIDIA,
    )  # fmt: skip
    slopes = SegmentSlope + h * (num_knots + 1)
    steepness = tl.zeros(ds.shape, tl.float32) + tl.load(slopes + low)
    if high > low:
        for m in range(low, high):
            psi = lookup(Psi, pi, pj, i0, j0, shift, psi_first, psi_last, m, CLAMP, EXPLICIT, NVIDIA)
            steepness = tl.where(psi * row_scale > tl.load(Knots + m), tl.load(slopes + m + 1), steepness)
    return ds * steepness * row_scale


@triton.jit
def _diagonals(tile, BLOCK: tl.constexpr):
    """Sums of a [BLOCK, BLOCK] tile over i - j = x - BLOCK and over i - j = x, for x = 0 .. BLOCK - 1."""
    i = tl.arange(0, BLOCK)[:, None]
    x = tl.arange(0, BLOCK)[None, :]
    sheared = tl.gather(tile, (i - x) & (BLOCK - 1), 1)
    return tl.sum(tl.where(i < x, sheared, 0.0), 0), tl.sum(tl.where(i >= x, sheared, 0.0), 0)


@triton.jit(do_not_specialize=RANDOM_BITS)
def gradient_by_distance(
    Q, K, V, GradOut, Lse2, Delta, DTable, DPsi, first_corner, num_sequences,
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
    """DTable and DPsi [H, bands, 2 * BLOCK] float32 or None: entry x of band t is the sum at the distance
    first_corner + (t - 1) * BLOCK + x over the tiles of the band. BLOCK_M = BLOCK_N = BLOCK; positions are implicit."""
    band = tl.program_id(0)
    h = tl.program_id(1)
    corner = first_corner + band * BLOCK_N  # the distance at the first row and column of each tile
    table = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    psi = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for index in range(num_sequences):
        q_start, k_start, q_len, k_len = sequence(KLengths, CuQ, CuK, index, q_tokens, k_tokens)
        b = index if CuQ is None else index * 0
        shift = k_len - q_len
        offset = mask_offset(q_len, k_len, TOP_LEFT)
        lo = tl.maximum(corner - shift - (BLOCK_N - 1), 0) // BLOCK_M * BLOCK_M
        hi = tl.where(k_len > 0, tl.minimum(corner - shift + k_len, q_len), 0)
        # Along a diagonal the mask is the same in every tile: i + offset - j = d + offset - shift.
        if HAS_RIGHT:
            hi = tl.where(corner + (BLOCK_M - 1) + offset - shift >= -right, hi, 0)
        if HAS_LEFT:
            hi = tl.where(corner - (BLOCK_N - 1) + offset - shift <= left, hi, 0)
        for i0 in range(lo, hi, BLOCK_M):
            j0 = i0 + shift - corner
            ds, pi, pj, row_scale = _logit_gradient(
                b, h, i0, j0, q_start, k_start, q_len, k_len, Q, K, V, GradOut, Lse2, Delta,
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
                False,
                D, BLOCK_D, DV, BLOCK_DV,
                BLOCK_M, BLOCK_N,
                HAS_LEFT, HAS_RIGHT, TOP_LEFT,
                SIGNED, LINEAR, CLAMP, NATURAL,
                KNOTS, BOUNDS_BLOCK, PRECISION, NVIDIA,
            )  # fmt: skip
            if DTable is not None:
                table += ds
            if DPsi is not None:
                psi += _psi_gradient(
                    ds, i0, j0, pi, pj, shift, row_scale, h, Psi, psi_first, psi_last, PsiBounds,
                    row_first, row_last, RowBounds, Knots, num_knots, SegmentSlope,
                    CLAMP, False, BLOCK_M, BLOCK_N, BOUNDS_BLOCK, KNOTS, NVIDIA,
                )  # fmt: skip
    x = tl.arange(0, BLOCK_N)
    out = (h.to(tl.int64) * tl.num_programs(0) + band) * 2 * BLOCK_N
    if DTable is not None:
        below, above = _diagonals(table, BLOCK_N)
        tl.store(DTable + out + x, below)
        tl.store(DTable + out + BLOCK_N + x, above)
    if DPsi is not None:
        below, above = _diagonals(psi, BLOCK_N)
        tl.store(DPsi + out + x, below)
        tl.store(DPsi + out + BLOCK_N + x, above)


@triton.jit(do_not_specialize=RANDOM_BITS)
def gradient_by_tile(
    Q, K, V, GradOut, Lse2, Delta, DDense, stride_gdb, stride_gdh, out_heads, batches_each, heads_each, DTable, DPsi,
    TableUnits, PsiUnits, num_sequences,
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
    """DDense [1 or B, 1 or H, Tq, Tk] float32: the sum over the batches and heads that share an element (batches_each
    and heads_each of them). It comes zeroed where documents are packed, and one program has one document. DTable [H, L]
    and DPsi [L] int64, zeroed, take explicit positions' gradients times TableUnits and PsiUnits ([1], powers of 2)."""
    EXPLICIT: tl.constexpr = QPositions is not None
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
        shift = k_len - q_len
        offset = mask_offset(q_len, k_len, TOP_LEFT)
        seen = (i0 < q_len) & (j0 < k_len)
        if HAS_RIGHT:
            seen = seen & (j0 <= i0 + (BLOCK_M - 1) + offset + right)
        if HAS_LEFT:
            seen = seen & (j0 + (BLOCK_N - 1) >= i0 + offset - left)
        if seen:
            ds, pi, pj, row_scale = _logit_gradient(
                b, h, i0, j0, q_start, k_start, q_len, k_len, Q, K, V, GradOut, Lse2, Delta,
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
                EXPLICIT,
                D, BLOCK_D, DV, BLOCK_DV,
                BLOCK_M, BLOCK_N,
                HAS_LEFT, HAS_RIGHT, TOP_LEFT,
                SIGNED, LINEAR, CLAMP, NATURAL,
                KNOTS, BOUNDS_BLOCK, PRECISION, NVIDIA,
            )  # fmt: skip
            acc += ds
            if DTable is not None:
                units = (ds * tl.load(TableUnits)).to(tl.int64)
                entry = tl.minimum(tl.maximum(pi - pj, table_first), table_last) - table_first
                tl.atomic_add(DTable + h.to(tl.int64) * stride_table_h + entry, units, sem="relaxed")
            if DPsi is not None:
                dpsi = _psi_gradient(
                    ds, i0, j0, pi, pj, shift, row_scale, h, Psi, psi_first, psi_last, PsiBounds,
                    row_first, row_last, RowBounds, Knots, num_knots, SegmentSlope,
                    CLAMP, EXPLICIT, BLOCK_M, BLOCK_N, BOUNDS_BLOCK, KNOTS, NVIDIA,
                )  # fmt: skip
                entry = tl.minimum(tl.maximum(pi - pj, psi_first), psi_last) - psi_first
                units = (dpsi * tl.load(PsiUnits)).to(tl.int64)
                tl.atomic_add(DPsi + entry, units, sem="relaxed")
    if DDense is not None:
        b_out = first if CuQ is None else first * 0
        i = i0 + tl.arange(0, BLOCK_M)
        j = j0 + tl.arange(0, BLOCK_N)
        i_end = q_len if CuQ is not None else q_tokens
        j_end = k_len if CuQ is not None else k_tokens
        base = DDense + b_out.to(tl.int64) * stride_gdb + head.to(tl.int64) * stride_gdh
        rows = (q_start + i).to(tl.int64)[:, None] * k_tokens + (k_start + j)[None, :]
        tl.store(base + rows, acc, mask=(i < i_end)[:, None] & (j < j_end)[None, :])
