"""The gradient of the logits on one tile, computed anew: what gradients of biases are sums of."""

import triton
import triton.language as tl

from .bias import gather
from .dropout import keep_tile
from .halves import multiply_bf16, widen_bf16
from .masks import mask_offset
from .profile import next_line, no_line
from .scores import LOG2E, load_rows, logits_tile


@triton.jit
def softmax_gradient(
    p, kept, dp, delta, keep, keep_scale, slack, WITH_DELTA: tl.constexpr, IN_BF16: tl.constexpr, NVIDIA: tl.constexpr
):
    """ds, before the softcap's share of it, and -ds in 16 bits: from the weights, as they are and as kept by dropout,
    and minus the gradient of the latter, to which delta is added already if WITH_DELTA."""
    if keep is not None:
        dp = tl.where(keep, dp * keep_scale, 0.0)
    if not WITH_DELTA:
        dp += delta[None, :]
    if IN_BF16:
        half = multiply_bf16(kept, dp.to(tl.bfloat16), NVIDIA)
        return -widen_bf16(half, NVIDIA), half
    else:
        return -(p * dp), (p * dp * slack).to(kept.dtype)


@triton.jit
def logit_gradient(
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
    EXPLICIT: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, TOP_LEFT: tl.constexpr,
    SIGNED: tl.constexpr, LINEAR: tl.constexpr, CLAMP: tl.constexpr, NATURAL: tl.constexpr,
    KNOTS: tl.constexpr, BOUNDS_BLOCK: tl.constexpr, PRECISION: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """ds on the tile at (i0, j0), zero outside the sequence; pi, pj, the row scale, and the profile's line and
    highest segment."""
    b64 = tl.cast(b, tl.int64)
    h64 = tl.cast(h, tl.int64)
    kv64 = (h // group).to(tl.int64)
    shift = k_len - q_len
    offset = mask_offset(q_len, k_len, TOP_LEFT)
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    if MASKED:
        rows = tl.minimum(rows, q_len - 1 - i0)
        cols = tl.maximum(tl.minimum(cols, k_len - 1 - j0), -j0)
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
    lse2 = tl.load(Lse2 + stat)
    if MASKED:
        lse2 = tl.where(tl.arange(0, BLOCK_M) < q_len - i0, lse2, float("inf"))
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
        entry = tl.minimum(tl.maximum(position, row_first), row_last) - row_first
        row_scale = gather(RowScale + entry, 0, NVIDIA)
    line = no_line()
    high = line.segment
    if Psi is not None:
        line, high = next_line(
            line, i0, j0, pi, pj, shift, row_scale, Psi, psi_first, psi_last, PsiBounds, row_first, row_last,
            RowBounds, Knots, SegmentSlope + h * (num_knots + 1), SegmentIntercept + h * (num_knots + 1),
            CLAMP, EXPLICIT, BLOCK_N, BOUNDS_BLOCK, KNOTS, NVIDIA,
        )  # fmt: skip
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    s, _ = logits_tile(
        s, line, high, i, j, i_in, j_in, i0, j0, pi, pj, k_len, shift, offset, i0 + shift, slope, row_scale,
        b, h, q_start, k_start, scale, softcap, Table, stride_table_h, table_first, table_last,
        Psi, psi_first, psi_last, Knots, num_knots, SegmentSlope, Dense, stride_db, stride_dh, stride_di, stride_dj,
        Boolean, stride_bb, stride_bh, stride_bi, stride_bj, left, right, MASKED,
        HAS_LEFT, HAS_RIGHT, SIGNED, LINEAR, CLAMP, EXPLICIT, NATURAL, NVIDIA,
    )  # fmt: skip
    if Psi is not None:
        lse2 -= line.intercept * LOG2E
    if MASKED:
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
    return p * (dp - delta[:, None]), pi, pj, row_scale, line, high
