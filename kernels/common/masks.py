"""Which keys a block of queries sees: ranges of whole tiles, and the element mask of a tile on their border.

Everything here counts inside one sequence. Key j is allowed for query i where
i + offset - left <= j <= i + offset + right and j < k_len; causal attention is right = 0.
Only the border tiles of a block's range need the element mask, so a kernel walks three spans: left border, full, right
border.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Mask(NamedTuple):
    """What hides keys of a sequence, as a kernel's arguments: the window around i + offset, and Boolean or None."""

    k_len: Any
    offset: Any
    left: Any
    right: Any
    Boolean: Any
    stride_bb: Any
    stride_bh: Any
    stride_bi: Any
    stride_bj: Any


@triton.jit
def sequence(KLengths, CuQ, CuK, index, q_len, k_len):
    """The first token and the length of sequence `index`'s queries and keys, in the tensors' token axis."""
    q_start = index * 0
    k_start = index * 0
    if CuQ is not None:
        q_start = tl.load(CuQ + index)
        k_start = tl.load(CuK + index)
        q_len = tl.load(CuQ + index + 1) - q_start
        k_len = tl.load(CuK + index + 1) - k_start
    if KLengths is not None:
        k_len = tl.load(KLengths + index)
    return q_start, k_start, q_len, k_len


@triton.jit
def mask_offset(q_len, k_len, TOP_LEFT: tl.constexpr):
    if TOP_LEFT:
        return 0
    else:
        return k_len - q_len


@triton.jit
def key_spans(
    first, last, k_len, offset, left, right, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):
    """(lo, full_lo, full_hi, hi) in multiples of BLOCK_N but for hi: the keys of queries first .. last lie in
    [lo, hi), and every query sees all of [full_lo, full_hi)."""
    lo = 0
    full_lo = 0
    hi = k_len
    full_hi = k_len
    if HAS_LEFT:
        lo = tl.maximum(first + offset - left, 0) // BLOCK_N * BLOCK_N
        full_lo = tl.cdiv(tl.maximum(last + offset - left, 0), BLOCK_N) * BLOCK_N
    if HAS_RIGHT:
        hi = tl.minimum(tl.maximum(last + offset + right + 1, 0), k_len)
        full_hi = tl.minimum(tl.maximum(first + offset + right + 1, 0), k_len)
    full_lo = tl.minimum(full_lo, tl.cdiv(hi, BLOCK_N) * BLOCK_N)
    return lo, full_lo, tl.maximum(full_lo, full_hi // BLOCK_N * BLOCK_N), hi


@triton.jit
def query_spans(
    first, last, q_len, offset, left, right, BLOCK_M: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):
    """key_spans for keys first .. last: the queries that see one of them, and whole tiles that see them all."""
    lo = 0
    full_lo = 0
    hi = q_len
    full_hi = q_len // BLOCK_M * BLOCK_M
    if HAS_RIGHT:
        lo = tl.maximum(first - offset - right, 0) // BLOCK_M * BLOCK_M
        full_lo = tl.cdiv(tl.maximum(last - offset - right, 0), BLOCK_M) * BLOCK_M
    if HAS_LEFT:
        hi = tl.minimum(tl.maximum(last - offset + left + 1, 0), q_len)
        full_hi = tl.minimum(tl.maximum(first - offset + left + 1, 0), full_hi) // BLOCK_M * BLOCK_M
    full_lo = tl.minimum(full_lo, tl.cdiv(hi, BLOCK_M) * BLOCK_M)
    return lo, full_lo, tl.maximum(full_lo, full_hi), hi


@triton.jit
def allowed(i, j, k_len, offset, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """The element mask; i and j broadcast against each other, in either order of axes."""
    ok = j < k_len
    if HAS_RIGHT:
        ok = ok & (j <= i + (offset + right))
    if HAS_LEFT:
        ok = ok & (j >= i + (offset - left))
    return ok
