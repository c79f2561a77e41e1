"""A tile of one sequence, and the additive operands of HeadMix's inner and outer bias on it, for a group of heads."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.bias import Operands, gather, joined, lookup, slope_tile
from ..common.masks import mask_offset, sequence
from ..common.profile import row_scales, segments
from .layout import half_of


class Sequence(NamedTuple):
    """One sequence: its batch entry, its first tokens in the tensors, its lengths, and where its positions are read."""

    b: Any
    q_start: Any
    k_start: Any
    q_len: Any
    k_len: Any
    offset: Any
    QPositions: Any
    stride_qpos: Any
    KPositions: Any
    stride_kpos: Any


class Tile(NamedTuple):
    """One tile of a sequence: true indices i [1, M, 1] and j [1, 1, N], the same clamped to the sequence (i_in, j_in),
    their positions (pi, pj), and the clamped rows [M] and columns [N] counted from i0 and j0."""

    b: Any
    i0: Any
    j0: Any
    rows: Any
    cols: Any
    i: Any
    j: Any
    i_in: Any
    j_in: Any
    pi: Any
    pj: Any
    shift: Any
    q_start: Any
    k_start: Any
    first: Any


@triton.jit
def open_sequence(
    index, KLengths, CuQ, CuK, q_tokens, k_tokens, QPositions, stride_qpos, KPositions, stride_kpos,
    TOP_LEFT: tl.constexpr,
):  # fmt: skip
    """Sequence `index` of the batch or of the packed documents."""
    q_start, k_start, q_len, k_len = sequence(KLengths, CuQ, CuK, index, q_tokens, k_tokens)
    b = index
    if CuQ is not None:
        b = index * 0
    if QPositions is None:  # Triton 3.6 returns tensors only
        QPositions = q_start
        KPositions = k_start
    offset = mask_offset(q_len, k_len, TOP_LEFT)
    return Sequence(b, q_start, k_start, q_len, k_len, offset, QPositions, stride_qpos, KPositions, stride_kpos)


@triton.jit
def open_tile(
    seq: Sequence, i0, j0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INSIDE: tl.constexpr, EXPLICIT: tl.constexpr
):
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
        pi = tl.load(seq.QPositions + b64 * seq.stride_qpos + seq.q_start + i_in)
        pj = tl.load(seq.KPositions + b64 * seq.stride_kpos + seq.k_start + j_in)
    return Tile(
        seq.b, i0, j0, rows, cols, i, j, i_in, j_in, pi, pj, seq.k_len - seq.q_len, seq.q_start, seq.k_start, i0 * 0
    )  # fmt: skip


@triton.jit
def halved(t: Tile, seq: Sequence, GROUP: tl.constexpr, INSIDE: tl.constexpr, EXPLICIT: tl.constexpr):
    """The tile for a group whose heads take two warps each: j, j_in and pj [GROUP, 1, N / 2] are those of the warp's
    half of the keys, `first` [GROUP, 1, 1] counts from j0 where it begins."""
    N: tl.constexpr = t.cols.shape[0] // 2
    first = (half_of(GROUP) * N)[:, None, None]
    cols = first + tl.arange(0, N)[None, None, :]
    j = t.j0 + cols
    if not INSIDE:
        cols = tl.maximum(tl.minimum(cols, seq.k_len - 1 - t.j0), -t.j0)
    j_in = t.j0 + cols
    pj = j_in
    if EXPLICIT:
        pj = tl.load(seq.KPositions + seq.b.to(tl.int64) * seq.stride_kpos + seq.k_start + j_in)
    return Tile(
        t.b, t.i0, t.j0, t.rows, t.cols, t.i, j, t.i_in, j_in, t.pi, pj, t.shift, t.q_start, t.k_start, first
    )  # fmt: skip


@triton.jit
def group_tile(t: Tile, seq: Sequence, g: tl.constexpr, F: tl.constexpr, INSIDE: tl.constexpr):
    """The tile as group g's warps hold it."""
    if F.halves and g == F.groups - 1:
        return halved(t, seq, F.group, INSIDE, F.explicit)
    else:
        return t


