"""Which keys each block of queries cannot do without, where a bias falls with the distance, and the other way round.

No key of a block has a logit above |scale| |q| |k| plus the highest bias at its distances, and each row's maximum is at
least the logit of its nearest visible key, -|scale| |q| |k| plus the bias there. Keys for which the first is NATS and
the logarithm of their number below the second weigh, all together, less than 2^-40 of the row: less than any dtype's
rounding. Norms are the largest of CELL keys and of a block's queries, so that one large key keeps its own cell in reach
and what lies before it, but nothing else.

Reach is int32, [blocks of queries of all sequences, H, 2], the first key that is in reach and the end; of a backward
pass [blocks of keys, H, 4], the spans of queries that walk them (common/masks.py).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.arguments import Angles, Mask, Shape, Strides
from ..common.masks import query_spans, within
from ..common.pages import Pages, paged_rows
from ..common.rotary import load_turned
from ..common.sequences import block_number, open_sequence

CELL: tl.constexpr = tl.constexpr(64)
NATS: tl.constexpr = tl.constexpr(27.7258872)  # 2^40
# What rounding the operands (rotated ones, say) may add to their norms.
SLACK: tl.constexpr = tl.constexpr(1.01)


class Falling(NamedTuple):
    """Biases of the distance alone: slopes as in Operands, a table [H, entries] from distance `first` to `last`, and
    [H, cells] each, the highest value from an entry's cell on (Behind), and up to its end (Before)."""

    slope: Any
    slope_batch: Any
    table: Any
    table_head: Any
    first: Any
    last: Any
    behind: Any
    before: Any
    cells: Any


