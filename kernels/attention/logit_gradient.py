"""The gradient of the logits on one tile, computed anew: what gradients of biases are sums of."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.bf16x2 import multiply_bf16, widen_bf16
from ..common.bias import Operands, Place, gather
from ..common.dropout import Dropout, keep_tile
from ..common.masks import Mask
from ..common.profile import next_line, no_line, row_scales
from ..common.scores import LOG2E, load_rows, logits_tile


class Tensors(NamedTuple):
    """Inputs and row statistics of a backward kernel, as its arguments."""

    Q: Any
    K: Any
    V: Any
    GradOut: Any
    Lse2: Any
    Delta: Any
    stride_qb: Any
    stride_qh: Any
    stride_qm: Any
    stride_kb: Any
    stride_kh: Any
    stride_kn: Any
    stride_vb: Any
    stride_vh: Any
    stride_vn: Any
    stride_gb: Any
    stride_gh: Any
    stride_gm: Any


@triton.jit
def softmax_gradient(
    p, kept, dp, delta, keep, keep_scale, slack, WITH_DELTA: tl.constexpr, IN_BF16: tl.constexpr, NVIDIA: tl.constexpr
):
    """ds, before the softcap's share of it, and -ds in 16 bits: from the weights, as they are and as kept by dropout,
    and minus the gradient of the latter, to which delta is added already if WITH_DELTA."""
    if keep is not None:
        dp = tl.where(keep, dp * keep_scale, 0.0)
    if not WITH_DELTA:
        dp += delta[None, :]
    if IN_BF16:
        half = multiply_bf16(kept, dp.to(tl.bfloat16), NVIDIA)
        return -widen_bf16(half, NVIDIA), half
    else:
        return -(p * dp), (p * dp * slack).to(kept.dtype)


@triton.jit
def place_tile(
    b, h, i0, j0, q_start, k_start, q_len, k_len, QPositions, stride_qpos, KPositions, stride_kpos,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """The tile of queries by keys at (i0, j0), which may reach past the sequence."""
    i = (i0 + tl.arange(0, BLOCK_M))[:, None]
    j = (j0 + tl.arange(0, BLOCK_N))[None, :]
    i_in = tl.minimum(i, q_len - 1)
    j_in = tl.minimum(j, k_len - 1)
    pi = i_in
    pj = j_in
    if F.explicit:
        b64 = tl.cast(b, tl.int64)
        pi = tl.load(QPositions + b64 * stride_qpos + q_start + i_in)
        pj = tl.load(KPositions + b64 * stride_kpos + k_start + j_in)
    return Place(b, h, q_start, k_start, i0, j0, k_len - q_len, i, j, i_in, j_in, pi, pj)


@triton.jit
def logit_gradient(
    x: Tensors, t: Place, o: Operands, mask: Mask, dropout: Dropout, q_len,
    scale, softcap, num_heads, group, q_tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    F: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """ds on the tile, zero outside the sequence; the row scale, and the profile's line and highest segment."""
    BLOCK_M: tl.constexpr = t.i.shape[0]
    BLOCK_N: tl.constexpr = t.j.shape[1]
    b64 = tl.cast(t.b, tl.int64)
    h64 = tl.cast(t.h, tl.int64)
    kv64 = (t.h // group).to(tl.int64)
    rows = tl.minimum(tl.arange(0, BLOCK_M), q_len - 1 - t.i0)
    cols = tl.minimum(tl.arange(0, BLOCK_N), mask.k_len - 1 - t.j0)
    row0 = (t.q_start + t.i0).to(tl.int64)
    col0 = (t.k_start + t.j0).to(tl.int64)
    q = load_rows(x.Q + b64 * x.stride_qb + h64 * x.stride_qh + row0 * x.stride_qm, rows, x.stride_qm, D, BLOCK_D)
    do_base = x.GradOut + b64 * x.stride_gb + h64 * x.stride_gh + row0 * x.stride_gm
    do = load_rows(do_base, rows, x.stride_gm, DV, BLOCK_DV)
    k = load_rows(x.K + b64 * x.stride_kb + kv64 * x.stride_kh + col0 * x.stride_kn, cols, x.stride_kn, D, BLOCK_D)
    v = load_rows(x.V + b64 * x.stride_vb + kv64 * x.stride_vh + col0 * x.stride_vn, cols, x.stride_vn, DV, BLOCK_DV)
    stat = (b64 * num_heads + h64) * q_tokens + row0 + rows
    lse2 = tl.where(tl.arange(0, BLOCK_M) < q_len - t.i0, tl.load(x.Lse2 + stat), float("inf"))
    delta = tl.load(x.Delta + stat)
    slope = None
    if o.Slope is not None:
        slope = tl.load(o.Slope + t.b * o.stride_slope_b + t.h)
    if F.linear:
        lse2 += slope * tl.arange(0, BLOCK_M).to(tl.float32) * LOG2E
    row_scale = None
    line = no_line()
    high = line.segment
    if o.Psi is not None:
        row_scale = gather(row_scales(t.pi, t.shift, o, F.explicit), 0, NVIDIA)
        line, high = next_line(line, t, row_scale, o, BLOCK_N, F, NVIDIA)
    s = tl.dot(q, tl.trans(k), input_precision=F.precision)
    s, _ = logits_tile(s, line, high, t, o, mask, slope, t.i0 + t.shift, row_scale, scale, softcap, True, F, NVIDIA)
    if o.Psi is not None:
        lse2 -= line.intercept * LOG2E
    factor = LOG2E if F.natural else scale * LOG2E
    p = tl.exp2(s * factor - lse2[:, None])
    dp = tl.dot(do, tl.trans(v), input_precision=F.precision)
    if dropout.threshold is not None:
        keep = keep_tile(dropout, t, num_heads, BLOCK_M, BLOCK_N, False)
        dp = tl.where(keep, dp * dropout.keep_scale, 0.0)
    if o.Psi is None:
        row_scale = t.pi  # every element of a returned tuple is a tensor
    return p * (dp - delta[:, None]), row_scale, line, high
