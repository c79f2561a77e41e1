"""The gradient of the logits on one tile, computed anew: what gradients of biases are sums of."""

import triton
import triton.language as tl

from ..common.arguments import Dropout, Inputs, Mask, Operands, OutputGradient, Positions, Shape, Strides
from ..common.bf16x2 import multiply_bf16, widen_bf16
from ..common.bias import gather
from ..common.dropout import keep_tile
from ..common.profile import common_line, next_line, no_line, row_scales
from ..common.scores import LOG2E, load_rows, logits_tile
from ..common.sequences import SeqlenInfo, TileCoord


@triton.jit
def softmax_gradient(
    p, kept, dp, delta, keep, dropout: Dropout, slack,
    WITH_DELTA: tl.constexpr, IN_BF16: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """ds, before the softcap's share of it, and -ds in 16 bits: from the weights, as they are and as kept by dropout,
    and minus the gradient of the latter, to which delta is added already if WITH_DELTA."""
    if dropout.threshold is not None:
        dp = tl.where(keep, dp * dropout.keep_scale, 0.0)
    if not WITH_DELTA:
        dp += delta[None, :]
    if IN_BF16:
        half = multiply_bf16(kept, dp.to(tl.bfloat16), NVIDIA)
        return -widen_bf16(half, NVIDIA), half
    else:
        return -(p * dp), (p * dp * slack).to(kept.dtype)


@triton.jit
def open_tile(
    seq: SeqlenInfo, h, i0, j0, positions: Positions,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """The tile of queries by keys at (i0, j0), which may reach past the sequence, and begin before its keys."""
    i = (i0 + tl.arange(0, BLOCK_M))[:, None]
    j = (j0 + tl.arange(0, BLOCK_N))[None, :]
    i_in = tl.minimum(i, seq.q_len - 1)
    j_in = tl.maximum(tl.minimum(j, seq.k_len - 1), 0)
    pi = i_in
    pj = j_in
    if CONFIG.explicit:
        b64 = tl.cast(seq.b, tl.int64)
        pi = tl.load(positions.q + b64 * positions.q_batch + seq.q_start + i_in)
        pj = tl.load(positions.k + b64 * positions.k_batch + seq.k_start + j_in)
    offset = seq.offset
    return TileCoord(seq.b, h, seq.q_start, seq.k_start, i0, j0, offset, i, j, i_in, j_in, pi, pj, i0 * 0)


@triton.jit
def _rows_at(tensor, strides: Strides, b64, h64, row0, rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    base = tensor + b64 * strides.batch + h64 * strides.head + row0 * strides.token
    return load_rows(base, rows, strides.token, D, BLOCK_D)


@triton.jit
def logit_gradient(
    x: Inputs, upstream: OutputGradient, t: TileCoord, seq: SeqlenInfo, o: Operands, mask: Mask, dropout: Dropout,
    scale, softcap, shape: Shape, CONFIG: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """ds on the tile, zero outside the sequence; the row scale, and the profile's line and highest segment."""
    BLOCK_M: tl.constexpr = t.i.shape[0]
    BLOCK_N: tl.constexpr = t.j.shape[1]
    D: tl.constexpr = CONFIG.dim
    BLOCK_D: tl.constexpr = CONFIG.block_dim
    DV: tl.constexpr = CONFIG.value_dim
    BLOCK_DV: tl.constexpr = CONFIG.block_value_dim
    b64 = tl.cast(t.b, tl.int64)
    h64 = tl.cast(t.h, tl.int64)
    kv64 = (t.h // shape.group).to(tl.int64)
    rows = tl.minimum(tl.arange(0, BLOCK_M), seq.q_len - 1 - t.i0)
    cols = tl.maximum(tl.minimum(tl.arange(0, BLOCK_N), seq.k_len - 1 - t.j0), -t.j0)
    row0 = (t.q_start + t.i0).to(tl.int64)
    col0 = (t.k_start + t.j0).to(tl.int64)
    q = _rows_at(x.q, x.q_strides, b64, h64, row0, rows, D, BLOCK_D)
    do = _rows_at(upstream.grad_out, upstream.strides, b64, h64, row0, rows, DV, BLOCK_DV)
    k = _rows_at(x.k, x.k_strides, b64, kv64, col0, cols, D, BLOCK_D)
    v = _rows_at(x.v, x.v_strides, b64, kv64, col0, cols, DV, BLOCK_DV)
    stat = (b64 * shape.heads + h64) * shape.q_tokens + row0 + rows
    lse2 = tl.where(tl.arange(0, BLOCK_M) < seq.q_len - t.i0, tl.load(upstream.lse2 + stat), float("inf"))
    delta = tl.load(upstream.delta + stat)
    slope = None
    if o.slope is not None:
        slope = tl.load(o.slope + t.b * o.slope_batch + t.h)
    if CONFIG.linear:
        lse2 += slope * tl.arange(0, BLOCK_M).to(tl.float32) * LOG2E
    row_scale = None
    line = no_line()
    high = line.segment
    common = line
    if o.psi is not None:
        row_scale = gather(row_scales(t.pi, t.offset, o, CONFIG.explicit), 0, NVIDIA)
        line, high = next_line(line, t, row_scale, o, BLOCK_N, CONFIG, NVIDIA)
        common = common_line(line, high)
    s = tl.dot(q, tl.trans(k), input_precision=CONFIG.precision)
    s, _ = logits_tile(
        s, common, high, t, seq, o, mask, slope, t.i0 + t.offset, row_scale, scale, softcap, True, CONFIG, NVIDIA
    )
    if o.psi is not None:
        lse2 -= common.intercept * LOG2E
    factor = LOG2E if CONFIG.scale_before_bias else scale * LOG2E
    p = tl.exp2(s * factor - lse2[:, None])
    dp = tl.dot(do, tl.trans(v), input_precision=CONFIG.precision)
    if dropout.threshold is not None:
        keep = keep_tile(dropout, t, shape.heads, BLOCK_M, BLOCK_N, False)
        dp = tl.where(keep, dp * dropout.keep_scale, 0.0)
    if o.psi is None:
        row_scale = t.pi  # every element of a returned tuple is a tensor
    return p * (dp - delta[:, None]), row_scale, line, high
