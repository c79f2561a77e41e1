"""A profile on one tile: the line on which its logits lie, and the knots inside the tile, each of which bends it.

On segment m, between knots m - 1 and m, the bias is slope[m] * y + intercept[m], where y is psi of the distance times
the row scale. Bounds of psi over runs of distances and of the row scale over runs of rows, made by the host, give the
lowest and the highest y of a tile: never too narrow, as rounding is monotone; where they are too wide a knot outside
costs time alone. Most tiles lie in one segment, and mostly in that of the tile before: two comparisons tell.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .bias import by_distance, gather, lookup


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
def line_on(m, Knots, slopes, intercepts, NVIDIA: tl.constexpr):
    below = tl.where(m > 0, gather(Knots + tl.maximum(m - 1, 0), 0, NVIDIA), float("-inf"))
    return Line(
        m, below, gather(Knots + m, 0, NVIDIA), gather(slopes + m, 0, NVIDIA), gather(intercepts + m, 0, NVIDIA)
    )  # fmt: skip


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
def _range(
    i0, j0, pi, pj, shift, row_scale, Psi, psi_first, psi_last, PsiBounds, row_first, row_last, RowBounds,
    CLAMP: tl.constexpr, EXPLICIT: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDS_BLOCK: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """Bounds of y on the tile: of explicit positions its least and greatest value."""
    if EXPLICIT:
        y = row_scale * lookup(Psi, pi, pj, i0, j0, shift, psi_first, psi_last, 0, CLAMP, EXPLICIT, NVIDIA)
        return tl.min(y), tl.max(y)
    else:
        corner = i0 - j0 - (BLOCK_N - 1) + shift
        psi_low, psi_high = _bounds(PsiBounds, corner - psi_first, psi_last - psi_first, BOUNDS_BLOCK, NVIDIA)
        row_low, row_high = _bounds(RowBounds, i0 + shift - row_first, row_last - row_first, BOUNDS_BLOCK, NVIDIA)
        a, b, c, d = psi_low * row_low, psi_low * row_high, psi_high * row_low, psi_high * row_high
        return tl.minimum(tl.minimum(a, b), tl.minimum(c, d)), tl.maximum(tl.maximum(a, b), tl.maximum(c, d))


@triton.jit
def segments(
    i0, j0, pi, pj, shift, row_scale, Psi, psi_first, psi_last, PsiBounds, row_first, row_last, RowBounds, Knots,
    CLAMP: tl.constexpr, EXPLICIT: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDS_BLOCK: tl.constexpr,
    KNOTS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """The lowest and the highest segment that y can meet on the tile at (i0, j0)."""
    y_low, y_high = _range(
        i0, j0, pi, pj, shift, row_scale, Psi, psi_first, psi_last, PsiBounds, row_first, row_last, RowBounds,
        CLAMP, EXPLICIT, BLOCK_N, BOUNDS_BLOCK, NVIDIA,
    )  # fmt: skip
    low = _knots_below(Knots, y_low, KNOTS, NVIDIA)
    high = low
    if y_high > gather(Knots + low, 0, NVIDIA):
        high = _knots_below(Knots, y_high, KNOTS, NVIDIA)
    return low, high


@triton.jit
def next_line(
    line: Line, i0, j0, pi, pj, shift, row_scale, Psi, psi_first, psi_last, PsiBounds, row_first, row_last, RowBounds,
    Knots, slopes, intercepts, CLAMP: tl.constexpr, EXPLICIT: tl.constexpr, BLOCK_N: tl.constexpr,
    BOUNDS_BLOCK: tl.constexpr, KNOTS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """From the line of the tile before to that of the lowest segment on this tile, and the highest segment on it.

    `slopes` and `intercepts` [num_knots + 1] are the head's."""
    y_low, y_high = _range(
        i0, j0, pi, pj, shift, row_scale, Psi, psi_first, psi_last, PsiBounds, row_first, row_last, RowBounds,
        CLAMP, EXPLICIT, BLOCK_N, BOUNDS_BLOCK, NVIDIA,
    )  # fmt: skip
    high = line.segment
    if (y_low <= line.below) | (y_high > line.above):
        line = line_on(_knots_below(Knots, y_low, KNOTS, NVIDIA), Knots, slopes, intercepts, NVIDIA)
        high = line.segment
        if y_high > line.above:
            high = _knots_below(Knots, y_high, KNOTS, NVIDIA)
    return line, high


# Tiles that one call of runs() looks at.
AHEAD: tl.constexpr = tl.constexpr(64)


@triton.jit
def runs(
    i0, end, j0, shift, Psi, psi_first, psi_last, PsiBounds, row_first, row_last, RowBounds, Knots,
    EXPLICIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDS_BLOCK: tl.constexpr,
    KNOTS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """(straight, bent, segment): the tiles of queries i0 to `straight` lie in `segment` alone, and those from there to
    `bent` meet several segments each; neither run need be as long as it could. Of explicit positions all are bent."""
    end = tl.maximum(i0, end)
    if EXPLICIT:
        return i0, end, i0 * 0
    else:
        n = tl.arange(0, AHEAD)
        y_low, y_high = _range(
            i0 + BLOCK_M * n, j0, None, None, shift, None, Psi, psi_first, psi_last, PsiBounds,
            row_first, row_last, RowBounds, True, EXPLICIT, BLOCK_N, BOUNDS_BLOCK, NVIDIA,
        )  # fmt: skip
        low = _knots_below(Knots, y_low, KNOTS, NVIDIA)
        high = _knots_below(Knots, y_high, KNOTS, NVIDIA)
        segment = tl.sum(tl.where(n == 0, low, 0))
        straight = tl.min(tl.where((low == segment) & (high == segment), AHEAD, n))
        bent = tl.min(tl.where((n < straight) | (low != high), AHEAD, n))
        return tl.minimum(i0 + straight * BLOCK_M, end), tl.minimum(i0 + bent * BLOCK_M, end), segment


@triton.jit
def add_line(
    s, line: Line, high, unit, i0, j0, pi, pj, shift, row_scale, Psi, psi_first, psi_last, Knots, slopes,
    CLAMP: tl.constexpr, EXPLICIT: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """s plus the profile but for the line's intercept, in `unit`s to 1. `high` is the highest segment on the tile,
    None if that is the line's."""
    psi = by_distance(
        Psi, pi, pj, i0, j0, shift, psi_first, psi_last, 0, s.shape[0], s.shape[1], CLAMP, EXPLICIT, NVIDIA
    )
    # As an addition it would start the product's accumulators, and hold their registers while the product runs.
    s = tl.fma(psi, tl.broadcast_to(row_scale * (line.slope * unit), s.shape), s)
    # Each knot inside the tile bends the line from it on: one max and one FMA an element. The condition hides the
    # loop from the compiler, which pipelines only loops with no other directly inside.
    if high is not None:
        if high > line.segment:
            slope = line.slope
            for m in range(line.segment, high):
                psi = by_distance(
                    Psi, pi, pj, i0, j0, shift, psi_first, psi_last, m, s.shape[0], s.shape[1], CLAMP, EXPLICIT, NVIDIA
                )
                steeper = gather(slopes + m + 1, 0, NVIDIA)
                s += ((steeper - slope) * unit) * tl.maximum(psi * row_scale - gather(Knots + m, 0, NVIDIA), 0.0)
                slope = steeper
    return s
