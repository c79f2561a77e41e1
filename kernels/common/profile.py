"""A profile on one tile: the line on which its logits lie, or, with knots inside the tile, the line of each segment.

On segment m, between knots m - 1 and m, the bias is slope[m] * y + intercept[m], where y is psi of the distance times
the row scale. Bounds of psi over runs of distances and of the row scale over runs of rows, made by the host, give the
lowest and the highest y of a tile: never too narrow, as rounding is monotone; where they are too wide a knot outside
costs time alone. Most tiles lie in one segment, and mostly in that of the tile before: two comparisons tell.

With several segments on a tile, each element takes the line of its own. Bending the lowest one's line by the changes of
slope past each knot would cost less and cancel: a flat segment past a steep one would hold the steep one's roundings.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import Operands
from .bias import by_distance, gather, lookup
from .sequences import TileCoord


class Line(NamedTuple):
    """The line of one head on `segment`, which holds y with below < y <= above."""

    segment: Any
    below: Any
    above: Any
    slope: Any
    intercept: Any


@triton.jit
def no_line():
    """A line on which no tile lies."""
    zero = tl.full([], 0.0, tl.float32)
    infinity = tl.full([], float("inf"), tl.float32)
    return Line(tl.full([], 0, tl.int32), infinity, -infinity, zero, zero)


@triton.jit
def line_on(m, o: Operands, h, NVIDIA: tl.constexpr):
    """Head h's line on segment m."""
    below = tl.where(m > 0, gather(o.knots + tl.maximum(m - 1, 0), 0, NVIDIA), float("-inf"))
    at = h * (o.num_knots + 1) + m
    return Line(
        m, below, gather(o.knots + m, 0, NVIDIA), gather(o.segment_slope + at, 0, NVIDIA),
        gather(o.segment_intercept + at, 0, NVIDIA),
    )  # fmt: skip


@triton.jit
def common_line(line: Line, high):
    """The line of all elements of a tile of the segments line.segment .. high: 0 where there are several, None is one.
    add_line adds its slope, the caller its intercept, in what is one number a row."""
    if high is None:
        return line
    else:
        several = high > line.segment
        slope, intercept = tl.where(several, 0.0, line.slope), tl.where(several, 0.0, line.intercept)
        return Line(line.segment, line.below, line.above, slope, intercept)


@triton.jit
def _knots_below(Knots, y, KNOTS: tl.constexpr, NVIDIA: tl.constexpr):
    """How many of the ascending Knots [KNOTS], a power of two of which the last is +inf, are less than the scalar y."""
    count = y.to(tl.int32) * 0
    for n in tl.static_range(1, 31):
        if KNOTS >> n > 0:
            count += tl.where(gather(Knots + count + ((KNOTS >> n) - 1), 0, NVIDIA) < y, KNOTS >> n, 0)
    return count


@triton.jit
def _bounds(Bounds, lo, last, BLOCK: tl.constexpr, NVIDIA: tl.constexpr):
    """Least and greatest of at least the BLOCK entries from `lo` on (indices clamped to 0 .. last), from [blocks, 2]
    made by the host: row n bounds blocks n and n + 1."""
    block = tl.minimum(tl.maximum(lo, 0), last) // BLOCK
    return gather(Bounds + 2 * block, 0, NVIDIA), gather(Bounds + 2 * block + 1, 0, NVIDIA)


@triton.jit
def _implicit_range(i0, j0, offset, o: Operands, BLOCK_N: tl.constexpr, CONFIG: tl.constexpr, NVIDIA: tl.constexpr):
    """Bounds of y on the tile at (i0, j0) of implicit positions."""
    corner = i0 - j0 - (BLOCK_N - 1) + offset
    psi_low, psi_high = _bounds(
        o.psi_bounds, corner - o.psi_first, o.psi_last - o.psi_first, CONFIG.bounds_block, NVIDIA
    )
    row = i0 + offset - o.row_first
    row_low, row_high = _bounds(o.row_bounds, row, o.row_last - o.row_first, CONFIG.bounds_block, NVIDIA)
    a, b, c, d = psi_low * row_low, psi_low * row_high, psi_high * row_low, psi_high * row_high
    return tl.minimum(tl.minimum(a, b), tl.minimum(c, d)), tl.maximum(tl.maximum(a, b), tl.maximum(c, d))


