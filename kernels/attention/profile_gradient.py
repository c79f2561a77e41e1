"""What a tile adds to the gradients of psi, of a profile's lines and of its row scale.

Sums over a tile on one line are carried to the next, and written out when the walk comes to another segment. A tile
with knots inside it, which is seldom, adds nothing to them: each of its segments has its own, element by element. Those
of ds * psi by query are added within a thread, go to memory of the program's own, and come back in the next step as
rows of one thread: no shuffle. They are the row scale's gradient and, times it, that of the slope.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.arguments import Operands
from ..common.bias import gather
from ..common.codegen import opaque
from ..common.mma_layout import by_query, load_shared, store_shared
from ..common.profile import Line, line_on, on_segment, psi_tile
from ..common.sequences import TileCoord

# Rows of a query's parts that are not added in registers: with as many threads as parts and queries no thread idles.
SPLIT: tl.constexpr = tl.constexpr(4)


class LineSums(NamedTuple):
    """Where a program's sums over lines go, for one head: Segments [2, W + 1], which no other program adds to; those by
    query, DRowScale, int64 in `units`, from the sequence's first query on; and Parts, memory of the program's own."""

    Segments: Any
    DRowScale: Any
    units: Any
    Parts: Any


def parts_size(keys: int, queries: int, warps: int) -> int:
    """float32 numbers that a program needs for tiles of `keys` x `queries`: of one step and the one before."""
    return 2 * 8 * parts(keys, warps) * queries


def parts(keys: int, warps: int) -> int:
    """How many warps hold different keys of a tile."""
    return min(warps, keys // 16)


@triton.jit
def _slot(Parts, step, PARTS: tl.constexpr, QUERIES: tl.constexpr):
    return Parts + (step & 1) * (8 * PARTS * QUERIES)


@triton.jit
def store_parts(Parts, step, ds, psi, weight, PARTS: tl.constexpr, WHOLE: tl.constexpr, NVIDIA: tl.constexpr):
    """Stores the sums over a thread's keys of ds * psi, two tiles [keys, queries], times `weight`."""
    GROUPS: tl.constexpr = ds.shape[0] // 16
    QUERIES: tl.constexpr = ds.shape[1]
    product = tl.reshape(ds * psi, [GROUPS // PARTS, PARTS, 2, 8, QUERIES])
    sums = tl.reshape(tl.sum(tl.sum(product, 2), 0), [8 * PARTS, QUERIES]) * weight
    row = _slot(Parts, step, PARTS, QUERIES) + QUERIES * tl.arange(0, 8 * PARTS)[:, None]
    at = by_query(row, 1, step, QUERIES, NVIDIA)
    if WHOLE:
        store_shared(at, sums, tl.full(sums.shape, 1, tl.int1), False, NVIDIA)
    else:
        # Several warps may hold the same element; this stores it once.
        tl.store(at, sums)


@triton.jit
def add_parts(
    sums: LineSums, step, after, stored, slope, moment, q_len, offset, QPositions, o: Operands,
    PARTS: tl.constexpr, QUERIES: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Adds what step `step` stored, if it was `stored`, to DRowScale, and returns `moment` [SPLIT, QUERIES] with its
    products with the row scale added.

    `slope` is that of the step's line. QPositions (None: implicit) are those of the sequence's first query on."""
    query = step * QUERIES + tl.arange(0, QUERIES)[None, :]
    inside = (query >= 0) & (query < q_len)
    if QPositions is not None:
        position = tl.load(QPositions + query, mask=inside, other=0)
    else:
        position = query + offset
    entry = tl.minimum(tl.maximum(position, o.row_first), o.row_last) - o.row_first
    own = QUERIES * tl.arange(0, SPLIT)[:, None] + tl.arange(0, QUERIES)[None, :]
    at = opaque(_slot(sums.Parts, step, PARTS, QUERIES) + own, after, NVIDIA)
    rows = (SPLIT * QUERIES) * tl.arange(0, 8 * PARTS // SPLIT)[:, None, None]
    rows = load_shared(at[None, :, :] + rows, after, NVIDIA)
    found = tl.where(stored, tl.sum(rows, 0), 0.0)  # [SPLIT, QUERIES]
    gradient = (found * (slope * sums.units)).to(tl.int64)
    tl.atomic_add(tl.broadcast_to(sums.DRowScale + query, own.shape), gradient, inside, sem="relaxed")
    return moment + found * gather(o.row_scale + entry, after, NVIDIA)


@triton.jit
def _write(sums: LineSums, segment, num_knots, of_ds, of_dsy):
    """Adds two numbers to a segment's sums, in the program's own order."""
    tl.atomic_add(sums.Segments + segment, of_ds, sem="relaxed")
    tl.atomic_add(sums.Segments + num_knots + 1 + segment, of_dsy, sem="relaxed")


@triton.jit
def by_thread(tile, PARTS: tl.constexpr):
    """The sums [PARTS, 8, 4] of what each thread holds of a tile [keys, queries] in a tensor core's result."""
    KEYS: tl.constexpr = tile.shape[0]
    QUERIES: tl.constexpr = tile.shape[1]
    parts = tl.reshape(tile, [KEYS // (16 * PARTS), PARTS, 2, 8, QUERIES // 8, 4, 2])
    return tl.sum(tl.sum(tl.sum(tl.sum(parts, 6), 4), 2), 0)


@triton.jit
def leave_segment(sums: LineSums, segment, following, num_knots, of_ds, of_dsy):
    """Writes out the sums of `segment` if the next tile lies in another, `following`; returns what is left to carry."""
    if segment != following:
        _write(sums, segment, num_knots, tl.sum(of_ds), tl.sum(of_dsy))
        of_ds = tl.zeros(of_ds.shape, tl.float32)
        of_dsy = tl.zeros(of_dsy.shape, tl.float32)
    return of_ds, of_dsy


@triton.jit
def psi_gradient(ds, line: Line, row_scale):
    """The gradient of psi of elements on one line."""
    return ds * (row_scale * line.slope)


@triton.jit
def add_segments(
    ds, line: Line, high, sums, q_len, t: TileCoord, row_scale, o: Operands,
    QUERIES: tl.constexpr, CONFIG: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """The gradient of psi on a tile of the segments line.segment .. high. Unless `sums` (LineSums) is None, adds each
    segment's sums of ds and ds * y, and what it makes of the row scale's gradient.

    QUERIES is the axis of the queries in ds and row_scale."""
    scales = tl.sum(row_scale, 1 - QUERIES)  # drops its axis of one
    dpsi = tl.zeros(ds.shape, tl.float32)
    for m in range(line.segment, high + 1):
        psi = psi_tile(t, o, m, ds.shape[0], ds.shape[1], CONFIG, NVIDIA)
        own = line_on(m, o, t.h, NVIDIA)
        part = on_segment(ds, psi, row_scale, own, NVIDIA)
        dpsi += psi_gradient(part, own, row_scale)
        if sums is not None:
            by_query = tl.sum(part * psi, 1 - QUERIES)
            _write(sums, m, o.num_knots, tl.sum(tl.sum(part, 1 - QUERIES)), tl.sum(by_query * scales))
            query = t.i0 + tl.arange(0, ds.shape[QUERIES])
            gradient = (by_query * (own.slope * sums.units)).to(tl.int64)
            tl.atomic_add(sums.DRowScale + query, gradient, query < q_len, sem="relaxed")
    return dpsi
