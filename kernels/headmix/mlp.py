"""HeadMix's MLP over the heads at each position of a tile, on tensor cores.

Rows of heads are [HEADS, P] for P = BLOCK_M * BLOCK_N positions; they and the weights are zero-padded to powers of two,
so padded heads and units add nothing. A product into the hidden layer has the positions as rows, a product out of it as
columns: what one leaves in registers is what the other multiplies, and neighbouring keys of a head lie side by side
when they go back to the warp that owns the head.

b2 never enters: it shifts all logits of a head, so only the log-sum-exp knows of it.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .layout import repeated


class MixWeights(NamedTuple):
    """The MLP as a kernel's argument: w1x, w1b, w2 [HEADS, WIDTH] in the dtype of products (the first layer's
    transposed), b1 [WIDTH] and b2 [H] float32, and `rows`, the inner bias's table [distances, HEADS] from distance
    rows_first on, if it depends on the distance alone. None: w1b without an inner bias of its own, b1 if rows carry
    it."""

    w1x: Any
    w1b: Any
    b1: Any
    w2: Any
    b2: Any
    rows: Any
    rows_first: Any


class Weights(NamedTuple):
    """MixWeights as loaded; w1x_halves is for heads that two warps share; w1b_in is w1b with its heads in the order in
    which the inner bias's rows come."""

    w1x: Any
    w1x_halves: Any
    w1b: Any
    w1b_in: Any
    b1: Any
    w2: Any


@triton.jit
def operand_order(HEADS: tl.constexpr):
    """The heads in the order of rows_by_distance."""
    k = tl.arange(0, HEADS)
    return k // 16 * 16 + k // 2 % 4 * 4 + k // 8 % 2 * 2 + k % 2


@triton.jit
def _matrix(W, rows, WIDTH: tl.constexpr):
    return tl.load(W + rows[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])