@triton.jit
def _range(
    t: TileCoord,
    row_scale,
    o: Operands,
    BLOCK_N: tl.constexpr,
    BIAS: tl.constexpr,
    CONFIG: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """Bounds of y on the tile: of explicit positions its least and greatest value."""
    if CONFIG.explicit:
        y = row_scale * lookup(o.psi, o.psi_first, o.psi_last, t, 0, BIAS.clamp, CONFIG.explicit, NVIDIA)
        return tl.min(y), tl.max(y)
    else:
        return _implicit_range(t.i0, t.j0, t.offset, o, BLOCK_N, CONFIG, NVIDIA)


@triton.jit
def segments(
    t: TileCoord,
    row_scale,
    o: Operands,
    BLOCK_N: tl.constexpr,
    BIAS: tl.constexpr,
    CONFIG: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """The lowest and the highest segment that y can meet on the tile."""
    y_low, y_high = _range(t, row_scale, o, BLOCK_N, BIAS, CONFIG, NVIDIA)
    low = _knots_below(o.knots, y_low, BIAS.knots, NVIDIA)
    high = low
    if y_high > gather(o.knots + low, 0, NVIDIA):
        high = _knots_below(o.knots, y_high, BIAS.knots, NVIDIA)
    return low, high


@triton.jit
def next_line(
    line: Line, t: TileCoord, row_scale, o: Operands, BLOCK_N: tl.constexpr, CONFIG: tl.constexpr, NVIDIA: tl.constexpr
):
    """From the line of the tile before to that of the lowest segment on this tile, and the highest segment on it."""
    BIAS: tl.constexpr = CONFIG.bias
    y_low, y_high = _range(t, row_scale, o, BLOCK_N, BIAS, CONFIG, NVIDIA)
    high = line.segment
    if (y_low <= line.below) | (y_high > line.above):
        line = line_on(_knots_below(o.knots, y_low, BIAS.knots, NVIDIA), o, t.h, NVIDIA)
        high = line.segment
        if y_high > line.above:
            high = _knots_below(o.knots, y_high, BIAS.knots, NVIDIA)
    return line, high


# Tiles that one call of runs() looks at.
AHEAD: tl.constexpr = tl.constexpr(64)


@triton.jit
def runs(
    i0, end, j0, offset, o: Operands,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CONFIG: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """(straight, bent, segment): the tiles of queries i0 to `straight` lie in `segment` alone, and those from there to
    `bent` meet several segments each; neither run need be as long as it could. Of explicit positions all are bent."""
    end = tl.maximum(i0, end)
    if CONFIG.explicit:
        return i0, end, i0 * 0
    else:
        n = tl.arange(0, AHEAD)
        y_low, y_high = _implicit_range(i0 + BLOCK_M * n, j0, offset, o, BLOCK_N, CONFIG, NVIDIA)
        low = _knots_below(o.knots, y_low, CONFIG.bias.knots, NVIDIA)
        high = _knots_below(o.knots, y_high, CONFIG.bias.knots, NVIDIA)
        segment = tl.sum(tl.where(n == 0, low, 0))
        straight = tl.min(tl.where((low == segment) & (high == segment), AHEAD, n))
        bent = tl.min(tl.where((n < straight) | (low != high), AHEAD, n))
        return tl.minimum(i0 + straight * BLOCK_M, end), tl.minimum(i0 + bent * BLOCK_M, end), segment


@triton.jit
def row_scales(pi, offset, o: Operands, EXPLICIT: tl.constexpr):
    """Pointers to the row scales of the queries at positions pi."""
    position = pi if EXPLICIT else pi + offset
    return o.row_scale + (tl.minimum(tl.maximum(position, o.row_first), o.row_last) - o.row_first)


@triton.jit
def psi_tile(
    t: TileCoord,
    o: Operands,
    again,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CONFIG: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """psi on the tile [ROWS, COLUMNS]."""
    return by_distance(
        o.psi, o.psi_first, o.psi_last, t, again, ROWS, COLUMNS, CONFIG.bias.clamp, CONFIG.explicit, NVIDIA
    )


@triton.jit
def on_segment(x, psi, row_scale, line: Line, NVIDIA: tl.constexpr):
    """x where the profile lies on the line's segment, and 0 elsewhere."""
    if NVIDIA:
        # Element by element: step by step the compiler would hold a tile of y and of what the comparisons give.
        return tl.inline_asm_elementwise(
            """{
            .reg .pred on;
            .reg .f32 y;
            mul.rn.f32 y, $2, $3;
            setp.gt.f32 on, y, $4;
            setp.le.and.f32 on, y, $5, on;
            selp.f32 $0, $1, 0f00000000, on;
            }""",
            "=f,f,f,f,f,f", [x, psi, row_scale, line.below, line.above], tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        y = psi * row_scale
        return tl.where((y > line.below) & (y <= line.above), x, 0.0)


@triton.jit
def _add_on_segment(s, psi, row_scale, line: Line, unit, NVIDIA: tl.constexpr):
    """s with the line added to the elements on its segment."""
    slope = line.slope * unit
    intercept = line.intercept * unit
    if NVIDIA:
        # Element by element, as on_segment.
        return tl.inline_asm_elementwise(
            """{
            .reg .pred on;
            .reg .f32 y, sum;
            mul.rn.f32 y, $2, $3;
            setp.gt.f32 on, y, $4;
            setp.le.and.f32 on, y, $5, on;
            fma.rn.f32 sum, y, $6, $7;
            add.rn.f32 sum, $1, sum;
            selp.f32 $0, sum, $1, on;
            }""",
            "=f,f,f,f,f,f,f,f", [s, psi, row_scale, line.below, line.above, slope, intercept], tl.float32,
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return s + on_segment(psi * row_scale * slope + intercept, psi, row_scale, line, NVIDIA)


@triton.jit
def add_line(
    s, line: Line, high, unit, t: TileCoord, row_scale, o: Operands, CONFIG: tl.constexpr, NVIDIA: tl.constexpr
):
    """s plus the profile but for the intercept of `line`, the tile's common_line, in `unit`s to 1. `high` is the
    highest segment on the tile, None if that is the line's."""
    psi = psi_tile(t, o, 0, s.shape[0], s.shape[1], CONFIG, NVIDIA)
    # As an addition it would start the product's accumulators, and hold their registers while the product runs.
    s = tl.fma(psi, tl.broadcast_to(row_scale * (line.slope * unit), s.shape), s)
    # The condition hides the loop from the compiler, which pipelines only loops with no other directly inside. Adding 0
    # off a segment holds no second tile beside s.
    if high is not None:
        if high > line.segment:
            for m in range(line.segment, high + 1):
                psi = psi_tile(t, o, m + 1, s.shape[0], s.shape[1], CONFIG, NVIDIA)
                s = _add_on_segment(s, psi, row_scale, line_on(m, o, t.h, NVIDIA), unit, NVIDIA)
    return s