@triton.jit
def keys_exist(t: Tile, seq: Sequence):
    """Which of the tile's keys exist, [1 or GROUP, N]."""
    return tl.reshape((t.j >= 0) & (t.j < seq.k_len), [t.j.shape[0], t.j.shape[2]])


@triton.jit
def queries_exist(t: Tile, seq: Sequence):
    """Which of the tile's queries exist, [1, M]."""
    return tl.reshape(t.i < seq.q_len, [1, t.i.shape[1]])


@triton.jit
def head_offsets(heads, stride_h, F: tl.constexpr):
    """Where each head of a group begins: 32 bits if all heads are near, as each offset is kept through the loop."""
    return (heads.to(tl.int32) if F.near else heads) * stride_h


@triton.jit
def key_offsets(heads, stride_h, t: Tile, STEP: tl.constexpr, F: tl.constexpr):
    """Where the tile's first key of each head of a group lies, counted from key j0 of head 0."""
    first = tl.reshape(tl.broadcast_to(t.first, [heads.shape[0], 1, 1]), [heads.shape[0]])
    return head_offsets(heads, stride_h, F) + first * STEP


@triton.jit
def profile_tile(t: Tile, o: Operands, B: tl.constexpr, F: tl.constexpr, NVIDIA: tl.constexpr):
    """(psi, row scale, lowest and highest segment) of a profile on the tile."""
    BLOCK_N: tl.constexpr = t.cols.shape[0]
    row_scale = tl.load(row_scales(t.pi, t.shift, o, F.explicit))
    low, high = segments(t, row_scale, o, BLOCK_N, B, F, NVIDIA)
    psi = lookup(o.Psi, o.psi_first, o.psi_last, t, 0, B.clamp, F.explicit, NVIDIA)
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
def heads_bias(t: Tile, heads, o: Operands, B: tl.constexpr, F: tl.constexpr, NVIDIA: tl.constexpr):
    """The sum of a Bias's operands for the heads of a group."""
    h = heads[:, None, None]
    bias = None
    if o.Slope is not None:
        slope = tl.load(o.Slope + t.b * o.stride_slope_b + h)
        bias = slope_tile(slope, t, t.i0 + t.shift, False, B.signed, F.explicit)
    if o.Table is not None:
        table = o.Table + h * o.stride_table_h
        if B.clamp or F.explicit or not NVIDIA:
            found = lookup(table, o.table_first, o.table_last, t, 0, B.clamp, F.explicit, NVIDIA)
        else:
            corner = table + (t.i0 - t.j0 + t.shift - o.table_first).to(tl.int64) - t.first
            found = _by_distance(corner[:, :, :, None], t.rows.shape[0], t.j.shape[2], NVIDIA)
        bias = found if bias is None else bias + found
    if o.Psi is not None:
        psi, row_scale, low, high = profile_tile(t, o, B, F, NVIDIA)
        line = h * (o.num_knots + 1)
        y = row_scale * psi
        slope = tl.load(o.SegmentSlope + line + low)
        found = y * slope + tl.load(o.SegmentIntercept + line + low)
        if high > low:
            for m in range(low, high):
                steeper = tl.load(o.SegmentSlope + line + m + 1)
                found += (steeper - slope) * tl.maximum(y - tl.load(o.Knots + m), 0.0)
                slope = steeper
        bias = found if bias is None else bias + found
    if o.Dense is not None:
        tile = o.Dense + t.b.to(tl.int64) * o.stride_db + h * o.stride_dh
        tile += (t.q_start + t.i0).to(tl.int64) * o.stride_di + (t.k_start + t.j0).to(tl.int64) * o.stride_dj
        found = tl.load(tile + (t.i_in - t.i0) * o.stride_di + (t.j_in - t.j0) * o.stride_dj).to(tl.float32)
        bias = found if bias is None else bias + found
    return bias
