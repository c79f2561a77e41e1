"""Sums along the diagonals of tiles, for gradients of what is indexed by distance: no atomic an element, no shuffle.

A thread of a tensor core's result holds rows r and r + 8 and columns 8 apart, so it first adds what it holds of one
distance: a tile [keys, queries] becomes, for each 16 keys, bands of 8 x 8 that step along the queries. The 8 rows of a
band go to memory of the program's own, one row after another, and come back one row after another and one column on,
so that a column holds one distance. What is stored in a step is read in the next, behind the step's barrier. As the
program walks the queries the bands of its tiles join: the last half of a band waits in registers for the next tile.
"""

import triton
import triton.language as tl

from .bf16x2 import add_bf16
from .codegen import opaque
from .dq_semaphore import publish, wait_for
from .mma_layout import load_shared

# Steps whose bands are in memory at once: one is written, its last band is also the head of the next, one is read.
SLOTS: tl.constexpr = tl.constexpr(4)


def bands_size(keys: int, queries: int) -> int:
    """Numbers that a program needs for tiles of `keys` x `queries`."""
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
def _slot(pointers, i0, GROUPS: tl.constexpr, QUERIES: tl.constexpr, NVIDIA: tl.constexpr):
    """The pointers, into the first slot, moved into that of the step at query i0: two instructions, and opaque to the
    compiler as codegen.opaque is."""
    BYTES: tl.constexpr = GROUPS * 8 * (QUERIES + 8) * (pointers.dtype.element_ty.primitive_bitwidth // 8)
    place = i0 & ((SLOTS - 1) * QUERIES)
    if NVIDIA:
        address = tl.inline_asm_elementwise(
            "mad.wide.u32 $0, $2, $3, $1;", "=l,l,r,r", [pointers.to(tl.int64), place, BYTES // QUERIES], tl.int64,
            is_pure=True, pack=1,
        )  # fmt: skip
        return address.to(pointers.dtype)
    else:
        return pointers + place * (GROUPS * 8 * (QUERIES + 8) // QUERIES)


@triton.jit
def _store(at, band, COLUMN: tl.constexpr, WHOLE: tl.constexpr, NVIDIA: tl.constexpr):
    pairs = band.reshape([band.shape[0], 8, 4, 2])
    if WHOLE and NVIDIA:
        even, odd = tl.split(pairs)
        at = (at + COLUMN).reshape(even.shape).to(tl.int64)
        if band.dtype == tl.bfloat16:
            even, odd = even.to(tl.int16, bitcast=True), odd.to(tl.int16, bitcast=True)
            tl.inline_asm_elementwise(
                "st.global.v2.b16 [$1], {$2, $3}; mov.b32 $0, 0;",
                "=r,l,h,h", [at, even, odd], tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        else:
            tl.inline_asm_elementwise(
                "st.global.v2.f32 [$1], {$2, $3}; mov.b32 $0, 0;",
                "=r,l,f,f", [at, even, odd], tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
    else:
        # Several warps may hold the same element; this stores it once.
        tl.store(at + (COLUMN + tl.arange(0, 2)[None, None, None, :]), pairs)


@triton.jit
def _rows(Bands, i0, GROUPS: tl.constexpr, QUERIES: tl.constexpr, NVIDIA: tl.constexpr):
    """Pointers [GROUPS, 8, 4, 1] to the rows of a step's bands, two columns apart."""
    row = tl.arange(0, GROUPS)[:, None, None, None] * 8 + tl.arange(0, 8)[None, :, None, None]
    offsets = row * (QUERIES + 8) + 2 * tl.arange(0, 4)[None, None, :, None]
    return _slot(Bands + offsets, i0, GROUPS, QUERIES, NVIDIA)


@triton.jit
def start_bands(Bands, i0, GROUPS: tl.constexpr, QUERIES: tl.constexpr, NVIDIA: tl.constexpr):
    """Prepares a walk from query i0 on; returns what it carries."""
    zero = tl.zeros([GROUPS, 8, 8], Bands.dtype.element_ty)
    _store(_rows(Bands, i0, GROUPS, QUERIES, NVIDIA), zero, 0, False, NVIDIA)
    before = _rows(Bands, i0 - QUERIES, GROUPS, QUERIES, NVIDIA)
    for n in tl.static_range(0, QUERIES // 8 + 1):
        _store(before, zero, 8 * n, False, NVIDIA)
    return zero


@triton.jit
def store_bands(Bands, i0, tile, carried, WHOLE: tl.constexpr, NVIDIA: tl.constexpr):
    """Stores the bands of the tile [keys, queries] at query i0, of the type of Bands; returns what the next step has to
    carry.

    WHOLE says that every warp has 16 keys of its own or more: then no two hold the same element of a band."""
    GROUPS: tl.constexpr = tile.shape[0] // 16
    BLOCKS: tl.constexpr = tile.shape[1] // 8
    split = tl.permute(tile.reshape([GROUPS, 2, 8, BLOCKS, 8]), 0, 2, 4, 1, 3)
    parts = _split(split.reshape([GROUPS, 8, 8, 2 * BLOCKS]), GROUPS, 2 * BLOCKS)
    at = _rows(Bands, i0, GROUPS, tile.shape[1], NVIDIA)
    band = _add(carried, parts[BLOCKS], NVIDIA)
    _store(at, band, 8, WHOLE, NVIDIA)
    for n in tl.static_range(0, BLOCKS - 1):
        band = _add(parts[n], parts[BLOCKS + n + 1], NVIDIA)
        _store(at, band, 8 * n + 16, WHOLE, NVIDIA)
    _store(_rows(Bands, i0 + tile.shape[1], GROUPS, tile.shape[1], NVIDIA), band, 0, WHOLE, NVIDIA)
    return parts[BLOCKS - 1]


@triton.jit
def _add(x, y, NVIDIA: tl.constexpr):
    return add_bf16(x, y, NVIDIA) if x.dtype == tl.bfloat16 else x + y


@triton.jit
def _load(pointers, after, NVIDIA: tl.constexpr):
    """What the program stored a step ago, as float32."""
    if NVIDIA and pointers.dtype.element_ty == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 zero, half;
            mov.b16 zero, 0;
            ld.global.b16 half, [$1];
            mov.b32 $0, {zero, half};
            }""",
            "=f,l,r", [pointers.to(tl.int64), after], tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return load_shared(pointers, after, NVIDIA).to(tl.float32)


@triton.jit
def add_bands(
    DValues, units, Bands, i0, after, j0, offset, first, last,
    GROUPS: tl.constexpr, QUERIES: tl.constexpr, CLAMP: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Adds the bands of the step before query i0 times `units` to DValues, int64, of distances first to last.

    Sum (g, n) is for the keys from 16 g on and queries from i0 + n - QUERIES - 16 on: the bands, and eight columns
    of those before, hold these distances whole. CLAMP false says that no distance is outside."""
    PITCH: tl.constexpr = QUERIES + 8
    PART: tl.constexpr = GROUPS // 2 if GROUPS > 1 else 1  # what follows group by group is a constant apart
    part = PART * tl.arange(0, GROUPS // PART)[:, None, None]
    group = tl.arange(0, PART)[:, None]
    n = tl.arange(0, QUERIES)[None, :]
    bands = Bands + (group * (8 * PITCH) + n)[None, :, :]
    bands = _slot(bands, i0 - QUERIES, GROUPS, QUERIES, NVIDIA) + part * (8 * PITCH)
    rows = bands[None, :, :, :] + tl.arange(0, 8)[:, None, None, None] * (PITCH + 1)
    sums = tl.sum(_load(rows, after, NVIDIA), 0)  # [GROUPS // PART, PART, QUERIES]
    corner = i0 - j0 + offset - first
    distance = (n - QUERIES - 16 - 16 * group)[None, :, :]
    if CLAMP:
        entry = tl.minimum(tl.maximum(corner + distance - 16 * part, 0), last - first)
        entries = DValues + entry
    else:
        entries = opaque((DValues + distance) + corner, after, NVIDIA) - 16 * part
    tl.atomic_add(entries, (sums * units).to(tl.int64), sem="relaxed")


@triton.jit
def finish_bands(
    DValues, units, Bands, end, carried, progress, done, j0, offset, first, last,
    GROUPS: tl.constexpr, QUERIES: tl.constexpr, WHOLE: tl.constexpr, CLAMP: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Adds what a walk left whose last step was before query `end`: its bands, and those that wait for another tile."""
    after = wait_for(progress, 0, NVIDIA)
    add_bands(DValues, units, Bands, end, after, j0, offset, first, last, GROUPS, QUERIES, CLAMP, NVIDIA)
    store_bands(Bands, end, tl.zeros([GROUPS * 16, QUERIES], carried.dtype), carried, WHOLE, NVIDIA)
    publish(progress, done, NVIDIA)
    after = wait_for(progress, 0, NVIDIA)
    add_bands(DValues, units, Bands, end + QUERIES, after, j0, offset, first, last, GROUPS, QUERIES, CLAMP, NVIDIA)
