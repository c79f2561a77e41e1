"""HeadMix scores: the logits of every head on one tile, from dot products to mask, and their gradient on the way back.

The forward and backward kernels of the family share these functions, so they cannot disagree. Tiles of all heads are
tuples of [GROUP, BLOCK_M, BLOCK_N], one for each group of heads (layout.py).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.arguments import Dropout, Mask, Operands, Positions, Shape
from ..common.masks import allowed, of_pairs
from ..common.scores import LOG2E, cap
from ..common.sequences import SeqlenInfo, TileCoord
from .bias import group_tile, heads_bias
from .layout import own_half, rows_of_halves, rows_of_heads, tiles_of_heads
from .mlp import Weights, first_layer, into_hidden, leaky, out_of_hidden, rows_by_distance


class Mix(NamedTuple):
    """What makes logits of dot products: biases, mask, positions and dropout; rows and rows_first as in
    mlp.MixWeights."""

    inner: Operands
    outer: Operands
    rows: Any
    rows_first: Any
    scale: Any
    softcap: Any
    heads: Any
    mask: Mask
    positions: Positions
    dropout: Dropout


@triton.jit
def head_groups(shape: Shape, CONFIG: tl.constexpr):
    """The query heads of each group and the key heads that they read, int64; those past the last one repeat it."""
    heads = ()
    keys = ()
    GROUP: tl.constexpr = CONFIG.group
    GROUPS: tl.constexpr = CONFIG.groups
    for g in tl.static_range(GROUPS):
        own = tl.arange(0, GROUP)
        if CONFIG.halves and g == GROUPS - 1:
            own = own % (GROUP // 2)
        h = tl.minimum(g * GROUP + own, shape.heads - 1)
        heads += (h.to(tl.int64),)
        keys += ((h // shape.group).to(tl.int64),)
    return heads, keys


@triton.jit
def _plus_rows(x, rows, PRECISION: tl.constexpr):
    """x + rows, for rows [GROUP, M, N] in the dtype of products, as one more product, with the identity: tensor cores
    add them where x lies, and the compiler does not carry the rows' layout into x, whose sums over keys would then go
    through memory."""
    if rows.dtype.primitive_bitwidth == 16:
        M: tl.constexpr = x.shape[1]
        i = tl.arange(0, M)
        ones = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(rows.dtype)
        ones = tl.broadcast_to(ones[None, :, :], [x.shape[0], M, M])
        return tl.dot(ones, rows, x, input_precision=PRECISION)
    else:
        return x + rows


@triton.jit
def _masked(s, t: TileCoord, seq: SeqlenInfo, heads, m: Mix, CONFIG: tl.constexpr, INSIDE: tl.constexpr):
    if not INSIDE:
        ok = allowed(t, seq, m.mask, CONFIG) & (t.j >= 0)
        s = tl.where(ok, s, float("-inf"))
    if m.mask.boolean is not None:
        sees = tl.load(of_pairs(m.mask.boolean, m.mask.boolean_strides, t, heads[:, None, None]))
        s = tl.where(sees, s, float("-inf"))
    return s


@triton.jit
def _positions_halved(x, PART: tl.constexpr):
    """The positions of rows [HEADS, P] in two parts, PART by PART."""
    H: tl.constexpr = x.shape[0]
    P: tl.constexpr = x.shape[1]
    low, high = tl.split(tl.permute(tl.reshape(x, [H, P // (2 * PART), 2, PART]), (0, 1, 3, 2)))
    return tl.reshape(low, [H, P // 2]), tl.reshape(high, [H, P // 2])


@triton.jit
def _hidden(
    x, halves, inner, w: Weights, CONFIG: tl.constexpr, CHUNKS: tl.constexpr, PART: tl.constexpr, NVIDIA: tl.constexpr
):
    """(hidden units [P, WIDTH] in the dtype of products; pre-activation [P, WIDTH], of the last part only if the
    positions go through in CHUNKS parts, PART at a time, so that it takes fewer registers)."""
    P: tl.constexpr = x.shape[1]
    if CHUNKS == 1:
        before = first_layer(x, halves, inner, w, CONFIG)
        return leaky(before, x.dtype, NVIDIA), before
    else:
        x0, x1 = _positions_halved(x, PART)
        halves0, halves1 = _positions_halved(halves, PART)
        inner0 = inner
        inner1 = inner
        if CONFIG.concat:
            inner = tl.permute(tl.reshape(inner, [P // (2 * PART), 2, PART, CONFIG.heads]), (0, 2, 3, 1))
            inner0, inner1 = tl.split(inner)
            inner0 = tl.reshape(inner0, [P // 2, CONFIG.heads])
            inner1 = tl.reshape(inner1, [P // 2, CONFIG.heads])
        low, before = _hidden(x0, halves0, inner0, w, CONFIG, CHUNKS // 2, PART // 2, NVIDIA)
        high, before = _hidden(x1, halves1, inner1, w, CONFIG, CHUNKS // 2, PART // 2, NVIDIA)
        low = tl.reshape(low, [P // (2 * PART), PART, CONFIG.width])
        both = tl.join(low, tl.reshape(high, [P // (2 * PART), PART, CONFIG.width]))
        return tl.reshape(tl.permute(both, (0, 3, 1, 2)), [P, CONFIG.width]), before


@triton.jit
def mixed_logits(
    dots, t: TileCoord, seq: SeqlenInfo, heads, w: Weights, m: Mix, CONFIG: tl.constexpr,
    SCALED: tl.constexpr, INSIDE: tl.constexpr, CHUNKS: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """(logits less b2, -inf where masked; x's derivatives by the dot products; rows of x [HEADS, P]; rows of the inner
    bias [P, HEADS]; pre-activation [P, WIDTH]) from dot products, which have the scale already if they are SCALED."""
    PRECISION: tl.constexpr = CONFIG.precision
    GROUPS: tl.constexpr = len(dots)
    GROUP: tl.constexpr = dots[0].shape[0]
    M: tl.constexpr = t.i.shape[1]
    N: tl.constexpr = t.j.shape[2]
    T: tl.constexpr = w.w1x.dtype
    INNER: tl.constexpr = CONFIG.inner
    OUTER: tl.constexpr = CONFIG.outer
    kept = ()
    slacks = ()
    mlp_rows = ()
    inner_tiles = ()
    for g in tl.static_range(GROUPS):
        x = dots[g] if SCALED else dots[g] * m.scale
        slack = 1.0
        if m.softcap is not None:
            x, slack = cap(x, m.softcap)
        row = x
        own = group_tile(t, seq, m.positions, g, CONFIG, INSIDE)
        if CONFIG.has_inner:
            inner = heads_bias(own, heads[g], m.inner, INNER, CONFIG, NVIDIA)
            if not CONFIG.concat:
                row = x + inner
            elif m.rows is None:
                inner_tiles += (inner.to(T),)
            if CONFIG.residual:
                x += inner
        kept += (x,)
        slacks += (slack,)
        mlp_rows += (row.to(T),)
    if CONFIG.halves:
        x_rows = rows_of_heads((mlp_rows[0],), GROUP)
        half_rows = rows_of_halves(mlp_rows[1])
    else:
        x_rows = rows_of_heads(mlp_rows, CONFIG.heads)
        half_rows = x_rows
    if CONFIG.concat and m.rows is not None:
        corner = t.i0 - t.j0 + t.offset - m.rows_first
        inner_rows = rows_by_distance(m.rows, corner, M, N, CONFIG.heads, NVIDIA)
    elif CONFIG.concat:
        inner_rows = tl.permute(rows_of_heads(inner_tiles, CONFIG.heads), (1, 0))
    else:
        inner_rows = tl.permute(x_rows, (1, 0))
    hidden, before = _hidden(x_rows, half_rows, inner_rows, w, CONFIG, CHUNKS, M * 8, NVIDIA)
    mixed = out_of_hidden(w.w2, hidden, CONFIG.group, PRECISION)
    if not CONFIG.halves:
        mixed = mixed.to(T)
    mixed = tiles_of_heads(mixed, GROUP, M, N)
    if CONFIG.halves:
        mixed = (mixed[0], own_half(mixed[1]))
    logits = ()
    for g in tl.static_range(GROUPS):
        own = group_tile(t, seq, m.positions, g, CONFIG, INSIDE)
        s = _plus_rows(kept[g], mixed[g].to(T), PRECISION)
        if CONFIG.has_outer:
            s += heads_bias(own, heads[g], m.outer, OUTER, CONFIG, NVIDIA)
        logits += (_masked(s, own, seq, heads[g], m, CONFIG, INSIDE),)
    return logits, slacks, x_rows, inner_rows, before


@triton.jit
def keep_heads(t: TileCoord, heads, m: Mix):
    """dropout.keep_tile for the heads of a group, [GROUP, BLOCK_M, BLOCK_N]."""
    seed = m.dropout.seed.to(tl.uint64, bitcast=True)
    i = t.q_start + t.i
    j = t.k_start + t.j
    bh = (t.b * m.heads + heads.to(tl.int32))[:, None, None]
    w0, w1, w2, w3 = tl.philox(seed, j >> 2, i, bh, 0, 10)
    low = tl.where(j % 2 == 0, w0, w1)
    high = tl.where(j % 2 == 0, w2, w3)
    return tl.where(j % 4 < 2, low, high) >= m.dropout.threshold.to(tl.uint32, bitcast=True)


@triton.jit
def logit_gradient(s, dp, lse2, delta, t: TileCoord, heads, m: Mix):
    """(weights as they met the values, gradient of the logits) of a group; dp is dO by V, lse2 and delta [GROUP, M]."""
    p = tl.exp2(s * LOG2E - lse2[:, :, None])
    kept = p
    if m.dropout.threshold is not None:
        keep = keep_heads(t, heads, m)
        kept = tl.where(keep, p * m.dropout.keep_scale, 0.0)
        dp = tl.where(keep, dp * m.dropout.keep_scale, 0.0)
    return kept, p * (dp - delta[:, :, None])


@triton.jit
def mlp_gradient(ds, before, w: Weights, CONFIG: tl.constexpr):
    """From gradients of the logits: (their rows [HEADS, P], the gradient of the pre-activation [P, WIDTH])."""
    PRECISION: tl.constexpr = CONFIG.precision
    T: tl.constexpr = w.w1x.dtype
    GROUPS: tl.constexpr = len(ds)
    rows = ()
    for g in tl.static_range(GROUPS):
        rows += (ds[g].to(T),)
    ds_rows = rows_of_heads(rows, CONFIG.heads)
    dhidden = into_hidden(ds_rows, w.w2, tl.zeros(before.shape, tl.float32), PRECISION)
    return ds_rows, tl.where(before > 0.0, dhidden, 0.01 * dhidden)


@triton.jit
def input_gradient(ds, dbefore, weights, t: TileCoord, CONFIG: tl.constexpr, RESIDUAL: tl.constexpr):
    """The gradient of what `weights` multiplied in the first layer, by groups; RESIDUAL adds the bare term's, ds."""
    PRECISION: tl.constexpr = CONFIG.precision
    GROUP: tl.constexpr = ds[0].shape[0]
    T: tl.constexpr = weights.dtype
    dz = out_of_hidden(weights, dbefore.to(T), GROUP, PRECISION).to(T)
    dz = tiles_of_heads(dz, GROUP, t.i.shape[1], t.j.shape[2])
    GROUPS: tl.constexpr = len(ds)
    found = ()
    for g in tl.static_range(GROUPS):
        x = ds[g] if RESIDUAL else tl.zeros(ds[g].shape, tl.float32)
        found += (_plus_rows(x, dz[g], PRECISION),)
    return found
