"""A tile of one sequence, and the additive operands of HeadMix's inner and outer bias on it, for a group of heads."""

import triton
import triton.language as tl

from ..common.arguments import Operands, Positions
from ..common.bias import gather, joined, lookup, slope_tile
from ..common.masks import of_pairs
from ..common.profile import row_scales, segments
from ..common.sequences import SeqlenInfo, TileCoord
from .layout import half_of


@triton.jit
def open_tile(
    seq: SeqlenInfo, i0, j0, positions: Positions,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INSIDE: tl.constexpr, EXPLICIT: tl.constexpr,
):  # fmt: skip
    """INSIDE promises that all BLOCK_N keys exist; queries past the end are clamped to the last one in any case."""
    rows = tl.minimum(tl.arange(0, BLOCK_M), seq.q_len - 1 - i0)
    cols = tl.arange(0, BLOCK_N)
    if not INSIDE:
        cols = tl.maximum(tl.minimum(cols, seq.k_len - 1 - j0), -j0)
    i = (i0 + tl.arange(0, BLOCK_M))[None, :, None]
    j = (j0 + tl.arange(0, BLOCK_N))[None, None, :]
    i_in = (i0 + rows)[None, :, None]
    j_in = (j0 + cols)[None, None, :]
    pi = i_in
    pj = j_in
    if EXPLICIT:
        b64 = seq.b.to(tl.int64)
        pi = tl.load(positions.q + b64 * positions.q_batch + seq.q_start + i_in)
        pj = tl.load(positions.k + b64 * positions.k_batch + seq.k_start + j_in)
    none = i0 * 0
    offset = seq.offset
    return TileCoord(seq.b, none, seq.q_start, seq.k_start, i0, j0, offset, i, j, i_in, j_in, pi, pj, none)


@triton.jit
def halved(
    t: TileCoord, seq: SeqlenInfo, positions: Positions,
    GROUP: tl.constexpr, INSIDE: tl.constexpr, EXPLICIT: tl.constexpr,
):  # fmt: skip
    """The tile for a group whose heads take two warps each: j, j_in and pj [GROUP, 1, N / 2] are those of the warp's
    half of the keys, `first` [GROUP, 1, 1] counts from j0 where it begins."""
    N: tl.constexpr = t.j.shape[2] // 2
    first = (half_of(GROUP) * N)[:, None, None]
    cols = first + tl.arange(0, N)[None, None, :]
    j = t.j0 + cols
    if not INSIDE:
        cols = tl.maximum(tl.minimum(cols, seq.k_len - 1 - t.j0), -t.j0)
    j_in = t.j0 + cols
    pj = j_in
    if EXPLICIT:
        pj = tl.load(positions.k + seq.b.to(tl.int64) * positions.k_batch + seq.k_start + j_in)
    return TileCoord(t.b, t.h, t.q_start, t.k_start, t.i0, t.j0, t.offset, t.i, j, t.i_in, j_in, t.pi, pj, first)


@triton.jit
def group_tile(
    t: TileCoord, seq: SeqlenInfo, positions: Positions, g: tl.constexpr, CONFIG: tl.constexpr, INSIDE: tl.constexpr
):
    """The tile as group g's warps hold it."""
    if CONFIG.halves and g == CONFIG.groups - 1:
        return halved(t, seq, positions, CONFIG.group, INSIDE, CONFIG.explicit)
    else:
        return t


@triton.jit
def keys_exist(t: TileCoord, seq: SeqlenInfo):
    """Which of the tile's keys exist, [1 or GROUP, N]."""
    return tl.reshape((t.j >= 0) & (t.j < seq.k_len), [t.j.shape[0], t.j.shape[2]])


@triton.jit
def queries_exist(t: TileCoord, seq: SeqlenInfo):
    """Which of the tile's queries exist, [1, M]."""
    return tl.reshape(t.i < seq.q_len, [1, t.i.shape[1]])


@triton.jit
def head_offsets(heads, stride_h, CONFIG: tl.constexpr):
    """Where each head of a group begins: 32 bits if all heads are near, as each offset is kept through the loop."""
    return (heads.to(tl.int32) if CONFIG.near else heads) * stride_h


