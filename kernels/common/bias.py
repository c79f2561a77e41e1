"""The additive operands of a plan on one tile of logits, one function each.

The distance of implicit positions is d = i + offset - j; kernels for explicit ones take positions instead, and
EXPLICIT.
"""

import triton
import triton.language as tl

from .codegen import opaque
from .sequences import TileCoord


@triton.jit
def plus_256(x):
    """256 + x as float32, for 0 <= x < 256: from 256 to 512 the last bit of the mantissa's top eight counts ones."""
    return (0x43800000 | (x << 15)).to(tl.float32, bitcast=True)


@triton.jit
def distance_tile(t: TileCoord, EXPLICIT: tl.constexpr):
    """The distances as float32, by one addition an element."""
    if EXPLICIT:
        return (t.pi - t.pj).to(tl.float32)
    else:
        return ((t.i0 - t.j0 + t.offset).to(tl.float32) + plus_256(t.pi - t.i0)) - plus_256(t.pj - t.j0)


@triton.jit
def slope_tile(slope, t: TileCoord, reference, LINEAR: tl.constexpr, SIGNED: tl.constexpr, EXPLICIT: tl.constexpr):
    """-slope * |d| (or * d). LINEAR, for d >= 0 throughout: -slope * (reference - j), a vector, which leaves
    -slope * (i + offset - reference) for the caller to add to the row's log-sum-exp: one FMA an element and no load.

    Converting int to float is the MUFU pipe's work, like exp2, so only scalars are converted: i - i0 and j - j0 are
    under 256 and become floats by their bits."""
    if EXPLICIT:
        d = (t.pi - t.pj).to(tl.float32)
        return -slope * (d if SIGNED else tl.abs(d))
    else:
        column = (t.j0 - reference - 256).to(tl.float32) + plus_256(t.pj - t.j0)
        if LINEAR:
            return slope * column
        else:
            d = (t.i0 + t.offset - reference - 256).to(tl.float32) + plus_256(t.pi - t.i0) - column
            return -slope * (d if SIGNED else tl.abs(d))


@triton.jit
def gather(pointers, again, NVIDIA: tl.constexpr):
    """Loads of one float32 an element, in the layout in which they are used.

    tl.load would be coalesced in another layout and staged through shared memory by cp.async, four bytes at a time:
    several times the cost of the load, which hits L1. `again`, a number the load does not use, keeps one load from
    being merged with another or leaving a loop, which would hold a register for every element in between."""
    if NVIDIA:
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l,r", [pointers.to(tl.int64), again], tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.load(pointers)


@triton.jit
def joined(parts, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """parts[FIRST], parts[FIRST + STEP], ... (COUNT of them) along new last axes of 2, which count them together."""
    if COUNT == 1:
        return parts[FIRST]
    else:
        return tl.join(joined(parts, FIRST, 2 * STEP, COUNT // 2), joined(parts, FIRST + STEP, 2 * STEP, COUNT // 2))


@triton.jit
def by_distance(
    Values, first, last, t: TileCoord, again,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CLAMP: tl.constexpr, EXPLICIT: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """lookup() for a whole tile [ROWS, COLUMNS], queries by keys or (where i has one row) keys by queries.

    In the layout of a tensor core's result a thread holds rows r and r + 8 and columns c, c + 8, c + 16, ...: the value
    at (r + 8, c + 8) is that at (r, c), so half of the loads are enough. The distances of rows and keys past the end
    are read too; the host has padded the values for them."""
    if EXPLICIT or ROWS < 16 or COLUMNS < 16:
        return lookup(Values, first, last, t, again, CLAMP, EXPLICIT, NVIDIA)
    else:
        SIGN: tl.constexpr = -1 if t.i.shape[0] == 1 else 1
        BLOCKS: tl.constexpr = COLUMNS // 8
        row = 16 * tl.arange(0, ROWS // 16)[:, None, None, None] + tl.arange(0, 8)[None, :, None, None]
        d = SIGN * (row - 2 * tl.arange(0, 4)[None, None, :, None])  # at the first of two columns side by side
        corner = t.i0 - t.j0 + t.offset - first
        if not CLAMP:
            # Pointers that the compiler does not see through: all loads then share them, and steps fit the instruction.
            d = opaque((Values + d) + corner, again, NVIDIA)
        before = _at(d, SIGN * 8, SIGN, Values, corner, last - first, again, CLAMP, NVIDIA)
        pairs = ()
        for k in tl.static_range(0, BLOCKS):
            here = _at(d, -SIGN * 8 * k, SIGN, Values, corner, last - first, again, CLAMP, NVIDIA)
            pairs = pairs + (tl.join(here, before),)  # noqa: RUF005 - the compiler knows no starred tuples
            before = here
        tile = joined(pairs, 0, 1, BLOCKS).reshape([ROWS // 16, 8, 8, 2, BLOCKS])
        return tl.permute(tile, 0, 3, 1, 4, 2).reshape([ROWS, COLUMNS])


@triton.jit
def _at(at, step, SIGN: tl.constexpr, Values, corner, last, again, CLAMP: tl.constexpr, NVIDIA: tl.constexpr):
    """[ROWS // 16, 8, 8] values `step` from `at`, [ROWS // 16, 8, 4, 1] distances from the corner, or pointers."""
    at = at + (step - SIGN * tl.arange(0, 2)[None, None, None, :])
    if CLAMP:
        at = Values + tl.minimum(tl.maximum(corner + at, 0), last)
    return gather(at, again, NVIDIA).reshape([at.shape[0], 8, 8])


@triton.jit
def entry_of(t: TileCoord, first, last):
    """Which entry of values by distance, from `first` to `last`, explicit positions fall on."""
    return tl.minimum(tl.maximum(t.pi - t.pj, first), last) - first


@triton.jit
def lookup(Values, first, last, t: TileCoord, again, CLAMP: tl.constexpr, EXPLICIT: tl.constexpr, NVIDIA: tl.constexpr):
    """Values[clamp(d, first, last) - first]; CLAMP false says that the tile lies inside."""
    if EXPLICIT:
        pointers = Values + entry_of(t, first, last)
    elif CLAMP:
        pointers = Values + (tl.minimum(tl.maximum(t.pi - t.pj + t.offset, first), last) - first)
    else:
        # A scalar pointer, one per row, then constants along the row, which fold into the load's immediate offset.
        corner = Values + (t.offset - first + t.i0 - t.j0).to(tl.int64)
        pointers = (corner + (t.pi - t.i0)) - (t.pj - t.j0)
    return gather(pointers, again, NVIDIA)