@triton.jit
def _norms(
    x, angles: Angles, at_angle, first, end, stride,
    HALF: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """[ROWS] norms of rows first .. first + ROWS - 1 of x, the last row again for those from `end` on; infinite where
    one is NaN."""
    rows = tl.minimum(first + tl.arange(0, ROWS), end - 1)
    row = load_turned(x, angles, rows, stride, at_angle, HALF, D, BLOCK_D, INTERLEAVED).to(tl.float32)
    squares = tl.sum(row * row, 1)
    return tl.sqrt(tl.where(squares < float("inf"), squares, float("inf"))) * SLACK


@triton.jit
def largest_norms(
    k, Norms, strides: Strides, angles: Angles, pages: Pages, shape: Shape, mask: Mask, k_max, cells,
    HALF: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Norms [Hkv, cells of all sequences]: the largest norm of each CELL keys, which may lie in pages."""
    of_each = tl.cdiv(k_max, CELL)
    pid = tl.program_id(0)
    kv_heads = shape.heads // shape.group
    h = pid // of_each % kv_heads
    index = pid // of_each // kv_heads
    seq = open_sequence(index, mask, shape)
    j0 = pid % of_each * CELL
    if j0 >= seq.k_len:
        return
    b64 = seq.b.to(tl.int64)
    base = k + h.to(tl.int64) * strides.head
    if PAGE == 0:
        base += b64 * strides.batch
    largest = tl.zeros([ROWS], tl.float32)
    for first in tl.static_range(0, CELL, ROWS):
        token = seq.k_start + tl.minimum(j0 + first, seq.k_len - 1)
        rows_left = seq.k_start + seq.k_len - token
        if PAGE > 0:
            rows = tl.minimum(tl.arange(0, ROWS), rows_left - 1)
            x = paged_rows(base, pages, seq.b, token, rows, strides.batch, strides.token, PAGE, False)
        else:
            x = base + token.to(tl.int64) * strides.token
        at_angle = b64 * angles.batch + token.to(tl.int64) * HALF
        norms = _norms(x, angles, at_angle, 0, rows_left, strides.token, HALF, D, BLOCK_D, INTERLEAVED, ROWS)
        largest = tl.maximum(largest, norms)
    at = block_number(index, j0, seq.k_start, of_each, CELL, mask.cu_q is not None)
    tl.store(Norms + h.to(tl.int64) * cells + at, tl.max(largest))


@triton.jit
def _product(q, k, scale, softcap):
    """What scaled dot products of such norms cannot exceed."""
    most = scale * q * k
    if softcap is not None:
        # Of infinite ones some may be NaN: those stay.
        most = tl.where((most > softcap) & (most < float("inf")), softcap, most)
    return most


@triton.jit
def _entry(d, f: Falling):
    return tl.minimum(tl.maximum(d, f.first), f.last) - f.first


@triton.jit
def find_reach(
    q, Reach, norms, cells, strides: Strides, angles: Angles, falling: Falling, shape: Shape, mask: Mask,
    q_max, k_max, scale, softcap,
    HALF: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, SIGNED: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """Reach of blocks of BLOCK queries, from the `norms` of keys. `scale` is not negative."""
    PACKED: tl.constexpr = mask.cu_q is not None
    STEP: tl.constexpr = 128  # cells at a time
    blocks = tl.cdiv(q_max, BLOCK)
    pid = tl.program_id(0)
    h = pid // blocks % shape.heads
    index = pid // blocks // shape.heads
    seq = open_sequence(index, mask, shape)
    i0 = pid % blocks * BLOCK
    if i0 >= seq.q_len:
        return
    last = tl.minimum(i0 + BLOCK, seq.q_len) - 1
    b64 = seq.b.to(tl.int64)
    h64 = h.to(tl.int64)
    token = (seq.q_start + i0).to(tl.int64)
    x = q + b64 * strides.batch + h64 * strides.head + token * strides.token
    at_angle = b64 * angles.batch + token * HALF
    largest = tl.zeros([ROWS], tl.float32)
    for first in tl.static_range(0, BLOCK, ROWS):
        of_rows = _norms(x, angles, at_angle, first, last + 1 - i0, strides.token, HALF, D, BLOCK_D, INTERLEAVED, ROWS)
        largest = tl.maximum(largest, of_rows)
    q_norm = tl.max(largest)
    norms += (h // shape.group).to(tl.int64) * cells
    norms += block_number(index, 0, seq.k_start, tl.cdiv(k_max, CELL), CELL, PACKED)

    slope = 0.0
    if falling.slope is not None:
        slope = tl.load(falling.slope + seq.b * falling.slope_batch + h)

    # The least that a row's nearest visible key may have for a logit.
    i = tl.minimum(i0 + tl.arange(0, BLOCK), last)
    low = tl.zeros([BLOCK], tl.int32)
    high = low + seq.k_len
    if CONFIG.has_left:
        low = tl.maximum(i + (seq.offset - mask.left), low)
    if CONFIG.has_right:
        high = tl.minimum(i + (seq.offset + mask.right + 1), high)
    seen = low < high
    near = tl.minimum(tl.maximum(tl.minimum(tl.maximum(i + seq.offset, low), high - 1), 0), seq.k_len - 1)
    d = i + seq.offset - near
    least = tl.zeros([BLOCK], tl.float32)
    if falling.slope is not None:
        at = d.to(tl.float32)
        least -= slope * (at if SIGNED else tl.abs(at))
    if falling.table is not None:
        least += tl.load(falling.table + h64 * falling.table_head + _entry(d, falling), mask=seen, other=0.0)
    least -= _product(q_norm, tl.load(norms + near // CELL, mask=seen, other=0.0), scale, softcap)
    least = tl.where(least == least, least, float("-inf"))  # NaN
    limit = tl.min(tl.where(seen, least, float("inf"))) - NATS - tl.log(tl.maximum(seq.k_len, 1).to(tl.float32))

    first = index * 0 + seq.k_len
    end = first * 0
    for n0 in tl.range(0, tl.cdiv(seq.k_len, CELL), STEP):
        n = n0 + tl.arange(0, STEP)
        there = n * CELL < seq.k_len
        nearest = i0 + seq.offset - (tl.minimum(n * CELL + CELL, seq.k_len) - 1)  # distances, in their order
        farthest = last + seq.offset - n * CELL
        most = _product(q_norm, tl.load(norms + n, mask=there, other=0.0), scale, softcap)
        if falling.slope is not None:
            a = nearest.to(tl.float32)
            b = farthest.to(tl.float32)
            if not SIGNED:
                a, b = tl.maximum(tl.maximum(a, -b), 0.0), tl.maximum(b, -a)
            most += tl.maximum(-slope * a, -slope * b)
        if falling.table is not None:
            row = h64 * falling.cells
            behind = tl.load(falling.behind + row + _entry(nearest, falling) // CELL)
            before = tl.load(falling.before + row + _entry(farthest, falling) // CELL)
            most += tl.minimum(behind, before)
        needed = there & ((most <= limit) == 0)  # NaN is needed
        first = tl.minimum(first, tl.min(tl.where(needed, n * CELL, seq.k_len)))
        end = tl.maximum(end, tl.max(tl.where(needed, n * CELL + CELL, 0)))
    at_block = block_number(index, i0, seq.q_start, blocks, BLOCK, PACKED)
    to = Reach + 2 * (tl.cast(at_block, tl.int64) * shape.heads + h)
    tl.store(to, first)
    tl.store(to + 1, end)


@triton.jit
def turn_reach(
    of_queries, Reach, shape: Shape, mask: Mask, q_max, k_max,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CONFIG: tl.constexpr,
):  # fmt: skip
    """Reach of blocks of BLOCK_N keys, in tiles of BLOCK_M queries, from that of blocks of ROWS queries.

    What a block of queries has in reach is a range, so of two blocks of keys the later one's queries neither begin nor
    end before the other's: on that rests the order in which blocks of keys add to dq."""
    PACKED: tl.constexpr = mask.cu_q is not None
    STEP: tl.constexpr = 128  # blocks of queries at a time
    blocks = tl.cdiv(k_max, BLOCK_N)
    pid = tl.program_id(0)
    h = pid // blocks % shape.heads
    index = pid // blocks // shape.heads
    seq = open_sequence(index, mask, shape)
    j0 = pid % blocks * BLOCK_N
    if j0 >= seq.k_len:
        return
    last = tl.minimum(j0 + BLOCK_N, seq.k_len) - 1
    start = block_number(index, 0, seq.q_start, tl.cdiv(q_max, ROWS), ROWS, PACKED)
    rows = tl.cdiv(seq.q_len, ROWS)
    first = index * 0 + rows
    end = first * 0
    for r0 in tl.range(0, rows, STEP):
        r = r0 + tl.arange(0, STEP)
        there = r < rows
        pair = of_queries + 2 * ((start + r).to(tl.int64) * shape.heads + h)
        begins = tl.load(pair, mask=there, other=0) <= last
        ends = tl.load(pair + 1, mask=there, other=0) > j0
        first = tl.minimum(first, tl.min(tl.where(there & ends, r, rows)))
        end = tl.maximum(end, tl.max(tl.where(there & begins, r + 1, 0)))
    lo, full_lo, full_hi, hi = query_spans(j0, last, seq, mask, BLOCK_M, CONFIG)
    if j0 + BLOCK_N > seq.k_len:
        full_hi = full_lo  # as attention_backward has it
    lo, full_lo, full_hi, hi = within(first * ROWS, end * ROWS, lo, full_lo, full_hi, hi, BLOCK_M)
    at_block = block_number(index, j0, seq.k_start, blocks, BLOCK_N, PACKED)
    spans = Reach + 4 * (tl.cast(at_block, tl.int64) * shape.heads + h)
    tl.store(spans, lo)
    tl.store(spans + 1, full_lo)
    tl.store(spans + 2, full_hi)
    tl.store(spans + 3, hi)