@triton.jit
def key_offsets(heads, stride_h, t: TileCoord, STEP: tl.constexpr, CONFIG: tl.constexpr):
    """Where the tile's first key of each head of a group lies, counted from key j0 of head 0."""
    first = tl.reshape(tl.broadcast_to(t.first, [heads.shape[0], 1, 1]), [heads.shape[0]])
    return head_offsets(heads, stride_h, CONFIG) + first * STEP


@triton.jit
def profile_tile(t: TileCoord, o: Operands, BIAS: tl.constexpr, CONFIG: tl.constexpr, NVIDIA: tl.constexpr):
    """(psi, row scale, lowest and highest segment) of a profile on the tile."""
    # A tile of halves has half of the keys for each warp.
    BLOCK_N: tl.constexpr = t.j.shape[2] if t.j.shape[0] == 1 else 2 * t.j.shape[2]
    row_scale = tl.load(row_scales(t.pi, t.offset, o, CONFIG.explicit))
    low, high = segments(t, row_scale, o, BLOCK_N, BIAS, CONFIG, NVIDIA)
    psi = lookup(o.psi, o.psi_first, o.psi_last, t, 0, BIAS.clamp, CONFIG.explicit, NVIDIA)
    return psi, row_scale, low, high


@triton.jit
def _by_distance(corner, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NVIDIA: tl.constexpr):
    """corner[head][m - n] for pointers [GROUP, 1, 1, 1], as [GROUP, BLOCK_M, BLOCK_N]; each value that stands at
    (m, n) and at (m + 8, n + 8), in one thread of a product's result, is loaded once (bias.by_distance)."""
    BLOCKS: tl.constexpr = BLOCK_N // 8
    d = 16 * tl.arange(0, BLOCK_M // 16)[None, :, None, None] + tl.arange(0, 8)[None, None, :, None]
    d -= tl.arange(0, 8)[None, None, None, :]
    before = gather(corner + (d + 8), 0, NVIDIA)
    pairs = ()
    for k in tl.static_range(0, BLOCKS):
        here = gather(corner + (d - 8 * k), 0, NVIDIA)
        pairs += (tl.join(here, before),)
        before = here
    tile = tl.reshape(joined(pairs, 0, 1, BLOCKS), [corner.shape[0], BLOCK_M // 16, 8, 8, 2, BLOCKS])
    return tl.reshape(tl.permute(tile, (0, 1, 4, 2, 5, 3)), [corner.shape[0], BLOCK_M, BLOCK_N])


@triton.jit
def heads_bias(t: TileCoord, heads, o: Operands, BIAS: tl.constexpr, CONFIG: tl.constexpr, NVIDIA: tl.constexpr):
    """The sum of a Bias's operands for the heads of a group."""
    h = heads[:, None, None]
    bias = None
    if o.slope is not None:
        slope = tl.load(o.slope + t.b * o.slope_batch + h)
        bias = slope_tile(slope, t, t.i0 + t.offset, False, BIAS.signed, CONFIG.explicit)
    if o.table is not None:
        table = o.table + h * o.table_head
        if BIAS.clamp or CONFIG.explicit or not NVIDIA:
            found = lookup(table, o.table_first, o.table_last, t, 0, BIAS.clamp, CONFIG.explicit, NVIDIA)
        else:
            corner = table + (t.i0 - t.j0 + t.offset - o.table_first).to(tl.int64) - t.first
            found = _by_distance(corner[:, :, :, None], t.i.shape[1], t.j.shape[2], NVIDIA)
        bias = found if bias is None else bias + found
    if o.psi is not None:
        psi, row_scale, low, high = profile_tile(t, o, BIAS, CONFIG, NVIDIA)
        line = h * (o.num_knots + 1)
        y = row_scale * psi
        found = y * tl.load(o.segment_slope + line + low) + tl.load(o.segment_intercept + line + low)
        if high > low:
            for m in range(low, high):
                own = y * tl.load(o.segment_slope + line + m + 1) + tl.load(o.segment_intercept + line + m + 1)
                found = tl.where(y > tl.load(o.knots + m), own, found)
        bias = found if bias is None else bias + found
    if o.dense is not None:
        found = tl.load(of_pairs(o.dense, o.dense_strides, t, h)).to(tl.float32)
        bias = found if bias is None else bias + found
    return bias
