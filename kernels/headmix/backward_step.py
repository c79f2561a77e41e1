"""One tile of HeadMix's backward: from queries, keys, values and dO to the gradients of logits, for all heads."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.arguments import Inputs, OutputGradient, Shape
from ..common.sequences import SeqlenInfo, TileCoord
from .bias import head_offsets, keys_exist, queries_exist
from .layout import contracted
from .mlp import Weights
from .scores import Mix, logit_gradient, mixed_logits


class Tensors(NamedTuple):
    """Q, K, V and dO of one sequence from its first tokens on, and its rows' statistics [H, Tq] from row 0 on."""

    q: Any
    k: Any
    v: Any
    do: Any
    lse2: Any
    delta: Any
    stride_qh: Any
    stride_kh: Any
    stride_vh: Any
    stride_gh: Any
    q_tokens: Any


@triton.jit
def open_tensors(seq: SeqlenInfo, x: Inputs, upstream: OutputGradient, shape: Shape, CONFIG: tl.constexpr):
    b64 = seq.b.to(tl.int64)
    q_start = seq.q_start.to(tl.int64)
    k_start = seq.k_start.to(tl.int64)
    rows = b64 * shape.heads * shape.q_tokens + q_start
    return Tensors(
        x.q + b64 * x.q_strides.batch + q_start * CONFIG.q_step,
        x.k + b64 * x.k_strides.batch + k_start * CONFIG.k_step,
        x.v + b64 * x.v_strides.batch + k_start * CONFIG.v_step,
        upstream.grad_out + b64 * upstream.strides.batch + q_start * CONFIG.grad_step,
        upstream.lse2 + rows,
        upstream.delta + rows,
        x.q_strides.head,
        x.k_strides.head,
        x.v_strides.head,
        upstream.strides.head,
        shape.q_tokens,
    )


@triton.jit
def score_gradients(
    x: Tensors, t: TileCoord, seq: SeqlenInfo, heads, kv, w: Weights, m: Mix, CONFIG: tl.constexpr,
    GRADIENT: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """(weights as they met the values, gradients of the logits, x's derivatives, rows of x, rows of the inner bias,
    pre-activation); without GRADIENT, what the values' own gradient needs: the weights."""
    PRECISION: tl.constexpr = CONFIG.precision
    BLOCK_M: tl.constexpr = t.i.shape[1]
    BLOCK_N: tl.constexpr = t.j.shape[2]
    GROUPS: tl.constexpr = CONFIG.groups
    i64 = t.i0.to(tl.int64)
    j64 = t.j0.to(tl.int64)
    rows = queries_exist(t, seq)
    cols = keys_exist(t, seq)
    dots = ()
    for g in tl.static_range(GROUPS):
        offsets = head_offsets(heads[g], x.stride_qh, CONFIG)
        q = contracted(x.q + i64 * CONFIG.q_step, offsets, rows, BLOCK_M, CONFIG.q_step, CONFIG.dim, CONFIG.block_dim)
        offsets = head_offsets(kv[g], x.stride_kh, CONFIG)
        k = contracted(x.k + j64 * CONFIG.k_step, offsets, cols, BLOCK_N, CONFIG.k_step, CONFIG.dim, CONFIG.block_dim)
        dots += (tl.dot(tl.permute(q, (0, 2, 1)), k, input_precision=PRECISION),)
    s, slack, x_rows, inner_rows, before = mixed_logits(dots, t, seq, heads, w, m, CONFIG, False, False, 1, NVIDIA)
    exists = (tl.arange(0, BLOCK_M) < seq.q_len - t.i0)[None, :]
    weights = ()
    ds = ()
    for g in tl.static_range(GROUPS):
        stat = heads[g][:, None] * x.q_tokens + tl.reshape(t.i_in, [1, BLOCK_M])
        # A spare head's logits are not what its log-sum-exp is of: unhidden, its weights could be infinite.
        real = (g * CONFIG.group + tl.arange(0, CONFIG.group) < m.heads)[:, None]
        lse2 = tl.where(real & exists, tl.load(x.lse2 + stat), float("inf"))
        dp = tl.zeros(s[g].shape, tl.float32)
        delta = lse2
        if GRADIENT:
            delta = tl.load(x.delta + stat)
            offsets = head_offsets(heads[g], x.stride_gh, CONFIG)
            do = x.do + i64 * CONFIG.grad_step
            do = contracted(do, offsets, rows, BLOCK_M, CONFIG.grad_step, CONFIG.value_dim, CONFIG.block_value_dim)
            offsets = head_offsets(kv[g], x.stride_vh, CONFIG)
            v = x.v + j64 * CONFIG.v_step
            v = contracted(v, offsets, cols, BLOCK_N, CONFIG.v_step, CONFIG.value_dim, CONFIG.block_value_dim)
            dp = tl.dot(tl.permute(do, (0, 2, 1)), v, input_precision=PRECISION)
        kept, gradient = logit_gradient(s[g], dp, lse2, delta, t, heads[g], m)
        weights += (kept,)
        ds += (gradient,)
    return weights, ds, slack, x_rows, inner_rows, before
