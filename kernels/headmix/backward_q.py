"""HeadMix gradients of the queries, of the MLP, and of what adds up along rows (slopes, row scales, profile lines).

One program owns BLOCK_M queries of all heads and walks their keys. Its share of every parameter's gradient goes to a
slot of its own, which the host adds up: O(N) memory, no atomic between programs, a fixed order.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.arguments import DROPOUT_BITS, Dropout, Inputs, Mask, Operands, OutputGradient, Positions, Shape
from ..common.masks import key_spans
from ..common.sequences import open_sequence
from .backward_step import open_tensors, score_gradients
from .bias import head_offsets, keys_exist, open_tile
from .layout import column_of, summed
from .mlp import MixWeights, leaky, load_weights, operand_order
from .scores import Mix, head_groups, input_gradient, mlp_gradient
from .sums import add_outer, profile_sums, slope_sums


class MlpGradients(NamedTuple):
    """By block of queries (operands.all_blocks), float32: W1X, W1B and W2 [HEADS, WIDTH], B1 [WIDTH]; None where not
    wanted."""

    W1X: Any
    W1B: Any
    B1: Any
    W2: Any


class RowGradients(NamedTuple):
    """Of a bias: by block of queries, zeroed, float32, Slope [HEADS] and Segments [2, HEADS, W + 1]; and RowScale
    [B, Tq] float32. None where not wanted."""

    Slope: Any
    RowScale: Any
    Segments: Any


@triton.jit(do_not_specialize=DROPOUT_BITS)
def headmix_backward_q(
    inputs: Inputs, upstream: OutputGradient, DQ, of_mlp: MlpGradients, of_outer: RowGradients, of_inner: RowGradients,
    shape: Shape, q_max, scale, softcap,
    outer: Operands, inner: Operands, weights: MixWeights, mask: Mask, positions: Positions,
    threshold, keep_scale, seed,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CONFIG: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """DQ [B, H, Tq, D] contiguous, or None. What is None is not computed; the registers hold either DQ's rows or the
    sums of the MLP's gradients."""
    PRECISION: tl.constexpr = CONFIG.precision
    blocks = tl.cdiv(q_max, BLOCK_M)
    pid = tl.program_id(0)
    GROUPS: tl.constexpr = CONFIG.groups
    GROUP: tl.constexpr = CONFIG.group
    INNER: tl.constexpr = CONFIG.inner
    OUTER: tl.constexpr = CONFIG.outer
    WIDTH: tl.constexpr = CONFIG.width
    BLOCK_D: tl.constexpr = CONFIG.block_dim
    HEADS: tl.constexpr = CONFIG.heads
    i0 = (blocks - 1 - pid % blocks) * BLOCK_M
    seq = open_sequence(pid // blocks, mask, shape)
    if i0 >= seq.q_len:
        return
    drawn = seed
    if threshold is not None:
        drawn = tl.load(seed)
    dropout = Dropout(threshold, keep_scale, drawn)
    mix = Mix(inner, outer, weights.rows, weights.rows_first, scale, softcap, shape.heads, mask, positions, dropout)
    x = open_tensors(seq, inputs, upstream, shape, CONFIG)
    w = load_weights(weights, CONFIG)
    heads, kv = head_groups(shape, CONFIG)
    PARTS: tl.constexpr = CONFIG.group
    dw1x = tl.zeros([PARTS, HEADS, WIDTH], tl.float32)
    dw1b = tl.zeros([PARTS, HEADS, WIDTH], tl.float32)
    dw2 = tl.zeros([PARTS, HEADS, WIDTH], tl.float32)
    db1 = tl.zeros([WIDTH], tl.float32)
    drow = tl.zeros([BLOCK_M], tl.float32)
    dinner_row = tl.zeros([BLOCK_M], tl.float32)
    dq = ()
    dslope = ()
    dinner_slope = ()
    for _ in tl.static_range(GROUPS):
        if DQ is not None:
            dq += (tl.zeros([GROUP, BLOCK_M, BLOCK_D], tl.float32),)
        dslope += (tl.zeros([GROUP], tl.float32),)
        dinner_slope += (tl.zeros([GROUP], tl.float32),)
    # Packed documents are numbered by tokens: one may be far longer than the others.
    earlier = seq.q_start // BLOCK_M + pid // blocks if mask.cu_q is not None else pid // blocks * blocks
    slot = (earlier + i0 // BLOCK_M).to(tl.int64)
    last = tl.minimum(i0 + BLOCK_M, seq.q_len) - 1
    lo, _full_lo, _full_hi, hi = key_spans(i0, last, seq, mask, BLOCK_N, CONFIG)
    for j0 in tl.range(lo, hi, BLOCK_N):
        tile = open_tile(seq, i0, j0, positions, BLOCK_M, BLOCK_N, False, CONFIG.explicit)
        _weights, ds, slack, x_rows, inner_rows, before = score_gradients(
            x, tile, seq, heads, kv, w, mix, CONFIG, True, NVIDIA
        )  # fmt: skip
        ds_rows, dbefore = mlp_gradient(ds, before, w, CONFIG)
        if of_mlp.W1X is not None:
            dbefore_rows = dbefore.to(inputs.q.dtype.element_ty)
            dw2 = add_outer(dw2, ds_rows, leaky(before, inputs.q.dtype.element_ty, NVIDIA), PRECISION)
            dw1x = add_outer(dw1x, x_rows, dbefore_rows, PRECISION)
            if CONFIG.concat:
                dw1b = add_outer(dw1b, tl.permute(inner_rows, (1, 0)), dbefore_rows, PRECISION)
            if of_mlp.B1 is not None:
                db1 += tl.sum(dbefore, 0)
        if of_outer.Slope is not None:
            dslope = slope_sums(dslope, ds, tile, CONFIG.outer.signed, CONFIG.explicit)
        if of_outer.Segments is not None:
            at = of_outer.Segments + slot * 2 * HEADS * (outer.num_knots + 1)
            drow += profile_sums(ds, at, heads, shape.heads, tile, outer, OUTER, CONFIG, NVIDIA)
        if of_inner.Slope is not None or of_inner.Segments is not None:
            weights_of_inner = w.w1b if CONFIG.concat else w.w1x
            db = input_gradient(ds, dbefore, weights_of_inner, tile, CONFIG, CONFIG.residual)
            if of_inner.Slope is not None:
                dinner_slope = slope_sums(dinner_slope, db, tile, CONFIG.inner.signed, CONFIG.explicit)
            if of_inner.Segments is not None:
                at = of_inner.Segments + slot * 2 * HEADS * (inner.num_knots + 1)
                dinner_row += profile_sums(db, at, heads, shape.heads, tile, inner, INNER, CONFIG, NVIDIA)
        if DQ is not None:
            dx = input_gradient(ds, dbefore, w.w1x, tile, CONFIG, True)
            added = ()
            for g in tl.static_range(GROUPS):
                k = summed(
                    x.k + j0.to(tl.int64) * CONFIG.k_step,
                    head_offsets(kv[g], inputs.k_strides.head, CONFIG),
                    keys_exist(tile, seq),
                    BLOCK_N,
                    CONFIG.k_step,
                    CONFIG.dim,
                    CONFIG.block_dim,
                )
                added += (tl.dot((dx[g] * slack[g]).to(k.dtype), k, dq[g], input_precision=PRECISION),)
            dq = added

    offs_m = tl.arange(0, BLOCK_M)
    offs_w = tl.arange(0, CONFIG.width)
    offs_h = tl.arange(0, HEADS)
    b64 = seq.b.to(tl.int64)
    out_row = seq.q_start + i0 + offs_m
    exists = offs_m < seq.q_len - i0
    for g in tl.static_range(GROUPS):
        own = g * CONFIG.group + tl.arange(0, CONFIG.group)
        if DQ is not None:
            column = column_of(tl.arange(0, CONFIG.block_dim), CONFIG.block_dim)[None, None, :]
            inside = (own < shape.heads)[:, None, None] & exists[None, :, None] & (column < CONFIG.dim)
            row = ((b64 * shape.heads + own)[:, None] * shape.q_tokens + out_row[None, :])[:, :, None]
            tl.store(DQ + row * CONFIG.dim + column, (dq[g] * scale).to(DQ.dtype.element_ty), mask=inside)
        if of_outer.Slope is not None:
            tl.store(of_outer.Slope + slot * HEADS + own, dslope[g])
        if of_inner.Slope is not None:
            tl.store(of_inner.Slope + slot * HEADS + own, dinner_slope[g])
    if of_mlp.W1X is not None:
        at = slot * HEADS * CONFIG.width + offs_h[:, None] * CONFIG.width + offs_w[None, :]
        tl.store(of_mlp.W1X + at, tl.sum(dw1x, 0))
        if CONFIG.concat:
            order = operand_order(HEADS) if weights.rows is not None else offs_h
            at_inner = slot * HEADS * CONFIG.width + order[:, None] * CONFIG.width + offs_w[None, :]
            tl.store(of_mlp.W1B + at_inner, tl.sum(dw1b, 0))
        tl.store(of_mlp.W2 + at, tl.sum(dw2, 0))
        if of_mlp.B1 is not None:
            tl.store(of_mlp.B1 + slot * CONFIG.width + offs_w, db1)
    if of_outer.Segments is not None:
        tl.store(of_outer.RowScale + b64 * shape.q_tokens + out_row, drow, mask=exists)
    if of_inner.Segments is not None:
        tl.store(of_inner.RowScale + b64 * shape.q_tokens + out_row, dinner_row, mask=exists)
