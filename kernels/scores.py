"""What turns scaled dot products into attention logits on one tile, the same in every kernel.

Index vectors come shaped to broadcast, [BLOCK_M, 1] and [1, BLOCK_N] or transposed, so forward and backward kernels
share this whatever way round they hold the tile. Rows and keys past the end are clamped to the last one before
anything is loaded: no operand is read outside, and what such elements hold is masked or never stored.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .bias import by_distance, slope_tile
from .masks import allowed
from .profile import Line, add_line

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Below every finite logit in base 2, so that a row with no key yet has weight exp2(-inf - LOWEST) = 0 and never NaN.
LOWEST: tl.constexpr = tl.constexpr(-3.0e38)


@triton.jit
def load_rows(base, rows, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a [T, D] tensor with unit stride along D, [rows, BLOCK_D], zeros past D."""
    offs_d = tl.arange(0, BLOCK_D)
    pointers = base + rows[:, None] * stride + offs_d[None, :]
    if D == BLOCK_D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(offs_d < D)[None, :], other=0.0)


@triton.jit
def rows_ahead(base, i0, q_len, stride, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_M, BLOCK_D], the rows from i0 on, of a step that may not come: the last row takes the place of those past
    it."""
    rows = tl.minimum(tl.arange(0, BLOCK_M), q_len - 1 - i0)
    return load_rows(base + tl.cast(i0, tl.int64) * stride, rows, stride, D, BLOCK_D)


@triton.jit
def start_logits(
    i, j, i0, j0, shift, h, Table, stride_table_h, table_first, table_last,
    CLAMP: tl.constexpr, NATURAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """What the products of a tile [ROWS, COLUMNS] are added to: zeros, or a table that is in their units already."""
    if Table is not None and not NATURAL:
        table = Table + tl.cast(h, tl.int64) * stride_table_h
        return by_distance(table, i, j, i0, j0, shift, table_first, table_last, 0, ROWS, COLUMNS, CLAMP, False, NVIDIA)
    else:
        return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def cap(x, softcap):
    """softcap * tanh(x / softcap) and its derivative."""
    t = libdevice.tanh(x / softcap)
    return softcap * t, 1.0 - t * t


@triton.jit
def add_bias(
    s, line: Line, high, unit, i, j, i0, j0, pi, pj, shift, reference, slope, row_scale,
    Table, stride_table_h, table_first, table_last, Psi, psi_first, psi_last, Knots, num_knots, SegmentSlope,
    Dense, stride_db, stride_dh, stride_di, stride_dj, b, h, i_first, j_first,
    SIGNED: tl.constexpr, LINEAR: tl.constexpr, CLAMP: tl.constexpr, EXPLICIT: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """The tile s with every operand that is not None added but for the intercept of the profile's line. What is 1 in
    the logits is `unit` in s: 1 where there is a table or a dense bias. `high` is the highest segment on the tile.

    slope is head h's; the others are given whole. pi and pj are positions, or i and j themselves if implicit; i_first
    and j_first are the tensors' rows at which the sequence begins."""
    b64 = tl.cast(b, tl.int64)
    h64 = tl.cast(h, tl.int64)
    if slope is not None:
        s += slope_tile(slope * unit, pi, pj, i0, j0, shift, reference, LINEAR, SIGNED, EXPLICIT)
    if Table is not None:
        table = Table + h64 * stride_table_h
        s += by_distance(
            table, pi, pj, i0, j0, shift, table_first, table_last, 0, s.shape[0], s.shape[1], CLAMP, EXPLICIT, NVIDIA
        )
    if Psi is not None:
        s = add_line(
            s, line, high, unit, i0, j0, pi, pj, shift, row_scale, Psi, psi_first, psi_last,
            Knots, SegmentSlope + h * (num_knots + 1), CLAMP, EXPLICIT, NVIDIA,
        )  # fmt: skip
    if Dense is not None:
        tile = Dense + b64 * stride_db + h64 * stride_dh
        tile += (i_first + i0).to(tl.int64) * stride_di + (j_first + j0).to(tl.int64) * stride_dj
        s += tl.load(tile + (i - i0) * stride_di + (j - j0) * stride_dj).to(tl.float32)
    return s


@triton.jit
def logits_tile(
    s, line: Line, high, i, j, i_in, j_in, i0, j0, pi, pj, k_len, shift, offset, reference, slope, row_scale,
    b, h, i_first, j_first, scale, softcap, Table, stride_table_h, table_first, table_last,
    Psi, psi_first, psi_last, Knots, num_knots, SegmentSlope, Dense, stride_db, stride_dh, stride_di, stride_dj,
    Boolean, stride_bb, stride_bh, stride_bi, stride_bj, left, right, MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SIGNED: tl.constexpr, LINEAR: tl.constexpr,
    CLAMP: tl.constexpr, EXPLICIT: tl.constexpr, NATURAL: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """From dot products to logits (times 1 / scale unless NATURAL, with a table in them) but for the intercept of the
    profile's line, -inf where masked; and softcap's derivative.

    i and j are true indices; i_in and j_in are clamped to the sequence, so that no operand is read outside it."""
    slack = 1.0
    unit = 1.0
    if NATURAL:
        s = s * scale
        if softcap is not None:
            s, slack = cap(s, softcap)
    else:
        unit = 1.0 / scale
    s = add_bias(
        s, line, high, unit, i_in, j_in, i0, j0, pi, pj, shift, reference, slope, row_scale,
        Table if NATURAL else None, stride_table_h, table_first, table_last,
        Psi, psi_first, psi_last, Knots, num_knots, SegmentSlope,
        Dense, stride_db, stride_dh, stride_di, stride_dj, b, h, i_first, j_first,
        SIGNED, LINEAR, CLAMP, EXPLICIT, NVIDIA,
    )  # fmt: skip
    if MASKED:
        s = tl.where(allowed(i, j, k_len, offset, left, right, HAS_LEFT, HAS_RIGHT), s, float("-inf"))
    if Boolean is not None:
        tile = Boolean + b.to(tl.int64) * stride_bb + h.to(tl.int64) * stride_bh
        tile += (i_first + i0).to(tl.int64) * stride_bi + (j_first + j0).to(tl.int64) * stride_bj
        s = tl.where(tl.load(tile + (i_in - i0) * stride_bi + (j_in - j0) * stride_bj), s, float("-inf"))
    return s, slack
