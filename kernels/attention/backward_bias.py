"""Gradients of dense biases and, for explicit positions, of tables and psi.

A program owns one tile and walks the batches and heads that share the bias. Where tiles share entries too, of a bias
that broadcasts over queries or keys (one sum a row or column of the tile) or of a table that explicit positions index
(no two elements of a tile need share one), they are added by atomics: of integers, in units so small that nothing is
lost, since sums of integers do not depend on their order.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.arguments import (
    DROPOUT_BITS,
    Dropout,
    Inputs,
    Mask,
    Operands,
    OutputGradient,
    Positions,
    Shape,
)
from ..common.bias import entry_of
from ..common.sequences import open_sequence
from .logit_gradient import logit_gradient, open_tile
from .profile_gradient import add_segments, psi_gradient


class DenseGradient(NamedTuple):
    """Dense [1 or B, 1 or H, Tq, Tk] float32: the sum over the batches and heads that share an element, batches_each
    and heads_each of them. It comes zeroed where documents are packed, and one program has one document.

    Sums, int64, zeroed, and times `units` ([1], a power of 2): [1 or B, 1 or H, Tk], the sum over queries too, or
    [.., Tq], over keys."""

    Dense: Any
    Sums: Any
    units: Any
    stride_batch: Any
    stride_head: Any
    heads: Any
    batches_each: Any
    heads_each: Any


class EntrySums(NamedTuple):
    """The gradient of a table [H, L] or of psi [L] over explicit positions: int64, zeroed, and times `units` ([1], a
    power of 2)."""

    Sums: Any
    units: Any


@triton.jit(do_not_specialize=DROPOUT_BITS)
def gradient_by_tile(
    inputs: Inputs, upstream: OutputGradient, of_dense: DenseGradient, of_table: EntrySums, of_psi: EntrySums,
    shape: Shape, q_max, k_max, scale, softcap, operands: Operands, mask: Mask, positions: Positions,
    threshold, keep_scale, seed,
    OVER_QUERIES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CONFIG: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """The gradients that there are tensors for; OVER_QUERIES says over what of_dense.Sums are. The gradient of a table
    has the heads' stride of the table."""
    PACKED: tl.constexpr = mask.cu_q is not None
    drawn = seed
    if threshold is not None:
        drawn = tl.load(seed)
    dropout = Dropout(threshold, keep_scale, drawn)
    blocks_m = tl.cdiv(q_max, BLOCK_M)
    blocks_n = tl.cdiv(k_max, BLOCK_N)
    pid = tl.program_id(0)
    i0 = (pid % blocks_m) * BLOCK_M
    j0 = (pid // blocks_m % blocks_n) * BLOCK_N
    head = pid // blocks_m // blocks_n % of_dense.heads
    first = pid // blocks_m // blocks_n // of_dense.heads
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    seq = open_sequence(first, mask, shape)
    for n in range(of_dense.batches_each * of_dense.heads_each):
        index = first + n // of_dense.heads_each
        h = head + n % of_dense.heads_each
        seq = open_sequence(index, mask, shape)
        first_key = j0
        seen = (i0 < seq.q_len) & (j0 < seq.k_len)
        if mask.k_starts is not None:
            first_key = j0 - seq.k_start
            seen = (i0 < seq.q_len) & (first_key < seq.k_len) & (first_key + BLOCK_N > 0)
        if CONFIG.has_right:
            seen = seen & (first_key <= i0 + (BLOCK_M - 1) + seq.offset + mask.right)
        if CONFIG.has_left:
            seen = seen & (first_key + (BLOCK_N - 1) >= i0 + seq.offset - mask.left)
        if seen:
            t = open_tile(seq, h, i0, first_key, positions, BLOCK_M, BLOCK_N, CONFIG)
            ds, row_scale, line, high = logit_gradient(
                inputs, upstream, t, seq, operands, mask, dropout, scale, softcap, shape, CONFIG, NVIDIA
            )
            acc += ds
            if of_table.Sums is not None:
                units = (ds * tl.load(of_table.units)).to(tl.int64)
                entry = entry_of(t, operands.table_first, operands.table_last)
                tl.atomic_add(of_table.Sums + h.to(tl.int64) * operands.table_head + entry, units, sem="relaxed")
            if of_psi.Sums is not None:
                dpsi = psi_gradient(ds, line, row_scale)
                if high > line.segment:
                    dpsi = add_segments(ds, line, high, None, seq.q_len, t, row_scale, operands, 0, CONFIG, NVIDIA)
                entry = entry_of(t, operands.psi_first, operands.psi_last)
                units = (dpsi * tl.load(of_psi.units)).to(tl.int64)
                tl.atomic_add(of_psi.Sums + entry, units, sem="relaxed")
    b_out = first * 0 if PACKED else first
    i = i0 + tl.arange(0, BLOCK_M)
    j = j0 + tl.arange(0, BLOCK_N)
    j_out = seq.k_start + j if PACKED else j
    row_in = i < (seq.q_len if PACKED else shape.q_tokens)
    column_in = j < (seq.k_len if PACKED else shape.k_tokens)
    shared = b_out.to(tl.int64) * of_dense.stride_batch + head.to(tl.int64) * of_dense.stride_head
    if of_dense.Dense is not None:
        at = (seq.q_start + i).to(tl.int64)[:, None] * shape.k_tokens + j_out[None, :]
        tl.store(of_dense.Dense + shared + at, acc, mask=row_in[:, None] & column_in[None, :])
    if of_dense.Sums is not None:
        if OVER_QUERIES:
            sums = (tl.sum(acc, 0) * tl.load(of_dense.units)).to(tl.int64)
            tl.atomic_add(of_dense.Sums + shared + j_out, sums, mask=column_in, sem="relaxed")
        else:
            sums = (tl.sum(acc, 1) * tl.load(of_dense.units)).to(tl.int64)
            tl.atomic_add(of_dense.Sums + shared + seq.q_start + i, sums, mask=row_in, sem="relaxed")
