"""Rotary embedding: a tile rotated as it is loaded, and a kernel that rotates a whole tensor.

The kernel rotates K ahead of long prefill, where rotating each K tile again for every query block would cost more, and
rotates dQ and dK back (SIGN = -1) after a backward pass.
"""

import triton
import triton.language as tl

from .arguments import Angles, Strides
from .pages import Pages, paged_rows
from .scores import load_rows


@triton.jit
def load_rotary(
    base,
    rows,
    stride,
    Cos,
    Sin,
    HALF: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SIGN: tl.constexpr,
):
    """Rows of a [T, D] tensor with their first 2 * HALF dimensions rotated, float32 [rows, BLOCK_D].

    Cos and Sin point to [T, HALF]. The partner of each dimension is loaded beside it: the tile is read once per block
    of queries, and its second read hits L1.
    """
    offs_d = tl.arange(0, BLOCK_D)
    if INTERLEAVED:
        pair = offs_d // 2
        partner = offs_d ^ 1
        is_first = offs_d % 2 == 0
    else:
        is_first = offs_d < HALF
        pair = tl.where(is_first, offs_d, offs_d - HALF)
        partner = tl.where(is_first, offs_d + HALF, offs_d - HALF)
    paired = (offs_d < 2 * HALF)[None, :]
    row = base + rows[:, None] * stride
    x = tl.load(row + offs_d[None, :], mask=(offs_d < D)[None, :], other=0.0).to(tl.float32)  # [rows, BLOCK_D]
    y = tl.load(row + partner[None, :], mask=paired, other=0.0).to(tl.float32)
    angle = rows[:, None] * HALF + pair[None, :]
    cos = tl.load(Cos + angle, mask=paired, other=1.0)
    sin = tl.load(Sin + angle, mask=paired, other=0.0) * SIGN
    return x * cos + tl.where(is_first[None, :], -y, y) * sin


@triton.jit
def load_turned(
    x, angles: Angles, rows, stride, at_angle,
    HALF: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """[rows, BLOCK_D] of queries or keys at x, rotated if there are angles."""
    if angles.cos is not None:
        cos, sin = angles.cos + at_angle, angles.sin + at_angle
        return load_rotary(x, rows, stride, cos, sin, HALF, D, BLOCK_D, INTERLEAVED, 1).to(x.dtype.element_ty)
    else:
        return load_rows(x, rows, stride, D, BLOCK_D)


@triton.jit
def rotary(
    X, Out, x_strides: Strides, angles: Angles, pages: Pages, heads, tokens,
    HALF: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
    INTERLEAVED: tl.constexpr, SIGN: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Out [B, H, T, D] contiguous = X rotated by its tokens' angles (back by them for SIGN = -1). X may lie in pages of
    PAGE tokens, else PAGE is 0."""
    blocks = tl.cdiv(tokens, BLOCK_T)
    pid = tl.program_id(0)
    t0 = (pid % blocks) * BLOCK_T
    b = (pid // blocks) // heads
    h = (pid // blocks) % heads
    b64 = b.to(tl.int64)
    rows = tl.minimum(tl.arange(0, BLOCK_T), tokens - 1 - t0)
    x = X + h.to(tl.int64) * x_strides.head
    if PAGE > 0:
        x = paged_rows(x, pages, b, t0, rows, x_strides.batch, x_strides.token, PAGE, PAGE % BLOCK_T == 0)
    else:
        x += b64 * x_strides.batch + t0.to(tl.int64) * x_strides.token
    angle = b64 * angles.batch + t0.to(tl.int64) * HALF
    rotated = load_rotary(
        x, rows, x_strides.token, angles.cos + angle, angles.sin + angle, HALF, D, BLOCK_D, INTERLEAVED, SIGN
    )
    offs_d = tl.arange(0, BLOCK_D)
    out = Out + ((pid // blocks).to(tl.int64) * tokens + t0) * D
    # Rows past the end repeat the last one and would store it again: the mask keeps one store per element.
    inside = (t0 + tl.arange(0, BLOCK_T) < tokens)[:, None] & (offs_d < D)[None, :]
    tl.store(out + rows[:, None] * D + offs_d[None, :], rotated.to(Out.dtype.element_ty), mask=inside)
