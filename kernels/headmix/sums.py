"""Sums over a tile in HeadMix's backward: the MLP's weights, slopes, and profiles."""

import triton
import triton.language as tl

from ..common.arguments import Operands
from ..common.sequences import TileCoord
from .bias import profile_tile


@triton.jit
def add_outer(acc, left, right, PRECISION: tl.constexpr):
    """acc [PARTS, A, B] plus left @ right of [A, P] and [P, B], cut into PARTS along P, so that each warp sums a part;
    the positions go to the parts as the products that left them spread them over warps."""
    PARTS: tl.constexpr = acc.shape[0]
    A: tl.constexpr = left.shape[0]
    P: tl.constexpr = left.shape[1]
    B: tl.constexpr = right.shape[1]
    left = tl.permute(tl.reshape(left, [A, P // (16 * PARTS), PARTS, 16]), (2, 0, 1, 3))
    right = tl.permute(tl.reshape(right, [P // (16 * PARTS), PARTS, 16, B]), (1, 0, 2, 3))
    left = tl.reshape(left, [PARTS, A, P // PARTS])
    return tl.dot(left, tl.reshape(right, [PARTS, P // PARTS, B]), acc, input_precision=PRECISION)


@triton.jit
def slope_sums(sums, gradients, t: TileCoord, SIGNED: tl.constexpr, EXPLICIT: tl.constexpr):
    """sums less the sum of each head's gradients times the distance."""
    distance = (t.pi - t.pj).to(tl.float32) if EXPLICIT else (t.pi + t.offset - t.pj).to(tl.float32)
    if not SIGNED:
        distance = tl.abs(distance)
    found = ()
    GROUPS: tl.constexpr = len(gradients)
    for g in tl.static_range(GROUPS):
        found += (sums[g] - tl.sum(tl.sum(gradients[g] * distance, 2), 1),)
    return found


@triton.jit
def profile_sums(
    gradients,
    Sums,
    heads,
    num_heads,
    t: TileCoord,
    o: Operands,
    BIAS: tl.constexpr,
    CONFIG: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """Adds the sums of g and of g * y on each segment to Sums [2, HEADS, W + 1]; returns the row scale's, [BLOCK_M]."""
    GROUP: tl.constexpr = gradients[0].shape[0]
    GROUPS: tl.constexpr = len(gradients)
    psi, row_scale, low, high = profile_tile(t, o, BIAS, CONFIG, NVIDIA)
    y = psi * row_scale
    width = o.num_knots + 1
    total = tl.zeros([t.i.shape[1]], tl.float32)
    for m in range(low, high + 1):
        on = y == y
        if m > 0:
            on = on & (y > tl.load(o.knots + m - 1))
        if m < o.num_knots:
            on = on & (y <= tl.load(o.knots + m))
        for g in tl.static_range(GROUPS):
            own = g * GROUP + tl.arange(0, GROUP)
            slot = own * width + m
            part = tl.where(on, gradients[g], 0.0)
            # One program adds to these slots, in its own order.
            tl.atomic_add(Sums + slot, tl.sum(tl.sum(part, 2), 1), sem="relaxed")
            tl.atomic_add(Sums + CONFIG.heads * width + slot, tl.sum(tl.sum(part * y, 2), 1), sem="relaxed")
            slope = tl.load(o.segment_slope + heads[g] * width + m)
            slope = tl.where(own < num_heads, slope, 0.0)[:, None, None]
            total += tl.sum(tl.sum(part * psi * slope, 0), 1)
    return total


@triton.jit
def psi_gradient(
    gradients,
    heads,
    num_heads,
    t: TileCoord,
    o: Operands,
    BIAS: tl.constexpr,
    CONFIG: tl.constexpr,
    NVIDIA: tl.constexpr,
):
    """Gradients times the slope of the profile's segment times the row scale, summed over heads: [BLOCK_M, BLOCK_N]."""
    GROUP: tl.constexpr = gradients[0].shape[0]
    GROUPS: tl.constexpr = len(gradients)
    psi, row_scale, low, high = profile_tile(t, o, BIAS, CONFIG, NVIDIA)
    y = psi * row_scale
    total = tl.zeros([t.i.shape[1], t.j.shape[2]], tl.float32)
    for g in tl.static_range(GROUPS):
        slopes = o.segment_slope + (heads[g] * (o.num_knots + 1))[:, None, None]
        steepness = tl.zeros(gradients[g].shape, tl.float32) + tl.load(slopes + low)
        if high > low:
            for m in range(low, high):
                steepness = tl.where(y > tl.load(o.knots + m), tl.load(slopes + m + 1), steepness)
        own = g * GROUP + tl.arange(0, GROUP)
        real = (own < num_heads)[:, None, None]
        total += tl.sum(tl.where(real, gradients[g] * steepness * row_scale, 0.0), 0)
    return total
