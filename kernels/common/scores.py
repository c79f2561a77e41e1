"""What turns scaled dot products into attention logits on one tile, the same in every kernel.

Index vectors come shaped to broadcast (bias.Place), so forward and backward kernels share this whatever way round they
hold the tile. Rows and keys past the end are clamped to the last one before anything is loaded: no operand is read
outside, and what such elements hold is masked or never stored.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .bias import Operands, Place, by_distance, slope_tile
from .masks import Mask, allowed
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
def _table_tile(
    t: Place, o: Operands, ROWS: tl.constexpr, COLUMNS: tl.constexpr, F: tl.constexpr, NVIDIA: tl.constexpr
):
    table = o.Table + tl.cast(t.h, tl.int64) * o.stride_table_h
    return by_distance(table, o.table_first, o.table_last, t, 0, ROWS, COLUMNS, F.bias.clamp, F.explicit, NVIDIA)


@triton.jit
def start_logits(
    t: Place, o: Operands, ROWS: tl.constexpr, COLUMNS: tl.constexpr, F: tl.constexpr, NVIDIA: tl.constexpr
):
    """What the products of a tile [ROWS, COLUMNS] are added to: zeros, or a table that is in their units already."""
    if o.Table is not None and not F.natural:
        return _table_tile(t, o, ROWS, COLUMNS, F, NVIDIA)
    else:
        return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def cap(x, softcap):
    """softcap * tanh(x / softcap) and its derivative."""
    t = libdevice.tanh(x / softcap)
    return softcap * t, 1.0 - t * t


@triton.jit
def add_bias(
    s, line: Line, high, unit, t: Place, o: Operands, slope, reference, row_scale,
    F: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """The tile s with every operand that is not None added (a table only if F.natural) but for the intercept of the
    profile's line. What is 1 in the logits is `unit` in s: 1 where there is a table or a dense bias. `high` is the
    highest segment on the tile; slope is head h's, counted from `reference` (bias.slope_tile)."""
    if slope is not None:
        s += slope_tile(slope * unit, t, reference, F.linear, F.bias.signed, F.explicit)
    if o.Table is not None and F.natural:
        s += _table_tile(t, o, s.shape[0], s.shape[1], F, NVIDIA)
    if o.Psi is not None:
        s = add_line(s, line, high, unit, t, row_scale, o, F, NVIDIA)
    if o.Dense is not None:
        tile = o.Dense + tl.cast(t.b, tl.int64) * o.stride_db + tl.cast(t.h, tl.int64) * o.stride_dh
        tile += (t.q_start + t.i0).to(tl.int64) * o.stride_di + (t.k_start + t.j0).to(tl.int64) * o.stride_dj
        s += tl.load(tile + (t.i_in - t.i0) * o.stride_di + (t.j_in - t.j0) * o.stride_dj).to(tl.float32)
    return s


@triton.jit
def logits_tile(
    s, line: Line, high, t: Place, o: Operands, mask: Mask, slope, reference, row_scale, scale, softcap,
    MASKED: tl.constexpr, F: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """From dot products to logits (times 1 / scale unless F.natural, with a table in them) but for the intercept of
    the profile's line, -inf where masked; and softcap's derivative."""
    slack = 1.0
    unit = 1.0
    if F.natural:
        s = s * scale
        if softcap is not None:
            s, slack = cap(s, softcap)
    else:
        unit = 1.0 / scale
    s = add_bias(s, line, high, unit, t, o, slope, reference, row_scale, F, NVIDIA)
    if MASKED:
        seen = allowed(t.i, t.j, mask.k_len, mask.offset, mask.left, mask.right, F.has_left, F.has_right)
        s = tl.where(seen, s, float("-inf"))
    if mask.Boolean is not None:
        tile = mask.Boolean + t.b.to(tl.int64) * mask.stride_bb + t.h.to(tl.int64) * mask.stride_bh
        tile += (t.q_start + t.i0).to(tl.int64) * mask.stride_bi + (t.k_start + t.j0).to(tl.int64) * mask.stride_bj
        pointers = tile + (t.i_in - t.i0) * mask.stride_bi + (t.j_in - t.j0) * mask.stride_bj
        s = tl.where(tl.load(pointers), s, float("-inf"))
    return s, slack
