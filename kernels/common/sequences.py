"""Where a program works: a sequence (a batch entry, or a packed document), and a tile of its queries by its keys."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arguments import Mask, Shape


class SeqlenInfo(NamedTuple):
    """A sequence: its batch entry in the tensors, where it begins in their token axes, its lengths, and its offset:
    query i sits at its key i + offset."""

    b: Any
    q_start: Any
    k_start: Any
    q_len: Any
    k_len: Any
    offset: Any


class TileCoord(NamedTuple):
    """Where a tile lies: batch entry b and head h, the tokens in the tensors at which its sequence begins, its first
    query i0 and key j0 inside the sequence, and the sequence's offset.

    i and j are the int32 indices of its queries and keys, shaped to broadcast ([BLOCK_M, 1] and [1, BLOCK_N], or
    transposed, or for groups of heads [1, BLOCK_M, 1] and [1, 1, BLOCK_N]); i_in and j_in are clamped to the sequence,
    so that no operand is read outside it; pi and pj are the positions, or i_in and j_in themselves if implicit. A tile
    of a group of heads has 0 for h, and `first`, at which key from j0 on each head's part of it begins."""

    b: Any
    h: Any
    q_start: Any
    k_start: Any
    i0: Any
    j0: Any
    offset: Any
    i: Any
    j: Any
    i_in: Any
    j_in: Any
    pi: Any
    pj: Any
    first: Any


@triton.jit
def open_sequence(index, mask: Mask, shape: Shape):
    """Sequence `index` of the batch or of the packed documents."""
    q_start = index * 0
    k_start = index * 0
    q_len = shape.q_tokens
    k_len = shape.k_tokens
    b = index
    if mask.cu_q is not None:
        q_start = tl.load(mask.cu_q + index)
        k_start = tl.load(mask.cu_k + index)
        q_len = tl.load(mask.cu_q + index + 1) - q_start
        k_len = tl.load(mask.cu_k + index + 1) - k_start
        b = index * 0
    if mask.k_lengths is not None:
        k_len = tl.load(mask.k_lengths + index)
    if mask.k_starts is not None:
        k_start = tl.load(mask.k_starts + index)
        k_len -= k_start
    offset = k_len - q_len
    if mask.offsets is not None:
        offset = tl.load(mask.offsets + index)
    if mask.offset is not None:
        offset = index * 0 + mask.offset
    if mask.k_starts is not None and (mask.offsets is not None or mask.offset is not None):
        offset -= k_start
    return SeqlenInfo(b, q_start, k_start, q_len, k_len, offset)


@triton.jit
def block_number(index, first, start, blocks, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """Which block of all sequences' the one is that begins at `first` of sequence `index`, which begins at token
    `start` and has `blocks` at most. As many as operands.all_blocks: one document may be far longer than the others."""
    if PACKED:
        return start // BLOCK + index + first // BLOCK
    else:
        return index * blocks + first // BLOCK
