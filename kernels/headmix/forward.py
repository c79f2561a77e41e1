"""HeadMix attention forward: one program owns BLOCK_M queries of all heads, so the mixed logits never reach memory."""

import triton
import triton.language as tl

from ..common.arguments import DROPOUT_BITS, Dropout, Inputs, Mask, Operands, Output, Positions, Shape
from ..common.masks import key_spans
from ..common.scores import LN2, LOG2E, LOWEST
from ..common.sequences import open_sequence
from .bias import group_tile, head_offsets, key_offsets, keys_exist, open_tile
from .layout import column_of, contracted, summed
from .mlp import MixWeights, load_weights
from .scores import Mix, head_groups, keep_heads, mixed_logits


@triton.jit
def _again(pointer, j0, NVIDIA: tl.constexpr):
    """The same pointer, as if it depended on j0: queries too many for the registers are loaded in every step."""
    if NVIDIA:
        zero = tl.inline_asm_elementwise("and.b32 $0, $1, 0;", "=r,r", [j0], tl.int32, is_pure=True, pack=1)
        return pointer + tl.multiple_of(zero, 16)
    else:
        return pointer


@triton.jit
def _both_halves(m, l, o):
    """Running maxima and sums [GROUP, M] and outputs [GROUP, M, D] of halves of the keys, as those of their heads."""
    H: tl.constexpr = m.shape[0] // 2
    M: tl.constexpr = m.shape[1]
    top = tl.max(tl.reshape(m, [2, H, M]), 0)
    alpha = tl.exp2(m - tl.reshape(tl.broadcast_to(top[None, :, :], [2, H, M]), [2 * H, M]))
    o = tl.sum(tl.reshape(o * alpha[:, :, None], [2, H, M, o.shape[2]]), 0)
    return top, tl.sum(tl.reshape(l * alpha, [2, H, M]), 0), o


