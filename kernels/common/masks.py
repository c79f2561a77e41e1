"""Which keys a block of queries sees: ranges of whole tiles, and the element mask of a tile on their border.

Everything here counts inside one sequence. Key j is allowed for query i where
i + offset - left <= j <= i + offset + right and 0 <= j < k_len; causal attention is right = 0.
Only the border tiles of a block's range need the element mask, so a kernel walks three spans: left border, full, right
border.
"""

import triton
import triton.language as tl

from .arguments import Mask
from .sequences import SeqlenInfo, TileCoord


@triton.jit
def key_spans(first, last, seq: SeqlenInfo, mask: Mask, BLOCK_N: tl.constexpr, CONFIG: tl.constexpr):
    """(lo, full_lo, full_hi, hi) in multiples of BLOCK_N but for hi: the keys of queries first .. last lie in
    [lo, hi), and every query sees all of [full_lo, full_hi)."""
    lo = 0
    full_lo = 0
    hi = seq.k_len
    full_hi = seq.k_len
    if CONFIG.has_left:
        lo = tl.maximum(first + seq.offset - mask.left, 0) // BLOCK_N * BLOCK_N
        full_lo = tl.cdiv(tl.maximum(last + seq.offset - mask.left, 0), BLOCK_N) * BLOCK_N
    if CONFIG.has_right:
        hi = tl.minimum(tl.maximum(last + seq.offset + mask.right + 1, 0), seq.k_len)
        full_hi = tl.minimum(tl.maximum(first + seq.offset + mask.right + 1, 0), seq.k_len)
    full_lo = tl.minimum(full_lo, tl.cdiv(hi, BLOCK_N) * BLOCK_N)
    return lo, full_lo, tl.maximum(full_lo, full_hi // BLOCK_N * BLOCK_N), hi


@triton.jit
def query_spans(first, last, seq: SeqlenInfo, mask: Mask, BLOCK_M: tl.constexpr, CONFIG: tl.constexpr):
    """key_spans for keys first .. last: the queries that see one of them, and whole tiles that see them all."""
    lo = 0
    full_lo = 0
    hi = seq.q_len
    full_hi = seq.q_len // BLOCK_M * BLOCK_M
    if CONFIG.has_right:
        lo = tl.maximum(first - seq.offset - mask.right, 0) // BLOCK_M * BLOCK_M
        full_lo = tl.cdiv(tl.maximum(last - seq.offset - mask.right, 0), BLOCK_M) * BLOCK_M
    if CONFIG.has_left:
        hi = tl.minimum(tl.maximum(last - seq.offset + mask.left + 1, 0), seq.q_len)
        full_hi = tl.minimum(tl.maximum(first - seq.offset + mask.left + 1, 0), full_hi) // BLOCK_M * BLOCK_M
    full_lo = tl.minimum(full_lo, tl.cdiv(hi, BLOCK_M) * BLOCK_M)
    return lo, full_lo, tl.maximum(full_lo, full_hi), hi


@triton.jit
def within(first, end, lo, full_lo, full_hi, hi, BLOCK: tl.constexpr):
    """Spans, in tiles of BLOCK, less what is out of reach: what is not begins at `first` and ends before `end`."""
    lo = tl.maximum(lo, first // BLOCK * BLOCK)
    end = tl.cdiv(end, BLOCK) * BLOCK
    hi = tl.minimum(hi, end)
    full_lo = tl.minimum(tl.maximum(full_lo, lo), tl.cdiv(hi, BLOCK) * BLOCK)
    return lo, full_lo, tl.maximum(full_lo, tl.minimum(full_hi, end)), hi


@triton.jit
def allowed(t: TileCoord, seq: SeqlenInfo, mask: Mask, CONFIG: tl.constexpr):
    """The element mask of a tile."""
    ok = t.j < seq.k_len
    if mask.k_starts is not None:
        ok = ok & (t.j >= 0)  # gradient_by_tile's tiles begin where the tensors' do
    if CONFIG.has_right:
        ok = ok & (t.j <= t.i + (seq.offset + mask.right))
    if CONFIG.has_left:
        ok = ok & (t.j >= t.i + (seq.offset - mask.left))
    return ok


@triton.jit
def of_pairs(tensor, strides, t: TileCoord, h):
    """Pointers to a tile's elements of a [B, H, Tq, Tk] tensor, of head h (int64) or of each of several heads."""
    tile = tensor + tl.cast(t.b, tl.int64) * strides.batch + h * strides.head
    tile += (t.q_start + t.i0).to(tl.int64) * strides.query + (t.k_start + t.j0).to(tl.int64) * strides.key
    return tile + (t.i_in - t.i0) * strides.query + (t.j_in - t.j0) * strides.key
