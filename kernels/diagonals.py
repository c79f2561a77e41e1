"""Sums along the diagonals of tiles, for gradients of what is indexed by distance: no atomic an element, no shuffle.

A thread of a tensor core's result holds rows r and r + 8 and columns 8 apart, so it first adds what it holds of one
distance: a tile [keys, queries] becomes, for each 16 keys, bands of 8 x 8 that step along the queries. The 8 rows of a
band go to memory of the program's own, one row after another, and come back one row after another and one column on,
so that a column holds one distance. What is stored in a step is read in the next, behind the step's barrier. As the
program walks the queries the bands of its tiles join: the last half of a band waits in registers for the next tile.
"""

import triton
import triton.language as tl

from .bias import gather
from .turns import load_shared, opaque, publish, store_shared, wait_for

# Steps whose bands are in memory at once: one is written, its last band is also the head of the next, one is read.
SLOTS: tl.constexpr = tl.constexpr(4)


def bands_size(keys: int, queries: int) -> int:
    """float32 numbers that a program needs for tiles of `keys` x `queries`."""
    return SLOTS.value * (keys // 2) * (queries + 8)


@triton.jit
def _split(tile, GROUPS: tl.constexpr, COUNT: tl.constexpr):
    """[GROUPS, 8, 8, COUNT] as COUNT tiles [GROUPS, 8, 8]."""
    if COUNT == 1:
        return (tile.reshape([GROUPS, 8, 8]),)
    else:
        even, odd = tl.split(tile.reshape([GROUPS, 8, 8, COUNT // 2, 2]))
        evens = _split(even, GROUPS, COUNT // 2)
        odds = _split(odd, GROUPS, COUNT // 2)
        parts = ()
        for n in tl.static_range(0, COUNT // 2):
            parts = parts + (evens[n], odds[n])  # noqa: RUF005 - the compiler knows no starred tuples
        return parts


@triton.jit
def _slot(Bands, step, GROUPS: tl.constexpr, QUERIES: tl.constexpr):
    return Bands + (step & (SLOTS - 1)) * (GROUPS * 8 * (QUERIES + 8))


@triton.jit
def _store(at, band, COLUMN: tl.constexpr, WHOLE: tl.constexpr, NVIDIA: tl.constexpr):
    pairs = band.reshape([band.shape[0], 8, 4, 2])
    pointers = at + (COLUMN + tl.arange(0, 2)[None, None, None, :])
    if WHOLE:
        store_shared(pointers, pairs, tl.full(pairs.shape, 1, tl.int1), False, NVIDIA)
    else:
        # Several warps may hold the same element; this stores it once.
        tl.store(pointers, pairs)


@triton.jit
def _rows(Bands, step, turn, GROUPS: tl.constexpr, QUERIES: tl.constexpr, NVIDIA: tl.constexpr):
    """Pointers [GROUPS, 8, 4, 1] to the rows of a step's bands, two columns apart."""
    row = tl.arange(0, GROUPS)[:, None, None, None] * 8 + tl.arange(0, 8)[None, :, None, None]
    offsets = row * (QUERIES + 8) + 2 * tl.arange(0, 4)[None, None, :, None]
    return opaque(_slot(Bands, step, GROUPS, QUERIES) + offsets, turn, NVIDIA)


@triton.jit
def start_bands(Bands, step, GROUPS: tl.constexpr, QUERIES: tl.constexpr, NVIDIA: tl.constexpr):
    """Prepares a walk whose first step is `step`; returns what it carries."""
    zero = tl.zeros([GROUPS, 8, 8], tl.float32)
    at = _rows(Bands, step, step, GROUPS, QUERIES, NVIDIA)
    tl.store(at + tl.arange(0, 2)[None, None, None, :], zero.reshape([GROUPS, 8, 4, 2]))
    return zero


@triton.jit
def store_bands(Bands, step, tile, carried, WHOLE: tl.constexpr, NVIDIA: tl.constexpr):
    """Stores the bands of a tile [keys, queries]; returns what the next step is to carry.

    WHOLE says that every warp has 16 keys of its own or more: then no two hold the same element of a band."""
    GROUPS: tl.constexpr = tile.shape[0] // 16
    BLOCKS: tl.constexpr = tile.shape[1] // 8
    split = tl.permute(tile.reshape([GROUPS, 2, 8, BLOCKS, 8]), 0, 2, 4, 1, 3)
    parts = _split(split.reshape([GROUPS, 8, 8, 2 * BLOCKS]), GROUPS, 2 * BLOCKS)
    at = _rows(Bands, step, step, GROUPS, tile.shape[1], NVIDIA)
    band = carried + parts[BLOCKS]
    _store(at, band, 8, WHOLE, NVIDIA)
    for n in tl.static_range(0, BLOCKS - 1):
        band = parts[n] + parts[BLOCKS + n + 1]
        _store(at, band, 8 * n + 16, WHOLE, NVIDIA)
    _store(_rows(Bands, step + 1, step, GROUPS, tile.shape[1], NVIDIA), band, 0, WHOLE, NVIDIA)
    return parts[BLOCKS - 1]


@triton.jit
def add_bands(
    DValues, Units, Bands, step, turn, stored, j0, shift, first, last,
    GROUPS: tl.constexpr, QUERIES: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Adds a step's bands, if they were `stored`, to DValues, int64 in Units ([1]), of distances first to last.

    Entry (g, n) of the sums is for the keys from 16 g on and queries from n - 16 on of the step's: its bands, and eight
    columns of those before, hold these distances whole."""
    PITCH: tl.constexpr = QUERIES + 8
    group = tl.arange(0, GROUPS)[None, :, None]
    at = opaque(
        _slot(Bands, step, GROUPS, QUERIES) + group * (8 * PITCH) + tl.arange(0, QUERIES)[None, None, :], turn, NVIDIA
    )
    rows = load_shared(at + tl.arange(0, 8)[:, None, None] * (PITCH + 1), turn, NVIDIA)
    sums = tl.where(stored, tl.sum(rows, 0), 0.0)  # [GROUPS, QUERIES]
    key = j0 + 16 * tl.arange(0, GROUPS)[:, None]
    distance = step * QUERIES - 16 + shift + tl.arange(0, QUERIES)[None, :] - key
    entry = tl.minimum(tl.maximum(distance, first), last) - first
    units = gather(Units, turn, NVIDIA)
    tl.atomic_add(DValues + entry, (sums * units).to(tl.int64), sem="relaxed")


@triton.jit
def finish_bands(
    DValues, Units, Bands, end, carried, progress, done, j0, shift, first, last,
    GROUPS: tl.constexpr, QUERIES: tl.constexpr, WHOLE: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Adds what a walk left that ended before step `end`: its last bands, and those that wait for another tile."""
    turn = wait_for(progress, 0, NVIDIA)
    add_bands(DValues, Units, Bands, end - 1, turn, True, j0, shift, first, last, GROUPS, QUERIES, NVIDIA)
    store_bands(Bands, end, tl.zeros([GROUPS * 16, QUERIES], tl.float32), carried, WHOLE, NVIDIA)
    publish(progress, done, NVIDIA)
    turn = wait_for(progress, 0, NVIDIA)
    add_bands(DValues, Units, Bands, end, turn, True, j0, shift, first, last, GROUPS, QUERIES, NVIDIA)
