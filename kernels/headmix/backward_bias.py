"""HeadMix gradients of what is indexed by distance or by (i, j), in the inner bias or the outer one.

As in attention/backward_bias.py: a program walks the tiles of one diagonal (tables, psi) or the batches that share a
tile (dense biases), so sums have a fixed order. Explicit positions have no diagonals: their sums are integers, whose
order does not matter.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.arguments import DROPOUT_BITS, Dropout, Inputs, Mask, Operands, OutputGradient, Positions, Shape
from ..common.bias import entry_of
from ..common.sequences import open_sequence
from .backward_step import open_tensors, score_gradients
from .bias import open_tile
from .mlp import MixWeights, load_weights
from .scores import Mix, head_groups, input_gradient, mlp_gradient
from .sums import psi_gradient


class Target(NamedTuple):
    """Along diagonals, Table [H, bands, 2 * BLOCK] and Psi [bands, 2 * BLOCK], of which entry x of band t is the sum at
    the distance first_corner + (t - 1) * BLOCK + x over the tiles of the band.

    Else Dense [B or 1, H or 1, Tq, Tk], and, zeroed, int64, Table [H, L] and Psi [L] of explicit positions, times
    table_units and psi_units ([1], powers of 2); and so Dense [.., Tk] or [.., Tq], times dense_units, where the kernel
    sums over queries or keys. None where not wanted."""

    Table: Any
    Psi: Any
    Dense: Any
    table_units: Any
    psi_units: Any
    dense_units: Any
    table_head: Any
    dense_batch: Any
    dense_head: Any


@triton.jit
def _add_units(at, sums, units, inside):
    """Adds float32 `sums` to integers, so that the order of additions does not matter."""
    tl.atomic_add(at, (sums * tl.load(units)).to(tl.int64), mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=DROPOUT_BITS)
def headmix_gradient_by_tile(
    inputs: Inputs, upstream: OutputGradient, to: Target, first_corner, num_sequences, batches_each,
    shape: Shape, q_max, k_max, scale, softcap,
    outer: Operands, inner: Operands, weights: MixWeights, mask: Mask, positions: Positions,
    threshold, keep_scale, seed,
    ALONG_DIAGONAL: tl.constexpr, OF_INNER: tl.constexpr, SHARED_HEADS: tl.constexpr, SUMMED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CONFIG: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """OF_INNER says of which bias; ALONG_DIAGONAL and `to` what for, SHARED_HEADS that dense biases are summed over
    heads, and SUMMED that they are over queries (2) or keys (3)."""
    pid = tl.program_id(0)
    GROUPS: tl.constexpr = CONFIG.groups
    GROUP: tl.constexpr = CONFIG.group
    OWN: tl.constexpr = CONFIG.inner if OF_INNER else CONFIG.outer
    drawn = seed
    if threshold is not None:
        drawn = tl.load(seed)
    dropout = Dropout(threshold, keep_scale, drawn)
    mix = Mix(inner, outer, weights.rows, weights.rows_first, scale, softcap, shape.heads, mask, positions, dropout)
    own = inner if OF_INNER else outer
    w = load_weights(weights, CONFIG)
    heads, kv = head_groups(shape, CONFIG)
    by_head = ()
    for _ in tl.static_range(GROUPS):
        by_head += (tl.zeros([GROUP, BLOCK_M, BLOCK_N], tl.float32),)
    psi = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    blocks_m = tl.cdiv(q_max, BLOCK_M)
    blocks_n = tl.cdiv(k_max, BLOCK_N)
    corner = first_corner + pid * BLOCK_N
    tile_i0 = (pid % blocks_m) * BLOCK_M
    tile_j0 = (pid // blocks_m % blocks_n) * BLOCK_N
    first = 0 if ALONG_DIAGONAL else pid // blocks_m // blocks_n
    count = num_sequences if ALONG_DIAGONAL else batches_each
    for index in range(first, first + count):
        seq = open_sequence(index, mask, shape)
        x = open_tensors(seq, inputs, upstream, shape, CONFIG)
        offset = seq.offset
        if ALONG_DIAGONAL:
            lo = tl.maximum(corner - offset - (BLOCK_N - 1), 0) // BLOCK_M * BLOCK_M
            hi = tl.where(seq.k_len > 0, tl.minimum(corner - offset + seq.k_len, seq.q_len), 0)
            low_j0 = lo + offset - corner
        else:
            lo = tile_i0
            low_j0 = tile_j0
            seen = (tile_i0 < seq.q_len) & (tile_j0 < seq.k_len)
            if mask.k_starts is not None:
                low_j0 = tile_j0 - seq.k_start
                seen = (tile_i0 < seq.q_len) & (low_j0 < seq.k_len) & (low_j0 + BLOCK_N > 0)
            hi = tl.where(seen, tile_i0 + BLOCK_M, tile_i0)
        if CONFIG.has_right:
            hi = tl.where(low_j0 <= lo + (BLOCK_M - 1) + seq.offset + mask.right, hi, lo)
        if CONFIG.has_left:
            hi = tl.where(low_j0 + (BLOCK_N - 1) >= lo + seq.offset - mask.left, hi, lo)
        for i0 in range(lo, hi, BLOCK_M):
            tile = open_tile(seq, i0, i0 - lo + low_j0, positions, BLOCK_M, BLOCK_N, False, CONFIG.explicit)
            _weights, gradients, _slack, _x_rows, _inner_rows, before = score_gradients(
                x, tile, seq, heads, kv, w, mix, CONFIG, True, NVIDIA
            )  # fmt: skip
            if OF_INNER:
                _ds_rows, dbefore = mlp_gradient(gradients, before, w, CONFIG)
                weights_of_inner = w.w1b if CONFIG.concat else w.w1x
                gradients = input_gradient(gradients, dbefore, weights_of_inner, tile, CONFIG, CONFIG.residual)
            if to.Psi is not None:
                dpsi = psi_gradient(gradients, heads, shape.heads, tile, own, OWN, CONFIG, NVIDIA)
                if ALONG_DIAGONAL:
                    psi += dpsi
                else:
                    entry = entry_of(tile, own.psi_first, own.psi_last)
                    units = (dpsi * tl.load(to.psi_units)).to(tl.int64)
                    tl.atomic_add(to.Psi + tl.reshape(entry, [BLOCK_M, BLOCK_N]), units, sem="relaxed")
            if to.Table is not None and not ALONG_DIAGONAL:
                for g in tl.static_range(GROUPS):
                    real = (g * CONFIG.group + tl.arange(0, CONFIG.group) < shape.heads)[:, None, None]
                    at = (
                        to.Table
                        + (heads[g] * to.table_head)[:, None, None]
                        + entry_of(tile, own.table_first, own.table_last)
                    )
                    units = (gradients[g] * tl.load(to.table_units)).to(tl.int64)
                    tl.atomic_add(at, units, mask=real & (units != 0), sem="relaxed")
            added = ()
            for g in tl.static_range(GROUPS):
                added += (by_head[g] + gradients[g],)
            by_head = added

    c = tl.arange(0, BLOCK_N)
    if ALONG_DIAGONAL:
        i = tl.arange(0, BLOCK_M)[:, None]
        out = pid.to(tl.int64) * 2 * BLOCK_N + c
        if to.Psi is not None:
            sheared = tl.gather(psi, (i - c[None, :]) & (BLOCK_N - 1), 1)
            tl.store(to.Psi + out, tl.sum(tl.where(i < c[None, :], sheared, 0.0), 0))
            tl.store(to.Psi + out + BLOCK_N, tl.sum(tl.where(i >= c[None, :], sheared, 0.0), 0))
        if to.Table is not None:
            row = tl.arange(0, CONFIG.group * BLOCK_M)[:, None]
            below = (i < c[None, :])[None, :, :]
            for g in tl.static_range(GROUPS):
                by_row = tl.reshape(by_head[g], [GROUP * BLOCK_M, BLOCK_N])
                sheared = tl.gather(by_row, ((row % BLOCK_M) - c[None, :]) & (BLOCK_N - 1), 1)
                sheared = tl.reshape(sheared, [GROUP, BLOCK_M, BLOCK_N])
                head = g * CONFIG.group + tl.arange(0, CONFIG.group)
                head_out = (head.to(tl.int64) * to.table_head)[:, None] + out[None, :]
                real = (head < shape.heads)[:, None] & (c >= 0)[None, :]
                tl.store(to.Table + head_out, tl.sum(tl.where(below, sheared, 0.0), 1), mask=real)
                tl.store(to.Table + head_out + BLOCK_N, tl.sum(tl.where(below, 0.0, sheared), 1), mask=real)
    elif to.Dense is not None:
        seq = open_sequence(first, mask, shape)
        i_end = seq.q_len if mask.cu_q is not None else shape.q_tokens
        j_end = seq.k_len if mask.cu_q is not None else shape.k_tokens
        i = tile_i0 + tl.arange(0, BLOCK_M)
        j = tile_j0 + c
        j_out = seq.k_start + j if mask.cu_q is not None else j
        base = to.Dense + seq.b.to(tl.int64) * to.dense_batch
        i_in, j_in = i < i_end, j < j_end
        at = (seq.q_start + i).to(tl.int64)[:, None] * shape.k_tokens + j_out[None, :]
        inside = i_in[:, None] & j_in[None, :]
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for g in tl.static_range(GROUPS):
            head = g * CONFIG.group + tl.arange(0, CONFIG.group)
            real = head < shape.heads
            if SHARED_HEADS:
                total += tl.sum(tl.where(real[:, None, None], by_head[g], 0.0), 0)
            elif SUMMED == 2:
                heads_at = (head * to.dense_head)[:, None] + j_out[None, :]
                _add_units(base + heads_at, tl.sum(by_head[g], 1), to.dense_units, real[:, None] & j_in[None, :])
            elif SUMMED == 3:
                heads_at = (head * to.dense_head)[:, None] + (seq.q_start + i)[None, :]
                _add_units(base + heads_at, tl.sum(by_head[g], 2), to.dense_units, real[:, None] & i_in[None, :])
            else:
                heads_at = (head * to.dense_head)[:, None, None] + at[None, :, :]
                tl.store(base + heads_at, by_head[g], mask=real[:, None, None] & inside[None, :, :])
        if SHARED_HEADS:
            if SUMMED == 2:
                _add_units(base + j_out, tl.sum(total, 0), to.dense_units, j_in)
            elif SUMMED == 3:
                _add_units(base + seq.q_start + i, tl.sum(total, 1), to.dense_units, i_in)
            else:
                tl.store(base + at, total, mask=inside)
