"""What a backward pass needs of each row: delta = <grad_out, out> - grad_lse, and the log-sum-exp in base 2.

The gradient of a logit is weight * (<grad_out, v_j> - delta). A row with no key gets +inf for its log-sum-exp, so that
its weights come out as zeros.
"""

import triton
import triton.language as tl

from ..common.arguments import Strides
from ..common.scores import LOG2E


@triton.jit
def _rows(tensor, strides: Strides, b, h, i0, offs_m, offs_d):
    base = tensor + b * strides.batch + h * strides.head + i0 * strides.token
    return base + offs_m[:, None] * strides.token + offs_d[None, :]


@triton.jit
def prepare(
    out, grad_out, lse, grad_lse, Delta, Lse2, out_strides: Strides, grad_out_strides: Strides, slope, slope_batch,
    heads, tokens,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out and grad_out [B, H, T, DV]; lse, grad_lse (or None), Delta and Lse2 [B, H, T] contiguous.

    With a slope (else None) Lse2 also takes what a linear bias takes off the logits of each row beyond the first of its
    TILE: small numbers, so nothing is lost, and the backward pass would compute them again for each block of keys."""
    blocks = tl.cdiv(tokens, BLOCK_M)
    pid = tl.program_id(0)
    bh = (pid // blocks).to(tl.int64)
    b = bh // heads
    h = bh % heads
    i0 = ((pid % blocks) * BLOCK_M).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_DV)
    row = offs_m < tokens - i0
    inside = row[:, None] & (offs_d < DV)[None, :]
    o = _rows(out, out_strides, b, h, i0, offs_m, offs_d)
    g = _rows(grad_out, grad_out_strides, b, h, i0, offs_m, offs_d)
    o = tl.load(o, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_DV]
    g = tl.load(g, mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(o * g, 1)
    at = bh * tokens + i0 + offs_m
    if grad_lse is not None:
        delta -= tl.load(grad_lse + at, mask=row, other=0.0)
    lse_row = tl.load(lse + at, mask=row, other=0.0)
    tl.store(Delta + at, delta, mask=row)
    lse2 = lse_row * LOG2E
    if slope is not None:
        lse2 += tl.load(slope + b * slope_batch + h) * LOG2E * ((i0 + offs_m) % TILE).to(tl.float32)
    tl.store(Lse2 + at, tl.where(lse_row == float("-inf"), float("inf"), lse2), mask=row)
