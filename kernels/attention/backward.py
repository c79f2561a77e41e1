"""Gradients of the queries, keys and values, of slopes and, over implicit distances, of tables and profiles, in one
pass of five products a tile.

One program owns BLOCK_N keys of one key-value head and walks the queries that see them, of every query head in the
group. Tiles are held transposed, [BLOCK_N, BLOCK_M]: the weights then go from one product to the next in registers.
What a tile adds to its queries' gradient goes to float32 memory, one block of keys after another (dq_semaphore.py),
so the order of summation is fixed and no atomic adds to it.
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
from ..common.bf16x2 import widen_bf16
from ..common.bias import distance_tile, gather
from ..common.codegen import apart, hidden, opaque
from ..common.diagonals import SLOTS, add_bands, finish_bands, start_bands, store_bands
from ..common.dq_semaphore import publish, wait_for
from ..common.dropout import keep_tile
from ..common.masks import query_spans
from ..common.mma_layout import by_query, fragments, load_fragments, load_shared_inside, store_fragments, store_shared
from ..common.profile import Line, common_line, line_on, next_line, no_line, psi_tile, row_scales, runs
from ..common.scores import LOG2E, load_rows, logits_tile, rows_ahead, start_logits
from ..common.sequences import SeqlenInfo, TileCoord, block_number, open_sequence
from .logit_gradient import softmax_gradient
from .profile_gradient import (
    SPLIT,
    LineSums,
    add_parts,
    add_segments,
    by_thread,
    leave_segment,
    psi_gradient,
    store_parts,
)


class Gradients(NamedTuple):
    """DQ [B, H, Tq, BLOCK_D] float32, zeroed, takes the gradient of the queries times -1 / scale, in tiles of BLOCK_M
    queries as mma_layout.fragments keeps them (the last one whole too; transposed unless spread) but for packed
    documents. DK [B, Hkv, Tk, D] and DV [B, Hkv, Tk, DV] are contiguous; keys of no sequence are not written. By block
    of keys (operands.all_blocks), Slope [B, H, blocks] is float32 and zeroed, or None where not wanted."""

    DQ: Any
    DK: Any
    DV: Any
    Slope: Any


class DistanceSums(NamedTuple):
    """The gradient of a table [H, entries] or of psi [entries] over implicit distances, in int64, zeroed, and times
    `units` ([1], a power of 2), and diagonals.py's memory; None where not wanted."""

    Sums: Any
    units: Any
    Bands: Any


class ProfileSums(NamedTuple):
    """Of a profile: Segments [B, H, blocks, 2, W + 1], by block of keys, the sums of ds and of ds * y on each segment,
    float32 and zeroed; RowScale [B, Tq], the gradient of the queries' row scales, int64, zeroed, and times `units`
    ([1], a power of 2); and Parts, profile_gradient.py's memory. None where not wanted."""

    Segments: Any
    RowScale: Any
    units: Any
    Parts: Any


class Order(NamedTuple):
    """Ticket [1] and Progress [B, Hkv, blocks], int32 and zeroed."""

    Ticket: Any
    Progress: Any


class KeyBlock(NamedTuple):
    """A program's keys and negated values, its first key in the sequence, the keys' indices as TileCoord has them, and
    where its part of sums begins: the program's number, and that of its block among all."""

    k: Any
    v: Any
    j0: Any
    j: Any
    j_in: Any
    pj: Any
    program: Any
    sequence64: Any
    block: Any
    blocks: Any


class Queue(NamedTuple):
    """A program's own progress and that which it awaits before it adds to dq; the first query that the next block of
    keys sees; and what this program has published for the heads before."""

    progress: Any
    awaited: Any
    next_lo: Any
    done: Any


class Spans(NamedTuple):
    """query_spans of a block of keys."""

    lo: Any
    full_lo: Any
    full_hi: Any
    hi: Any


@triton.jit
def _span(SPAN: tl.constexpr, s: Spans, at, begin, straight, bent, PROFILE: tl.constexpr):
    """The queries of span 0, the border on the side of causal masking, 1, straight, 2, bent, or 3, the window's border
    and rows past the end, of the run of tiles that begins at `at`."""
    if SPAN == 0:
        return at, s.full_lo
    elif SPAN == 1:
        return begin, straight
    elif SPAN == 2:
        return straight, bent
    elif PROFILE:
        return bent, tl.where(bent >= s.full_hi, s.hi, bent)
    else:
        return bent, s.hi


