"""The additive operands of a plan on one tile of logits, one function each.

i and j are int32 indices inside the sequence, shaped to broadcast: [BLOCK_M, 1] and [1, BLOCK_N], or transposed. The
distance of implicit positions is d = i + shift - j; kernels for explicit ones pass positions instead and EXPLICIT.
"""

import triton
import triton.language as tl


@triton.jit
def slope_tile(slope, i, j, shift, reference, LINEAR: tl.constexpr, SIGNED: tl.constexpr, EXPLICIT: tl.constexpr):
    """-slope * |d| (or * d). LINEAR, for d >= 0 throughout: -slope * (reference - j), a vector, which leaves
    -slope * (i + shift - reference) for the caller to add to the row's log-sum-exp: one FMA an element and no load."""
    if LINEAR:
        return slope * (j - reference).to(tl.float32)
    elif EXPLICIT:
        d = (i - j).to(tl.float32)
        return -slope * (d if SIGNED else tl.abs(d))
    else:
        d = (i + (shift - reference)).to(tl.float32) - (j - reference).to(tl.float32)
        return -slope * (d if SIGNED else tl.abs(d))


@triton.jit
def lookup(Values, i, j, shift, first, last, CLAMP: tl.constexpr, EXPLICIT: tl.constexpr):
    """Values[clamp(d, first, last) - first]; CLAMP false says that the tile lies inside."""
    if EXPLICIT:
        index = tl.minimum(tl.maximum(i - j, first), last) - first
        return tl.load(Values + index)
    elif CLAMP:
        index = tl.minimum(tl.maximum(i - j + shift, first), last) - first
        return tl.load(Values + index)
    else:
        # 64-bit from the start, so that a thread's elements differ by constants that fold into the load's offset.
        return tl.load(Values + (shift - first) + (i.to(tl.int64) - j.to(tl.int64)))


@triton.jit
def _bounds(Bounds, lo, hi, last, BLOCK: tl.constexpr):
    """Least and greatest entry of two blocks that hold entries lo .. hi, from [blocks, 2] made by the host."""
    first_block = tl.minimum(tl.maximum(lo, 0), last) // BLOCK
    last_block = tl.minimum(tl.maximum(hi, 0), last) // BLOCK
    low = tl.minimum(tl.load(Bounds + 2 * first_block), tl.load(Bounds + 2 * last_block))
    high = tl.maximum(tl.load(Bounds + 2 * first_block + 1), tl.load(Bounds + 2 * last_block + 1))
    return low, high


@triton.jit
def profile_segments(
    PsiBounds, RowBounds, Knots, num_knots, i0, j0, shift, psi_first, psi_last, row_first, row_last,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDS_BLOCK: tl.constexpr, KNOTS: tl.constexpr,
):
    """The lowest and the highest segment that y = psi * row_scale can meet on the tile at (i0, j0).

    Bounds of psi over the tile's distances times bounds of the row scale over its rows: never too narrow, as rounding
    is monotone; where they are too wide a knot outside costs time alone."""
    psi_low, psi_high = _bounds(
        PsiBounds, i0 - j0 - (BLOCK_N - 1) + shift - psi_first, i0 - j0 + (BLOCK_M - 1) + shift - psi_first,
        psi_last - psi_first, BOUNDS_BLOCK,
    )  # fmt: skip
    row_low, row_high = _bounds(
        RowBounds, i0 + shift - row_first, i0 + (BLOCK_M - 1) + shift - row_first, row_last - row_first, BOUNDS_BLOCK
    )
    y_low = tl.minimum(
        tl.minimum(psi_low * row_low, psi_low * row_high), tl.minimum(psi_high * row_low, psi_high * row_high)
    )
    y_high = tl.maximum(
        tl.maximum(psi_low * row_low, psi_low * row_high), tl.maximum(psi_high * row_low, psi_high * row_high)
    )
    offs = tl.arange(0, KNOTS)
    knots = tl.load(Knots + offs, mask=offs < num_knots, other=float("inf"))
    return tl.sum((knots < y_low).to(tl.int32)), tl.sum((knots < y_high).to(tl.int32))


@triton.jit
def profile_tile(psi, row_scale, Knots, Slope, Intercept, low, high):
    """A * y + C on segment `low`, and a hinge for each knot up to segment `high`; Slope and Intercept are a head's."""
    slope = tl.load(Slope + low)
    bias = psi * (row_scale * slope) + tl.load(Intercept + low)
    if high > low:
        for m in range(low, high):
            steeper = tl.load(Slope + m + 1)
            bias += (steeper - slope) * tl.maximum(psi * row_scale - tl.load(Knots + m), 0.0)
            slope = steeper
    return bias
