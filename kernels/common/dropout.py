"""Dropout's keep mask: Philox4x32-10 (Salmon et al. 2011), one counter for four neighbouring keys.

Element (b, h, i, j) is kept where lane j & 3 of the counter (j >> 2, i, b * Hq + h, 0) is at least the threshold, so
every backend, tile shape and pass draws the same mask. i and j index the tensors' token axes.
"""

import triton
import triton.language as tl

from .arguments import Dropout
from .sequences import TileCoord


@triton.jit
def _words(seed, group, i, bh):
    return tl.philox(seed.to(tl.uint64, bitcast=True), group, i, bh, 0, 10)


@triton.jit
def keep_tile(d: Dropout, t: TileCoord, num_heads, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr):
    """True where kept, [BLOCK_M, BLOCK_N]. ALIGNED says that the first key's token is a multiple of 4: then a counter
    is computed once and its four words interleaved; else each element computes its own and picks a word."""
    i0 = t.q_start + t.i0
    j0 = t.k_start + t.j0
    bh = t.b * num_heads + t.h
    i = (i0 + tl.arange(0, BLOCK_M))[:, None]
    least = d.threshold.to(tl.uint32, bitcast=True)
    if ALIGNED:
        group = (j0 // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
        w0, w1, w2, w3 = _words(d.seed, group, i, bh)
        # [BLOCK_M, BLOCK_N / 4, 2 (high bit of the lane), 2 (low bit)]
        words = tl.join(tl.join(w0 >= least, w2 >= least), tl.join(w1 >= least, w3 >= least))
        return words.reshape(BLOCK_M, BLOCK_N)
    else:
        j = (j0 + tl.arange(0, BLOCK_N))[None, :]
        w0, w1, w2, w3 = _words(d.seed, j >> 2, i, bh)
        low = tl.where(j % 2 == 0, w0, w1)
        high = tl.where(j % 2 == 0, w2, w3)
        return tl.where(j % 4 < 2, low, high) >= least