@triton.jit
def _lane_sums(p):
    """Sums over keys [GROUP, M, 8], over those that one register of 8 neighbours holds: the last sum waits for the end,
    and 8 columns lie as products leave them."""
    return tl.sum(tl.reshape(p, [p.shape[0], p.shape[1], p.shape[2] // 8, 8]), 2)


@triton.jit(do_not_specialize=DROPOUT_BITS)
def headmix_forward(
    inputs: Inputs, output: Output, shape: Shape, q_max, sinks, scale, softcap,
    outer: Operands, inner: Operands, weights: MixWeights, mask: Mask, positions: Positions,
    threshold, keep_scale, seed,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CONFIG: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    PRECISION: tl.constexpr = CONFIG.precision
    blocks = tl.cdiv(q_max, BLOCK_M)
    pid = tl.program_id(0)
    GROUPS: tl.constexpr = CONFIG.groups
    GROUP: tl.constexpr = CONFIG.group
    BLOCK_DV: tl.constexpr = CONFIG.block_value_dim
    i0 = (blocks - 1 - pid % blocks) * BLOCK_M
    seq = open_sequence(pid // blocks, mask, shape)
    if i0 >= seq.q_len:
        return
    drawn = seed
    if threshold is not None:
        drawn = tl.load(seed)
    dropout = Dropout(threshold, keep_scale, drawn)
    mix = Mix(inner, outer, weights.rows, weights.rows_first, scale, softcap, shape.heads, mask, positions, dropout)
    w = load_weights(weights, CONFIG)
    b64 = seq.b.to(tl.int64)
    heads, kv = head_groups(shape, CONFIG)
    exist = (tl.arange(0, BLOCK_M) < seq.q_len - i0)[None, :]
    row0 = (seq.q_start + i0).to(tl.int64)
    q_base = inputs.q + b64 * inputs.q_strides.batch + row0 * CONFIG.q_step
    k_base = inputs.k + b64 * inputs.k_strides.batch + seq.k_start.to(tl.int64) * CONFIG.k_step
    v_base = inputs.v + b64 * inputs.v_strides.batch + seq.k_start.to(tl.int64) * CONFIG.v_step
    q = ()
    m_i = ()
    l_i = ()
    acc = ()
    for g in tl.static_range(GROUPS):
        if CONFIG.keep_queries:
            offsets = head_offsets(heads[g], inputs.q_strides.head, CONFIG)
            kept = contracted(q_base, offsets, exist, BLOCK_M, CONFIG.q_step, CONFIG.dim, CONFIG.block_dim)
            if CONFIG.scaled_queries:
                kept = (kept.to(tl.float32) * scale).to(kept.dtype)
            q += (tl.permute(kept, (0, 2, 1)),)
        m_i += (tl.full([GROUP, BLOCK_M], LOWEST, tl.float32),)
        l_i += (tl.zeros([GROUP, BLOCK_M, 8], tl.float32),)
        acc += (tl.zeros([GROUP, BLOCK_M, BLOCK_DV], tl.float32),)
    last = tl.minimum(i0 + BLOCK_M, seq.q_len) - 1
    lo, full_lo, full_hi, hi = key_spans(i0, last, seq, mask, BLOCK_N, CONFIG)
    # Tiles inside the mask, then those on its border, left and right in one loop, since each loop is code.
    for INSIDE in tl.static_range(1, -1, -1):
        before = 0
        if INSIDE:
            steps = tl.maximum(full_hi - full_lo, 0) // BLOCK_N
        else:
            before = tl.cdiv(full_lo - lo, BLOCK_N)
            steps = before + tl.cdiv(tl.maximum(hi - full_hi, 0), BLOCK_N)
        for step in tl.range(0, steps):
            if INSIDE:
                j0 = full_lo + step * BLOCK_N
            else:
                j0 = tl.where(step < before, lo + step * BLOCK_N, full_hi + (step - before) * BLOCK_N)
            tile = open_tile(seq, i0, j0, positions, BLOCK_M, BLOCK_N, INSIDE, CONFIG.explicit)
            k_tile = k_base + j0.to(tl.int64) * CONFIG.k_step
            v_tile = v_base + j0.to(tl.int64) * CONFIG.v_step
            q_again = _again(q_base, j0, NVIDIA)
            dots = ()
            for g in tl.static_range(GROUPS):
                if CONFIG.keep_queries:
                    queries = q[g]
                else:
                    offsets = head_offsets(heads[g], inputs.q_strides.head, CONFIG)
                    queries = contracted(q_again, offsets, exist, BLOCK_M, CONFIG.q_step, CONFIG.dim, CONFIG.block_dim)
                    queries = tl.permute(queries, (0, 2, 1))
                own = group_tile(tile, seq, positions, g, CONFIG, INSIDE)
                there = None if INSIDE else keys_exist(own, seq)
                offsets = key_offsets(kv[g], inputs.k_strides.head, own, CONFIG.k_step, CONFIG)
                keys = contracted(k_tile, offsets, there, own.j.shape[2], CONFIG.k_step, CONFIG.dim, CONFIG.block_dim)
                dots += (tl.dot(queries, keys, input_precision=PRECISION),)
            s, _slack, _x_rows, _inner_rows, _before = mixed_logits(
                dots, tile, seq, heads, w, mix, CONFIG, CONFIG.scaled_queries, INSIDE, CONFIG.chunks, NVIDIA
            )
            m_next = ()
            l_next = ()
            acc_next = ()
            for g in tl.static_range(GROUPS):
                own = group_tile(tile, seq, positions, g, CONFIG, INSIDE)
                m_new = tl.maximum(m_i[g], tl.max(s[g], 2) * LOG2E)
                p = tl.exp2(s[g] * LOG2E - m_new[:, :, None])
                alpha = tl.exp2(m_i[g] - m_new)
                l_next += (l_i[g] * alpha[:, :, None] + _lane_sums(p),)
                if threshold is not None:
                    p = tl.where(keep_heads(own, heads[g], mix), p, 0.0)
                there = None if INSIDE else keys_exist(own, seq)
                offsets = key_offsets(kv[g], inputs.v_strides.head, own, CONFIG.v_step, CONFIG)
                values = summed(
                    v_tile, offsets, there, own.j.shape[2], CONFIG.v_step, CONFIG.value_dim, CONFIG.block_value_dim
                )
                scaled = acc[g] * alpha[:, :, None]
                acc_next += (tl.dot(p.to(values.dtype), values, scaled, input_precision=PRECISION),)
                m_next += (m_new,)
            m_i = m_next
            l_i = l_next
            acc = acc_next
    offs_m = tl.arange(0, BLOCK_M)
    column = column_of(tl.arange(0, CONFIG.block_value_dim), CONFIG.block_value_dim)
    o_base = output.Out + b64 * output.strides.batch + row0 * output.strides.token
    for g in tl.static_range(GROUPS):
        m = m_i[g]
        l = tl.sum(l_i[g], 2)
        o = acc[g]
        if CONFIG.halves and g == GROUPS - 1:
            m, l, o = _both_halves(m, l, o)
        offs_h = g * GROUP + tl.arange(0, m.shape[0])
        head = tl.minimum(offs_h, shape.heads - 1).to(tl.int64)
        b2 = tl.load(weights.b2 + head)[:, None]
        if sinks is not None:
            sink = tl.load(sinks + head)[:, None] * LOG2E - b2 * LOG2E
            m_new = tl.maximum(m, sink)
            alpha = tl.exp2(m - m_new)
            l = l * alpha + tl.exp2(sink - m_new)
            o = o * alpha[:, :, None]
            m = m_new
        empty = l == 0.0
        lse = tl.where(empty, float("-inf"), (m + tl.log2(l)) * LN2 + b2)
        out = o / tl.where(empty, 1.0, l)[:, :, None]
        if threshold is not None:
            out = out * keep_scale
        inside = (offs_h < shape.heads)[:, None] & (offs_m < seq.q_len - i0)[None, :]
        at = (
            head[:, None, None] * output.strides.head
            + offs_m[None, :, None] * output.strides.token
            + column[None, None, :]
        )
        tl.store(
            o_base + at,
            out.to(output.Out.dtype.element_ty),
            mask=inside[:, :, None] & (column < CONFIG.value_dim)[None, None, :],
        )
        stat = (b64 * shape.heads + offs_h)[:, None] * shape.q_tokens + row0 + offs_m[None, :]
        tl.store(output.Lse + stat, lse, mask=inside)
