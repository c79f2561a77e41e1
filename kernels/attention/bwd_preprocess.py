"""What a backward pass needs of each row: delta = <grad_out, out> - grad_lse, and the log-sum-exp in base 2.

The gradient of a logit is weight * (<grad_out, v_j> - delta). A row with no key gets +inf for its log-sum-exp, so that
its weights come out as zeros.
"""

import triton
import triton.language as tl

from ..common.scores import LOG2E


@triton.jit
def prepare(
    Out, GradOut, Lse, GradLse, Delta, Lse2, Slope, stride_slope_b, tokens, num_heads,
    stride_ob, stride_oh, stride_om, stride_gb, stride_gh, stride_gm,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Out and GradOut [B, H, T, DV]; Lse, GradLse (or None), Delta and Lse2 [B, H, T] contiguous.

    With a Slope (else None) Lse2 also takes what a linear bias takes off the logits of each row beyond the first of its
    TILE: small numbers, so nothing is lost, and the backward pass would compute them again for each block of keys."""
    blocks = tl.cdiv(tokens, BLOCK_M)
    pid = tl.program_id(0)
    bh = (pid // blocks).to(tl.int64)
    b = bh // num_heads
    h = bh % num_heads
    i0 = ((pid % blocks) * BLOCK_M).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_DV)
    row = offs_m < tokens - i0
    inside = row[:, None] & (offs_d < DV)[None, :]
    out = Out + b * stride_ob + h * stride_oh + i0 * stride_om + offs_m[:, None] * stride_om + offs_d[None, :]
    grad = GradOut + b * stride_gb + h * stride_gh + i0 * stride_gm + offs_m[:, None] * stride_gm + offs_d[None, :]
    o = tl.load(out, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_DV]
    g = tl.load(grad, mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(o * g, 1)
    at = bh * tokens + i0 + offs_m
    if GradLse is not None:
        delta -= tl.load(GradLse + at, mask=row, other=0.0)
    lse = tl.load(Lse + at, mask=row, other=0.0)
    tl.store(Delta + at, delta, mask=row)
    lse2 = lse * LOG2E
    if Slope is not None:
        lse2 += tl.load(Slope + b * stride_slope_b + h) * LOG2E * ((i0 + offs_m) % TILE).to(tl.float32)
    tl.store(Lse2 + at, tl.where(lse == float("-inf"), float("inf"), lse2), mask=row)
