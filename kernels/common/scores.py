"""What turns scaled dot products into attention logits on one tile, the same in every kernel.

Index vectors come shaped to broadcast (sequences.TileCoord), so forward and backward kernels share this whatever way
round they hold the tile. Rows and keys past the end are clamped to the last one before anything is loaded: no operand
is read outside, and what such elements hold is masked or never stored.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .arguments import Mask, Operands
from .bias import by_distance, slope_tile
from .masks import allowed, of_pairs
from .profile import Line, add_line
from .sequences import SeqlenInfo, TileCoord

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
    t: TileCoord, o: Operands, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CONFIG: tl.constexpr, NVIDIA: tl.constexpr
):
    table = o.table + tl.cast(t.h, tl.int64) * o.table_head
    return by_distance(
        table, o.table_first, o.table_last, t, 0, ROWS, COLUMNS, CONFIG.bias.clamp, CONFIG.explicit, NVIDIA
    )


@triton.jit
def start_logits(
    t: TileCoord, o: Operands, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CONFIG: tl.constexpr, NVIDIA: tl.constexpr
):
    """What the products of a tile [ROWS, COLUMNS] are added to: zeros, or a table that is in their units already."""
    if o.table is not None and not CONFIG.scale_before_bias:
        return _table_tile(t, o, ROWS, COLUMNS, CONFIG, NVIDIA)
    else:
        return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def cap(x, softcap):
    """softcap * tanh(x / softcap) and its derivative."""
    t = libdevice.tanh(x / softcap)
    return softcap * t, 1.0 - t * t


@triton.jit
def add_bias(
    s, line: Line, high, unit, t: TileCoord, o: Operands, slope, reference, row_scale,
    CONFIG: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """The tile s with every operand that is not None added (a table only if scale_before_bias) but for the intercept of
    the profile's `line`, the tile's common_line. What is 1 in the logits is `unit` in s: 1 where there is a table or a
    dense bias. `high` is the highest segment on the tile; slope is head h's, counted from `reference`
    (bias.slope_tile)."""
    if slope is not None:
        s += slope_tile(slope * unit, t, reference, CONFIG.linear, CONFIG.bias.signed, CONFIG.explicit)
    if o.table is not None and CONFIG.scale_before_bias:
        s += _table_tile(t, o, s.shape[0], s.shape[1], CONFIG, NVIDIA)
    if o.psi is not None:
        s = add_line(s, line, high, unit, t, row_scale, o, CONFIG, NVIDIA)
    if o.dense is not None:
        s += tl.load(of_pairs(o.dense, o.dense_strides, t, tl.cast(t.h, tl.int64))).to(tl.float32)
    return s


@triton.jit
def logits_tile(
    s, line: Line, high, t: TileCoord, seq: SeqlenInfo, o: Operands, mask: Mask,
    slope, reference, row_scale, scale, softcap,
    MASKED: tl.constexpr, CONFIG: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """From dot products to logits (times 1 / scale unless scale_before_bias, with a table in them) but for the
    intercept of the profile's line, -inf where masked; and softcap's derivative."""
    slack = 1.0
    unit = 1.0
    if CONFIG.scale_before_bias:
        s = s * scale
        if softcap is not None:
            s, slack = cap(s, softcap)
    else:
        unit = 1.0 / scale
    s = add_bias(s, line, high, unit, t, o, slope, reference, row_scale, CONFIG, NVIDIA)
    if MASKED:
        s = tl.where(allowed(t, seq, mask, CONFIG), s, float("-inf"))
    if mask.boolean is not None:
        seen = tl.load(of_pairs(mask.boolean, mask.boolean_strides, t, tl.cast(t.h, tl.int64)))
        s = tl.where(seen, s, float("-inf"))
    return s, slack