@triton.jit
def load_weights(m: MixWeights, CONFIG: tl.constexpr):
    HEADS: tl.constexpr = CONFIG.heads
    WIDTH: tl.constexpr = CONFIG.width
    heads = tl.arange(0, HEADS)
    w1x = _matrix(m.w1x, heads, WIDTH)
    w1x_halves = w1x
    if CONFIG.halves:
        GROUP: tl.constexpr = CONFIG.group
        w1x_halves = tl.where(heads[:, None] < GROUP // 2, _matrix(m.w1x, GROUP + heads % (GROUP // 2), WIDTH), 0.0)
        w1x = tl.where(heads[:, None] < GROUP, w1x, 0.0)
        w1x_halves = w1x_halves.to(w1x.dtype)
    w1b = w1x
    w1b_in = w1x
    if m.w1b is not None:
        w1b = _matrix(m.w1b, heads, WIDTH)
        w1b_in = _matrix(m.w1b, operand_order(HEADS), WIDTH) if m.rows is not None else w1b
    b1 = tl.zeros([WIDTH], tl.float32)  # not None: Triton 3.6 returns tensors only
    if m.b1 is not None:
        b1 = tl.load(m.b1 + tl.arange(0, WIDTH))
    # The second layer has the heads of halves twice: a warp then finds its own half of the keys (own_half).
    second = (
        tl.where(heads < CONFIG.group, heads, CONFIG.group + heads % (CONFIG.group // 2)) if CONFIG.halves else heads
    )
    return Weights(w1x, w1x_halves, w1b, w1b_in, b1, _matrix(m.w2, second, WIDTH))


@triton.jit
def rows_by_distance(Rows, corner, M: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, NVIDIA: tl.constexpr):
    """Entries corner + m - n of a table [distances, HEADS], as [positions, HEADS] for a product (the positions in the
    order of layout.rows_of_heads). The host has padded the table for queries and keys past the end.

    On NVIDIA a lane loads the 4 neighbouring heads that make its share of an operand, with no exchange: the product
    meets heads 4t .. 4t + 3 as k = 2t, 2t + 1, 2t + 8, 2t + 9: operand_order, which the weights follow."""
    T: tl.constexpr = Rows.dtype.element_ty
    base = Rows + corner.to(tl.int64) * HEADS + (tl.arange(0, M) * HEADS)[None, :, None, None]
    back = tl.reshape(tl.arange(0, N) * HEADS, [N // 16, 1, 16, 1])
    if NVIDIA and T.primitive_bitwidth == 16:
        pointers = (base + (tl.arange(0, HEADS // 4) * 4)[None, None, None, :]) - back
        a, b, c, d = tl.inline_asm_elementwise(
            "{ .reg .b32 lo, hi; ld.global.nc.v2.b32 {lo, hi}, [$4]; mov.b32 {$0, $1}, lo; mov.b32 {$2, $3}, hi; }",
            "=h,=h,=h,=h,l", [pointers.to(tl.int64)], (tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=1,
        )  # fmt: skip
        x = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), [M * N, HEADS // 16, 4, 2, 2])
        x = tl.permute(x, (0, 1, 4, 2, 3)).to(T, bitcast=True)
    else:
        pointers = (base + tl.arange(0, HEADS)[None, None, None, :]) - back
        x = tl.permute(tl.reshape(tl.load(pointers), [M * N, HEADS // 16, 4, 2, 2]), (0, 1, 3, 2, 4))
    return tl.reshape(x, [M * N, HEADS])


@triton.jit
def into_hidden(x, weights, start, PRECISION: tl.constexpr):
    """start + x.T @ weights for rows x [HEADS, P]: [P, WIDTH]."""
    return tl.dot(tl.permute(x, (1, 0)), weights, start, input_precision=PRECISION)


@triton.jit
def out_of_hidden(weights, hidden, WARPS: tl.constexpr, PRECISION: tl.constexpr):
    """weights @ hidden.T for hidden [P, WIDTH]: [HEADS, P].

    Tensor cores spread rows and columns over warps and registers differently: their order of positions goes into this
    product, and comes out again, so that nothing moves."""
    P: tl.constexpr = hidden.shape[0]
    WIDTH: tl.constexpr = hidden.shape[1]
    HEADS: tl.constexpr = weights.shape[0]
    hidden = tl.permute(tl.reshape(hidden, [P // (16 * WARPS), WARPS, 2, 8, WIDTH]), (4, 0, 2, 1, 3))
    out = tl.dot(weights, tl.reshape(hidden, [WIDTH, P]), input_precision=PRECISION)
    out = tl.permute(tl.reshape(out, [HEADS, P // (16 * WARPS), 2, WARPS, 8]), (0, 1, 3, 2, 4))
    return tl.reshape(out, [HEADS, P])


@triton.jit
def leaky(before, dtype: tl.constexpr, NVIDIA: tl.constexpr):
    """max(before, before / 100) in the dtype of products: on NVIDIA after rounding, two at a time."""
    if NVIDIA and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 s, z; mov.b32 z, 0x80008000; mov.b32 s, 0x3C243C24;"
            "fma.rn.bf16x2 s, $1, s, z; max.bf16x2 $0, $1, s; }",
            "=r,r", [before.to(dtype)], tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    elif NVIDIA and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 s, z; mov.b32 z, 0x80008000; mov.b32 s, 0x211F211F;"
            "fma.rn.f16x2 s, $1, s, z; max.f16x2 $0, $1, s; }",
            "=r,r", [before.to(dtype)], tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.maximum(before, 0.01 * before).to(dtype)


@triton.jit
def first_layer(x, halves, inner, w: Weights, CONFIG: tl.constexpr):
    """The pre-activation [P, WIDTH] of rows x [HEADS, P], of rows `halves` of the heads that take two warps, and, for
    CONCAT, of inner [P, HEADS]. b1 is 0 where a spare head of the inner rows carries it."""
    PRECISION: tl.constexpr = CONFIG.precision
    start = tl.broadcast_to(w.b1[None, :], [x.shape[1], CONFIG.width])
    before = into_hidden(repeated(x, CONFIG.heads), w.w1x, start, PRECISION)
    if CONFIG.halves:
        before = into_hidden(repeated(halves, CONFIG.heads), w.w1x_halves, before, PRECISION)
    if CONFIG.concat:
        before = tl.dot(inner, w.w1b_in, before, input_precision=PRECISION)
    return before
