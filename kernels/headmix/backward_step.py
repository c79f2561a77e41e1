"""One tile of HeadMix's backward: from queries, keys, values and dO to the gradients of logits, for all heads."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .bias import Sequence, Tile, head_offsets, keys_exist, queries_exist
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
def open_tensors(
    seq: Sequence, Q, K, V, GradOut, Lse2, Delta,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_gb, stride_gh, num_heads, q_tokens,
    F: tl.constexpr,
):  # fmt: skip
    b64 = seq.b.to(tl.int64)
    q_start = seq.q_start.to(tl.int64)
    k_start = seq.k_start.to(tl.int64)
    rows = b64 * num_heads * q_tokens + q_start
    return Tensors(
        Q + b64 * stride_qb + q_start * F.q_step, K + b64 * stride_kb + k_start * F.k_step,
        V + b64 * stride_vb + k_start * F.v_step, GradOut + b64 * stride_gb + q_start * F.grad_step,
        Lse2 + rows, Delta + rows, stride_qh, stride_kh, stride_vh, stride_gh, q_tokens,
    )  # fmt: skip


@triton.jit
def score_gradients(
    x: Tensors, t: Tile, seq: Sequence, heads, kv, w: Weights, m: Mix, F: tl.constexpr,
    GRADIENT: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """(weights as they met the values, gradients of the logits, x's derivatives, rows of x, rows of the inner bias,
    pre-activation); without GRADIENT, what the values' own gradient needs: the weights."""
    PRECISION: tl.constexpr = F.precision
    BLOCK_M: tl.constexpr = t.rows.shape[0]
    BLOCK_N: tl.constexpr = t.cols.shape[0]
    GROUPS: tl.constexpr = F.groups
    i64 = t.i0.to(tl.int64)
    j64 = t.j0.to(tl.int64)
    rows = queries_exist(t, seq)
    cols = keys_exist(t, seq)
    dots = ()
    for g in tl.static_range(GROUPS):
        offsets = head_offsets(heads[g], x.stride_qh, F)
        q = contracted(x.q + i64 * F.q_step, offsets, rows, BLOCK_M, F.q_step, F.dim, F.block_dim)
        offsets = head_offsets(kv[g], x.stride_kh, F)
        k = contracted(x.k + j64 * F.k_step, offsets, cols, BLOCK_N, F.k_step, F.dim, F.block_dim)
        dots += (tl.dot(tl.permute(q, (0, 2, 1)), k, input_precision=PRECISION),)
    s, slack, x_rows, inner_rows, before = mixed_logits(dots, t, seq, heads, w, m, F, False, False, 1, NVIDIA)
    exists = (tl.arange(0, BLOCK_M) < seq.q_len - t.i0)[None, :]
    weights = ()
    ds = ()
    for g in tl.static_range(GROUPS):
        stat = heads[g][:, None] * x.q_tokens + t.i0 + t.rows[None, :]
        # A spare head's logits are not what its log-sum-exp is of: unhidden, its weights could be infinite.
        real = (g * F.group + tl.arange(0, F.group) < m.num_heads)[:, None]
        lse2 = tl.where(real & exists, tl.load(x.lse2 + stat), float("inf"))
        dp = tl.zeros(s[g].shape, tl.float32)
        delta = lse2
        if GRADIENT:
            delta = tl.load(x.delta + stat)
            offsets = head_offsets(heads[g], x.stride_gh, F)
            do = x.do + i64 * F.grad_step
            do = contracted(do, offsets, rows, BLOCK_M, F.grad_step, F.value_dim, F.block_value_dim)
            offsets = head_offsets(kv[g], x.stride_vh, F)
            v = x.v + j64 * F.v_step
            v = contracted(v, offsets, cols, BLOCK_N, F.v_step, F.value_dim, F.block_value_dim)
            dp = tl.dot(tl.permute(do, (0, 2, 1)), v, input_precision=PRECISION)
        kept, gradient = logit_gradient(s[g], dp, lse2, delta, t, heads[g], m)
        weights += (kept,)
        ds += (gradient,)
    return weights, ds, slack, x_rows, inner_rows, before