@triton.jit
def _row_statistics(
    upstream: OutputGradient, stats, i0, row0, rows, q_len, slope, line: Line,
    BORDER: tl.constexpr, BY_QUERY: tl.constexpr, SHARES: tl.constexpr, PROFILE: tl.constexpr,
    CONFIG: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """(lse2 less what a tile's logits leave out, delta) of a step's rows."""
    BLOCK_M: tl.constexpr = rows.shape[0]
    lse2 = tl.load(upstream.lse2 + stats + row0 + rows)
    if BY_QUERY:
        delta = by_query(upstream.delta + stats + row0, 1, i0, BLOCK_M, NVIDIA)
        delta = gather(delta, i0, NVIDIA)
    else:
        delta = tl.load(upstream.delta + stats + row0 + rows)
    if BORDER:
        # A row past the end has no weight.
        lse2 = tl.where(tl.arange(0, BLOCK_M) < q_len - i0, lse2, float("inf"))
    if PROFILE:
        lse2 -= line.intercept * LOG2E
    if CONFIG.linear and not SHARES:
        lse2 += (slope * LOG2E) * tl.arange(0, BLOCK_M).to(tl.float32)
    return lse2, delta


@triton.jit
def _weights(
    q, lse2, line: Line, high, t: TileCoord, keys: KeyBlock, seq: SeqlenInfo, o: Operands, mask: Mask, dropout: Dropout,
    slope, row_scale, scale, softcap, factor, heads, dtype: tl.constexpr,
    BORDER: tl.constexpr, CONFIG: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """(weights, the same as they meet the values, in `dtype`, which of them dropout keeps, softcap's derivative)."""
    BLOCK_N: tl.constexpr = t.j.shape[0]
    BLOCK_M: tl.constexpr = t.i.shape[1]
    UNALIGNED: tl.constexpr = mask.cu_q is not None or mask.k_starts is not None
    s = start_logits(t, o, BLOCK_N, BLOCK_M, CONFIG, NVIDIA)
    s = tl.dot(keys.k, tl.trans(q), s, input_precision=CONFIG.precision)  # [BLOCK_N, BLOCK_M]
    s, slack = logits_tile(
        s, line, high, t, seq, o, mask, slope, t.i0 + t.offset, row_scale, scale, softcap, BORDER, CONFIG, NVIDIA
    )
    p = tl.exp2(s * factor - lse2[None, :])
    kept = p
    keep = p  # every element of a returned tuple is a tensor
    if dropout.threshold is not None:
        keep = tl.trans(keep_tile(dropout, t, heads, BLOCK_M, BLOCK_N, not UNALIGNED))
        kept = tl.where(keep, p * dropout.keep_scale, 0.0)
    return p, kept.to(dtype), keep, slack


@triton.jit
def _logit_gradient(
    p, kept, keep, slack, delta, v, do, dropout: Dropout, step,
    WEIGHTS_BF16: tl.constexpr, IN_BF16: tl.constexpr, APART: tl.constexpr,
    CONFIG: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """ds, and -ds in 16 bits."""
    START_AT_DELTA: tl.constexpr = dropout.threshold is None and not APART
    if START_AT_DELTA:
        # This costs what adding it would, and holds fewer registers.
        dp = tl.broadcast_to(delta[None, :], p.shape)
        dp = tl.dot(v, tl.trans(do), dp, input_precision=CONFIG.precision)
    else:
        dp = tl.dot(v, tl.trans(do), input_precision=CONFIG.precision)
    if WEIGHTS_BF16:
        p = widen_bf16(kept, NVIDIA)
    if APART:
        ds, ds_half = p, kept
        if apart(step, 0, NVIDIA):
            ds, ds_half = softmax_gradient(p, kept, dp, delta, keep, dropout, slack, START_AT_DELTA, IN_BF16, NVIDIA)
    else:
        ds, ds_half = softmax_gradient(p, kept, dp, delta, keep, dropout, slack, START_AT_DELTA, IN_BF16, NVIDIA)
    return ds, ds_half


@triton.jit
def _add_moments(moments, ds_half, columns, step, APART: tl.constexpr, PRECISION: tl.constexpr, NVIDIA: tl.constexpr):
    """In pairs of columns, the sum of ds over the queries so far and of ds times their distance from the first of the
    step, which moves on by a tile."""
    BLOCK_N: tl.constexpr = moments.shape[0]
    COLUMNS: tl.constexpr = moments.shape[1]
    BLOCK_M: tl.constexpr = columns.shape[0]
    total, first = tl.split(moments.reshape([BLOCK_N, COLUMNS // 2, 2]))
    first -= BLOCK_M * total
    moments = tl.join(total, first).reshape([BLOCK_N, COLUMNS])
    if APART:
        if apart(step, 4, NVIDIA):
            moments = tl.dot(ds_half, columns, moments, input_precision=PRECISION)
    else:
        moments = tl.dot(ds_half, columns, moments, input_precision=PRECISION)
    return moments


@triton.jit
def _add_queries_first(
    dq_tile, ds_half, k, rows, inside, after, step,
    PACKED: tl.constexpr, BORDER: tl.constexpr, PRECISION: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Adds a tile's share to dq at dq_tile, [BLOCK_M, BLOCK_D], for warps that share both axes of the results."""
    BLOCK_M: tl.constexpr = rows.shape[0]
    BLOCK_D: tl.constexpr = k.shape[1]
    if PACKED:
        dq_tile = opaque(dq_tile + rows[:, None] * BLOCK_D, after, NVIDIA)
        dq_tile += tl.arange(0, BLOCK_D)[None, :]
        dq = load_shared_inside(dq_tile, inside[:, None], after, BORDER, NVIDIA)
    else:
        dq_tile = fragments(dq_tile, after, BLOCK_M, BLOCK_D, NVIDIA)
        dq = load_fragments(dq_tile, after, NVIDIA)
    if apart(step, 3, NVIDIA):
        dq = tl.dot(tl.trans(ds_half), k, dq, input_precision=PRECISION)
    if PACKED:
        store_shared(dq_tile, dq, inside[:, None], BORDER, NVIDIA)
    else:
        store_fragments(dq_tile, dq, NVIDIA)


@triton.jit
def _add_channels_first(
    dq_tile, ds_half, k, rows, inside, after,
    PACKED: tl.constexpr, BORDER: tl.constexpr, PRECISION: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Adds a tile's share to dq at dq_tile, transposed, [BLOCK_D, BLOCK_M], for warps along the keys alone."""
    BLOCK_M: tl.constexpr = rows.shape[0]
    BLOCK_D: tl.constexpr = k.shape[1]
    if PACKED:
        dq_tile += tl.arange(0, BLOCK_D)[:, None]
        if not BORDER and BLOCK_M > 32:
            dq_tile = by_query(dq_tile, BLOCK_D, after, BLOCK_M, NVIDIA)
        else:
            dq_tile = opaque(dq_tile, after, NVIDIA) + rows[None, :] * BLOCK_D
        dq = load_shared_inside(dq_tile, inside[None, :], after, BORDER, NVIDIA)
    else:
        dq_tile = fragments(dq_tile, after, BLOCK_D, BLOCK_M, NVIDIA)
        dq = load_fragments(dq_tile, after, NVIDIA)
    dq = tl.dot(tl.trans(k), ds_half, dq, input_precision=PRECISION)
    if PACKED:
        store_shared(dq_tile, dq, inside[None, :], BORDER, NVIDIA)
    else:
        store_fragments(dq_tile, dq, NVIDIA)


@triton.jit
def _walk(
    dk, dv, h, keys: KeyBlock, spans: Spans, queue: Queue, seq: SeqlenInfo,
    inputs: Inputs, upstream: OutputGradient, to: Gradients, of_table: DistanceSums, of_psi: DistanceSums,
    of_profile: ProfileSums, shape: Shape, scale, softcap, o: Operands, mask: Mask, positions: Positions,
    dropout: Dropout,
    BLOCK_M: tl.constexpr, BACKWARD: tl.constexpr, CONFIG: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """Walks the queries of head h; dk and dv with what they add."""
    PRECISION: tl.constexpr = CONFIG.precision
    PACKED: tl.constexpr = mask.cu_q is not None
    PROFILE: tl.constexpr = o.psi is not None
    BLOCK_N: tl.constexpr = keys.k.shape[0]
    D: tl.constexpr = CONFIG.dim
    BLOCK_D: tl.constexpr = CONFIG.block_dim
    DV: tl.constexpr = CONFIG.value_dim
    BLOCK_DV: tl.constexpr = CONFIG.block_value_dim
    T: tl.constexpr = inputs.q.dtype.element_ty
    SPREAD: tl.constexpr = BACKWARD.spread
    PARTS: tl.constexpr = BACKWARD.parts
    OF_TABLE: tl.constexpr = of_table.Sums is not None
    OF_PSI: tl.constexpr = of_psi.Sums is not None
    OF_LINES: tl.constexpr = of_profile.RowScale is not None
    # Logit gradients are rounded to 16 bits for the products anyway. In bfloat16, which has float32's range, they are
    # made in it: half the instructions, and the weights hold half the registers until then. A profile's sums weigh them
    # by psi, whose mean makes most of the roundings of a row count alike: there only the weights are rounded.
    WEIGHTS_BF16: tl.constexpr = tl.bfloat16 == T and dropout.threshold is None and softcap is None
    IN_BF16: tl.constexpr = WEIGHTS_BF16 and not OF_LINES
    # A slope's gradient, the sum of ds times distance, is linear in the query: then tensor cores take its moments. But
    # on the mask's border: under a steep slope the key at distance 0 has nearly all of a row's weight, and what its ds
    # adds to both moments, which cancels, would round the rest away.
    MOMENTS: tl.constexpr = to.Slope is not None and CONFIG.linear and softcap is None and tl.float32 != T
    KEEPS_SIGN: tl.constexpr = CONFIG.bias.signed or CONFIG.linear  # no distance is negative, or its sign counts
    # Whether the logits too are spread over both axes. Sums by distance and by query need 16 keys of a warp's own.
    APART: tl.constexpr = SPREAD and not OF_TABLE and not OF_PSI and not OF_LINES
    COLUMNS: tl.constexpr = 8 if NVIDIA else 16  # the narrowest product
    GROUPS: tl.constexpr = BLOCK_N // 16
    CLAMP: tl.constexpr = CONFIG.bias.clamp
    q_stride = inputs.q_strides.token
    do_stride = upstream.strides.token
    b64 = seq.b.to(tl.int64)
    j0 = keys.j0
    offset = seq.offset
    factor = LOG2E if CONFIG.scale_before_bias else scale * LOG2E
    q_positions = None
    if CONFIG.explicit:
        q_positions = positions.q + b64 * positions.q_batch + seq.q_start

    h64 = tl.cast(h, tl.int64)
    start64 = seq.q_start.to(tl.int64)
    q_base = inputs.q + b64 * inputs.q_strides.batch + h64 * inputs.q_strides.head + start64 * q_stride
    do_base = upstream.grad_out + b64 * upstream.strides.batch + h64 * upstream.strides.head + start64 * do_stride
    stats = (b64 * shape.heads + h64) * shape.q_tokens + seq.q_start
    if PACKED:
        dq_base = to.DQ + stats * BLOCK_D
    else:
        dq_base = to.DQ + (b64 * shape.heads + h64) * (tl.cdiv(shape.q_tokens, BLOCK_M) * BLOCK_M * BLOCK_D)
    slope = None
    dslope = tl.zeros([BLOCK_N], tl.float32)
    if MOMENTS:
        # Of tiles inside the mask. Ones and numbers below 256 are exact in 16 bits.
        moments = tl.zeros([BLOCK_N, COLUMNS], tl.float32)
        query = tl.arange(0, BLOCK_M)[:, None].to(tl.float32)
        columns = tl.where(tl.arange(0, COLUMNS)[None, :] % 2 == 0, 1.0, query).to(T)
    # Where this program's sums for this head go.
    slot = (keys.sequence64 * shape.heads + h64) * keys.blocks + keys.block
    if OF_TABLE:
        dtable = of_table.Sums + h64 * o.table_head
        table_units = -gather(of_table.units, h, NVIDIA)
        table_bands = of_table.Bands + tl.cast(keys.program, tl.int64) * (SLOTS * (BLOCK_N // 2) * (BLOCK_M + 8))
        table_carried = start_bands(table_bands, spans.lo, GROUPS, BLOCK_M, NVIDIA)
    if OF_PSI:
        psi_units = gather(of_psi.units, h, NVIDIA)
        psi_bands = of_psi.Bands + tl.cast(keys.program, tl.int64) * (SLOTS * (BLOCK_N // 2) * (BLOCK_M + 8))
        psi_carried = start_bands(psi_bands, spans.lo, GROUPS, BLOCK_M, NVIDIA)
    line = no_line()
    high = line.segment
    common = line
    sums = None
    if OF_LINES:
        sums = LineSums(
            of_profile.Segments + slot * 2 * (o.num_knots + 1),
            of_profile.RowScale + b64 * shape.q_tokens + seq.q_start,
            tl.load(of_profile.units),
            of_profile.Parts + tl.cast(keys.program, tl.int64) * (2 * 8 * PARTS * BLOCK_M),
        )
        of_ds = tl.zeros([PARTS, 8, 4], tl.float32)
        of_dsy = tl.zeros([SPLIT, BLOCK_M], tl.float32)
    told = 0
    if o.slope is not None:
        slope = tl.load(o.slope + seq.b * o.slope_batch + h)
    if SPREAD:
        first_row = tl.minimum(spans.lo, seq.q_len - 1)
        q = rows_ahead(q_base, first_row, seq.q_len, q_stride, D, BLOCK_M, BLOCK_D)
        do = rows_ahead(do_base, first_row, seq.q_len, do_stride, DV, BLOCK_M, BLOCK_DV)
    at, begin, straight, bent = spans.lo, spans.full_lo, spans.full_hi, spans.full_hi
    for _ in tl.range(0, tl.cdiv(spans.hi - spans.lo, BLOCK_M) if PROFILE else 1):
        # A profile's tiles come in runs: of one segment, then of several each. Others are one run.
        if PROFILE:
            begin = tl.maximum(at, spans.full_lo)
            straight = begin
            bent = begin
            of_run = line.segment
            if at < spans.hi:
                straight, bent, of_run = runs(begin, spans.full_hi, j0, offset, o, BLOCK_M, BLOCK_N, CONFIG, NVIDIA)
        for span in tl.static_range(0, 4):
            if (span != 0 or CONFIG.has_right) and (span != 2 or PROFILE):
                span_lo, span_hi = _span(span, spans, at, begin, straight, bent, PROFILE)
                if span == 1 and PROFILE:
                    if OF_LINES:
                        of_ds, of_dsy = leave_segment(sums, line.segment, of_run, o.num_knots, of_ds, of_dsy)
                    line = line_on(of_run, o, h, NVIDIA)
                for step in tl.range(span_lo, span_hi, BLOCK_M, disable_licm=not BACKWARD.hoist):
                    i0 = hidden(step, BACKWARD.hide and NVIDIA)
                    rows = tl.arange(0, BLOCK_M)
                    if span % 3 == 0:
                        rows = tl.minimum(rows, seq.q_len - 1 - i0)
                    i = (i0 + tl.arange(0, BLOCK_M))[None, :]  # [1, BLOCK_M]
                    i_in = (i0 + rows)[None, :]
                    row0 = tl.cast(i0, tl.int64)
                    if not SPREAD:
                        q = load_rows(q_base + row0 * q_stride, rows, q_stride, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
                        do = load_rows(do_base + row0 * do_stride, rows, do_stride, DV, BLOCK_DV)
                    pi = i_in
                    if CONFIG.explicit:
                        pi = tl.load(q_positions + row0 + rows)[None, :]
                    t = TileCoord(
                        seq.b, h, seq.q_start, seq.k_start, i0, j0, offset, i, keys.j, i_in, keys.j_in, pi, keys.pj, 0
                    )  # fmt: skip
                    if OF_LINES and span != 1:
                        of_dsy = add_parts(
                            sums, i0 // BLOCK_M - 1, told, i0 > span_lo, line.slope, of_dsy, seq.q_len, offset,
                            q_positions, o, PARTS, BLOCK_M, NVIDIA,
                        )  # fmt: skip
                    row_scale = None
                    if PROFILE:
                        row_scale = tl.load(row_scales(pi, offset, o, CONFIG.explicit))
                    if PROFILE and span != 1:
                        segment = line.segment
                        line, high = next_line(line, t, row_scale, o, BLOCK_N, CONFIG, NVIDIA)
                    if PROFILE:
                        common = common_line(line, None if span == 1 else high)
                    lse2, delta = _row_statistics(
                        upstream, stats, i0, row0, rows, seq.q_len, slope, common, span % 3 == 0,
                        span % 3 != 0 and BLOCK_M > 32 and not SPREAD, BACKWARD.shares, PROFILE, CONFIG, NVIDIA,
                    )  # fmt: skip
                    p, kept, keep, slack = _weights(
                        q, lse2, common, None if span == 1 else high, t, keys, seq, o, mask, dropout,
                        slope, row_scale, scale, softcap, factor, shape.heads, do.dtype,
                        span % 3 == 0, CONFIG, NVIDIA,
                    )  # fmt: skip
                    if not SPREAD:
                        dv = tl.dot(kept, do, dv, input_precision=PRECISION)
                    ds, ds_half = _logit_gradient(
                        p, kept, keep, slack, delta, keys.v, do, dropout, step,
                        WEIGHTS_BF16, IN_BF16, APART, CONFIG, NVIDIA,
                    )  # fmt: skip
                    if to.Slope is not None and (not MOMENTS or span % 3 == 0):
                        distance = distance_tile(t, CONFIG.explicit)
                        dslope += tl.sum(ds * (distance if KEEPS_SIGN else tl.abs(distance)), 1)
                    if OF_TABLE:
                        of_ds_half = ds_half if of_table.Bands.dtype.element_ty == tl.bfloat16 else -ds
                        table_carried = store_bands(
                            table_bands, i0, of_ds_half, table_carried, BACKWARD.whole, NVIDIA
                        )  # fmt: skip
                    if OF_LINES:
                        whole = 1.0
                        if span != 1:
                            of_ds, of_dsy = leave_segment(sums, segment, line.segment, o.num_knots, of_ds, of_dsy)
                            whole = tl.where(high > line.segment, 0.0, 1.0)
                        psi = psi_tile(t, o, 1, BLOCK_N, BLOCK_M, CONFIG, NVIDIA)
                        store_parts(sums.Parts, i0 // BLOCK_M, ds, psi, whole, PARTS, BACKWARD.whole, NVIDIA)
                        of_ds += by_thread(ds, PARTS) * whole
                    if OF_PSI or OF_LINES:
                        dpsi = psi_gradient(ds, line, row_scale)
                        if span != 1:
                            if high > line.segment:
                                dpsi = add_segments(ds, line, high, sums, seq.q_len, t, row_scale, o, 1, CONFIG, NVIDIA)
                    if OF_PSI:
                        psi_carried = store_bands(psi_bands, i0, dpsi, psi_carried, BACKWARD.whole, NVIDIA)
                    if MOMENTS and span % 3 != 0:
                        moments = _add_moments(moments, ds_half, columns, step, APART, PRECISION, NVIDIA)
                    if SPREAD:
                        if apart(step, 1, NVIDIA):
                            dv = tl.dot(kept, do, dv, input_precision=PRECISION)
                        if apart(step, 2, NVIDIA):
                            dk = tl.dot(ds_half, q, dk, input_precision=PRECISION)
                    else:
                        dk = tl.dot(ds_half, q, dk, input_precision=PRECISION)
                    target = tl.where(i0 >= queue.next_lo, queue.done + i0 + BLOCK_M, 0)
                    after = wait_for(queue.awaited, target, NVIDIA)
                    if OF_TABLE:
                        add_bands(
                            dtable, table_units, table_bands, i0, after, j0, offset,
                            o.table_first, o.table_last, GROUPS, BLOCK_M, CLAMP, NVIDIA,
                        )  # fmt: skip
                    if OF_PSI:
                        add_bands(
                            of_psi.Sums, psi_units, psi_bands, i0, after, j0, offset,
                            o.psi_first, o.psi_last, GROUPS, BLOCK_M, CLAMP, NVIDIA,
                        )  # fmt: skip
                    if OF_LINES and span == 1:
                        of_dsy = add_parts(
                            sums, i0 // BLOCK_M - 1, after, i0 > span_lo, line.slope, of_dsy, seq.q_len, offset,
                            q_positions, o, PARTS, BLOCK_M, NVIDIA,
                        )  # fmt: skip
                    dq_tile = dq_base + row0 * BLOCK_D
                    inside = tl.arange(0, BLOCK_M) < seq.q_len - i0
                    if SPREAD:
                        _add_queries_first(
                            dq_tile, ds_half, keys.k, rows, inside, after, step,
                            PACKED, span % 3 == 0, PRECISION, NVIDIA,
                        )  # fmt: skip
                        # The wait for what was stored to be visible hides the time that these take.
                        q = rows_ahead(q_base, i0 + BLOCK_M, seq.q_len, q_stride, D, BLOCK_M, BLOCK_D)
                        do = rows_ahead(do_base, i0 + BLOCK_M, seq.q_len, do_stride, DV, BLOCK_M, BLOCK_DV)
                    else:
                        _add_channels_first(
                            dq_tile, ds_half, keys.k, rows, inside, after, PACKED, span % 3 == 0, PRECISION, NVIDIA
                        )
                    told = publish(queue.progress, queue.done + i0 + BLOCK_M, NVIDIA)
                if OF_LINES:
                    of_dsy = add_parts(
                        sums, tl.cdiv(span_hi, BLOCK_M) - 1, told, span_hi > span_lo, line.slope, of_dsy, seq.q_len,
                        offset, q_positions, o, PARTS, BLOCK_M, NVIDIA,
                    )  # fmt: skip
        if PROFILE:
            at = tl.where(bent >= spans.full_hi, tl.maximum(spans.hi, spans.full_hi), bent)
    if spans.hi > spans.lo:
        end = tl.cdiv(spans.hi, BLOCK_M) * BLOCK_M
        if OF_TABLE:
            finish_bands(
                dtable, table_units, table_bands, end, table_carried, queue.progress, queue.done + end, j0, offset,
                o.table_first, o.table_last, GROUPS, BLOCK_M, BACKWARD.whole, CLAMP, NVIDIA,
            )  # fmt: skip
        if OF_PSI:
            finish_bands(
                of_psi.Sums, psi_units, psi_bands, end, psi_carried, queue.progress, queue.done + end, j0, offset,
                o.psi_first, o.psi_last, GROUPS, BLOCK_M, BACKWARD.whole, CLAMP, NVIDIA,
            )  # fmt: skip
    if OF_LINES:
        of_ds, of_dsy = leave_segment(sums, line.segment, -1, o.num_knots, of_ds, of_dsy)
    if MOMENTS:
        total, first = tl.split(-moments.reshape([BLOCK_N, COLUMNS // 2, 2]))
        at_last = spans.full_hi - BLOCK_M + offset - keys.j
        dslope += tl.sum(tl.where(tl.arange(0, COLUMNS // 2)[None, :] == 0, first + total * at_last, 0.0), 1)
    if to.Slope is not None:
        own = tl.arange(0, BLOCK_N) < seq.k_len - j0
        tl.store(to.Slope + slot, -tl.sum(tl.where(own, dslope, 0.0)))
    return dk, dv


@triton.jit
def _spans_in_reach(mask: Mask, index, j0, h, seq: SeqlenInfo, k_max, shape: Shape, BLOCK_N: tl.constexpr):
    """Spans of head h, which reach.py has found: what every head shares need not be kept from one to the next."""
    at = block_number(index, j0, seq.k_start, tl.cdiv(k_max, BLOCK_N), BLOCK_N, mask.cu_q is not None)
    spans = mask.reach + 4 * (tl.cast(at, tl.int64) * shape.heads + h)
    return Spans(tl.load(spans), tl.load(spans + 1), tl.load(spans + 2), tl.load(spans + 3))


@triton.jit(do_not_specialize=DROPOUT_BITS)
def attention_backward(
    inputs: Inputs, upstream: OutputGradient, to: Gradients, of_table: DistanceSums, of_psi: DistanceSums,
    of_profile: ProfileSums, order: Order, num_sequences, shape: Shape, k_max, scale, softcap,
    operands: Operands, mask: Mask, positions: Positions, threshold, keep_scale, seed,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BACKWARD: tl.constexpr, CONFIG: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    PACKED: tl.constexpr = mask.cu_q is not None
    D: tl.constexpr = CONFIG.dim
    BLOCK_D: tl.constexpr = CONFIG.block_dim
    DV: tl.constexpr = CONFIG.value_dim
    BLOCK_DV: tl.constexpr = CONFIG.block_value_dim
    blocks = tl.cdiv(k_max, BLOCK_N)
    kv_heads = shape.heads // shape.group
    pid = tl.atomic_add(order.Ticket, 1, sem="relaxed")
    walks = num_sequences * kv_heads
    n = blocks - 1 - pid // walks  # the last keys first: their programs are whom the others wait for
    j0 = n * BLOCK_N
    kv = pid % walks % kv_heads
    index = pid % walks // kv_heads
    program = pid
    progress = order.Progress + (pid % walks) * blocks + n
    seq = open_sequence(index, mask, shape)
    if j0 >= seq.k_len:
        return
    if BACKWARD.spread and PACKED:
        if seq.q_len == 0:
            return
    sequence64 = index.to(tl.int64)
    if PACKED:
        # Blocks of all documents are numbered by tokens, for one document may be far longer than the others.
        n += seq.k_start // BLOCK_N + index
        blocks = shape.k_tokens // BLOCK_N + num_sequences
        sequence64 *= 0
        program = kv * blocks + n
        progress = order.Progress + program
    b64 = seq.b.to(tl.int64)
    kv64 = kv.to(tl.int64)
    drawn = seed
    if threshold is not None:
        drawn = tl.load(seed)
    dropout = Dropout(threshold, keep_scale, drawn)
    last = tl.minimum(j0 + BLOCK_N, seq.k_len) - 1
    # The next block of keys sees the queries from next_lo on. The last block waits for nobody.
    next_lo = tl.cdiv(seq.q_len, BLOCK_M) * BLOCK_M
    awaited = progress
    if j0 + BLOCK_N < seq.k_len:
        awaited = progress + 1
        next_lo = tl.maximum(j0 + BLOCK_N - seq.offset - mask.right, 0) // BLOCK_M * BLOCK_M if CONFIG.has_right else 0
    done = 0

    own = tl.arange(0, BLOCK_N) < seq.k_len - j0
    cols = tl.minimum(tl.arange(0, BLOCK_N), seq.k_len - 1 - j0)
    j = (j0 + tl.arange(0, BLOCK_N))[:, None]  # [BLOCK_N, 1]
    j_in = (j0 + cols)[:, None]
    col0 = (seq.k_start + j0).to(tl.int64)
    k_base = inputs.k + b64 * inputs.k_strides.batch + kv64 * inputs.k_strides.head + col0 * inputs.k_strides.token
    k = load_rows(k_base, cols, inputs.k_strides.token, D, BLOCK_D)
    # Negated, as all that follows from it: the product with the output's gradient then starts at delta, as it is.
    v_base = inputs.v + b64 * inputs.v_strides.batch + kv64 * inputs.v_strides.head + col0 * inputs.v_strides.token
    v = -load_rows(v_base, cols, inputs.v_strides.token, DV, BLOCK_DV)
    pj = j_in
    if CONFIG.explicit:
        pj = tl.load(positions.k + b64 * positions.k_batch + col0 + cols)[:, None]
    keys = KeyBlock(k, v, j0, j, j_in, pj, program, sequence64, n, blocks)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    lo, full_lo, full_hi, hi = query_spans(j0, last, seq, mask, BLOCK_M, CONFIG)
    if j0 + BLOCK_N > seq.k_len:
        full_hi = full_lo  # keys past the end are masked everywhere: their logits must not reach dq
    for h in range(kv * shape.group, (kv + 1) * shape.group):
        spans = Spans(lo, full_lo, full_hi, hi)
        if mask.reach is not None:
            spans = _spans_in_reach(mask, index, j0, h, seq, k_max, shape, BLOCK_N)
        queue = Queue(progress, awaited, next_lo, done)
        dk, dv = _walk(
            dk, dv, h, keys, spans, queue, seq, inputs, upstream, to, of_table, of_psi, of_profile, shape,
            scale, softcap, operands, mask, positions, dropout, BLOCK_M, BACKWARD, CONFIG, NVIDIA,
        )  # fmt: skip
        done += tl.cdiv(seq.q_len, BLOCK_M) * BLOCK_M
        publish(progress, done, NVIDIA)

    inside = own[:, None]
    out0 = (b64 * kv_heads + kv64) * shape.k_tokens + col0
    offs_n = tl.arange(0, BLOCK_N)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    dk = (dk * -scale).to(to.DK.dtype.element_ty)
    tl.store(to.DK + out0 * D + offs_n * D + offs_d, dk, mask=inside & (offs_d < D))
    offs_d = tl.arange(0, BLOCK_DV)[None, :]
    dv = dv.to(to.DV.dtype.element_ty)
    tl.store(to.DV + out0 * DV + offs_n * DV + offs_d, dv, mask=inside & (offs_d < DV))
