"""Gradients of a profile: of psi, which is indexed by distance, of its lines and of its row scale.

A program walks the tiles along one diagonal, where every tile holds the same distances, adds them element by element,
and only at the end sums its accumulator along the diagonals. So there is one plain addition an element and no atomic,
and the order of summation is fixed.
"""

import triton
import triton.language as tl

from .dropout import RANDOM_BITS
from .logit_gradient import logit_gradient, psi_gradient
from .masks import mask_offset, sequence
from .profile import profile_sums, write_sums


@triton.jit
def _diagonals(tile, BLOCK: tl.constexpr):
    """Sums of a [BLOCK, BLOCK] tile over i - j = x - BLOCK and over i - j = x, for x = 0 .. BLOCK - 1."""
    i = tl.arange(0, BLOCK)[:, None]
    x = tl.arange(0, BLOCK)[None, :]
    sheared = tl.gather(tile, (i - x) & (BLOCK - 1), 1)
    return tl.sum(tl.where(i < x, sheared, 0.0), 0), tl.sum(tl.where(i >= x, sheared, 0.0), 0)


@triton.jit(do_not_specialize=RANDOM_BITS)
def gradient_by_distance(
    Q, K, V, GradOut, Lse2, Delta, DPsi, DRowScale, RowUnits, DSegments, first_corner,
    num_sequences,
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
    """DPsi [H, bands, 2 * BLOCK] float32 or None: entry x of band t is the sum at the distance
    first_corner + (t - 1) * BLOCK + x over the tiles of the band. BLOCK_M = BLOCK_N = BLOCK; positions are implicit.
    DRowScale [B, H, Tq] int64 or None takes the row scale's gradient times RowUnits ([1], a power of 2) and DSegments
    [H, bands, 2, W + 1] sums of ds and of ds * y on each segment; both come zeroed."""
    band = tl.program_id(0)
    h = tl.program_id(1)
    corner = first_corner + band * BLOCK_N  # the distance at the first row and column of each tile
    psi = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    segment = 0
    of_ds = tl.zeros([BLOCK_N], tl.float32)
    of_dsy = tl.zeros([BLOCK_M], tl.float32)
    sums = DSegments
    row_units = 1.0
    if DRowScale is not None:
        sums = DSegments + (h * tl.num_programs(0) + band) * 2 * (num_knots + 1)
        row_units = tl.load(RowUnits)
    for index in range(num_sequences):
        q_start, k_start, q_len, k_len = sequence(KLengths, CuQ, CuK, index, q_tokens, k_tokens)
        b = index if CuQ is None else index * 0
        shift = k_len - q_len
        offset = mask_offset(q_len, k_len, TOP_LEFT)
        lo = tl.maximum(corner - shift - (BLOCK_N - 1), 0) // BLOCK_M * BLOCK_M
        hi = tl.where(k_len > 0, tl.minimum(corner - shift + k_len, q_len), 0)
        # Tiles that lie inside the sequence whole, and below no mask: along a diagonal it is the same in every tile.
        full_lo = tl.cdiv(tl.maximum(corner - shift, 0), BLOCK_M) * BLOCK_M
        full_hi = tl.minimum(corner - shift + k_len, q_len) // BLOCK_M * BLOCK_M
        if HAS_RIGHT:
            hi = tl.where(corner + (BLOCK_M - 1) + offset - shift >= -right, hi, 0)
            full_hi = tl.where(corner - (BLOCK_N - 1) + offset - shift >= -right, full_hi, 0)
        if HAS_LEFT:
            hi = tl.where(corner - (BLOCK_N - 1) + offset - shift <= left, hi, 0)
            full_hi = tl.where(corner + (BLOCK_M - 1) + offset - shift <= left, full_hi, 0)
        full_lo = tl.minimum(full_lo, tl.maximum(tl.cdiv(hi, BLOCK_M) * BLOCK_M, lo))
        full_hi = tl.maximum(full_lo, tl.minimum(full_hi, hi))
        for span in tl.static_range(0, 3):
            if span == 0:
                span_lo, span_hi = lo, full_lo
            elif span == 1:
                span_lo, span_hi = full_lo, full_hi
            else:
                span_lo, span_hi = full_hi, hi
            for i0 in tl.range(span_lo, span_hi, BLOCK_M, disable_licm=True):
                j0 = i0 + shift - corner
                ds, pi, pj, row_scale, low, high = logit_gradient(
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
                    False, span != 1,
                    D, BLOCK_D, DV, BLOCK_DV,
                    BLOCK_M, BLOCK_N,
                    HAS_LEFT, HAS_RIGHT, TOP_LEFT,
                    SIGNED, LINEAR, CLAMP, NATURAL,
                    KNOTS, BOUNDS_BLOCK, PRECISION, NVIDIA,
                )  # fmt: skip
                if DPsi is not None:
                    psi += psi_gradient(
                        ds, low, high, i0, j0, pi, pj, shift, row_scale, h, Psi, psi_first, psi_last,
                        Knots, num_knots, SegmentSlope, CLAMP, False, NVIDIA,
                    )  # fmt: skip
                if DRowScale is not None:
                    drow_scale, segment, of_ds, of_dsy = profile_sums(
                        ds, low, high, segment, of_ds, of_dsy, sums, i0, j0, pi, pj, shift, row_scale,
                        Psi, psi_first, psi_last, Knots, num_knots, SegmentSlope + h * (num_knots + 1),
                        0, CLAMP, False, NVIDIA,
                    )  # fmt: skip
                    row = (tl.cast(b, tl.int64) * num_heads + h) * q_tokens + q_start + i0 + tl.arange(0, BLOCK_M)
                    units = (drow_scale * row_units).to(tl.int64)
                    tl.atomic_add(DRowScale + row, units, tl.arange(0, BLOCK_M) < q_len - i0, sem="relaxed")
    if DRowScale is not None:
        write_sums(sums, segment, num_knots, of_ds, of_dsy)
    x = tl.arange(0, BLOCK_N)
    out = (h.to(tl.int64) * tl.num_programs(0) + band) * 2 * BLOCK_N
    if DPsi is not None:
        below, above = _diagonals(psi, BLOCK_N)
        tl.store(DPsi + out + x, below)
        tl.store(DPsi + out + BLOCK_N + x, above)
