"""Attention forward: flash tiling with online softmax, every operand of a plan but HeadMix added on the tile.

One program owns BLOCK_M queries of one head and walks its keys in three spans (masks.py). With SPLITS > 1 it walks
its share of them and leaves a partial output for combine.py. Logits are multiplied by the scale before anything is
added to them (scale_before_bias), or the scale is folded into the exponent, which saves a multiply an element.
"""

import triton
import triton.language as tl

from ..common.arguments import DROPOUT_BITS, Angles, Dropout, Inputs, Mask, Operands, Output, Positions, Shape
from ..common.codegen import hidden
from ..common.dropout import keep_tile
from ..common.masks import key_spans, within
from ..common.pages import Pages, paged_rows
from ..common.profile import common_line, next_line, no_line, row_scales
from ..common.rotary import load_turned
from ..common.scores import LN2, LOG2E, LOWEST, load_rows, logits_tile, start_logits
from ..common.sequences import TileCoord, block_number, open_sequence


@triton.jit(do_not_specialize=DROPOUT_BITS)
def attention_forward(
    inputs: Inputs, output: Output, shape: Shape, q_max, split_tiles, sinks, scale, softcap,
    operands: Operands, mask: Mask, positions: Positions, q_angles: Angles, k_angles: Angles, pages: Pages,
    threshold, keep_scale, seed,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, SPLITS: tl.constexpr, K_PAGE: tl.constexpr, V_PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CONFIG: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    PRECISION: tl.constexpr = CONFIG.precision
    UNALIGNED: tl.constexpr = mask.cu_q is not None or mask.k_starts is not None
    # Whether a page holds every tile whole: then it is one pointer's, as without pages.
    K_WHOLE: tl.constexpr = K_PAGE % BLOCK_N == 0 and not UNALIGNED
    V_WHOLE: tl.constexpr = V_PAGE % BLOCK_N == 0 and not UNALIGNED
    D: tl.constexpr = CONFIG.dim
    BLOCK_D: tl.constexpr = CONFIG.block_dim
    DV: tl.constexpr = CONFIG.value_dim
    BLOCK_DV: tl.constexpr = CONFIG.block_value_dim
    q_stride = inputs.q_strides.token
    k_stride = inputs.k_strides.token
    v_stride = inputs.v_strides.token
    blocks = tl.cdiv(q_max, BLOCK_M)
    pid = tl.program_id(0)
    i0 = (blocks - 1 - pid % blocks) * BLOCK_M  # the longest rows of a causal head first
    bh = pid // blocks
    h = bh % shape.heads
    seq = open_sequence(bh // shape.heads, mask, shape)
    if i0 >= seq.q_len:
        return
    b64 = seq.b.to(tl.int64)
    h64 = h.to(tl.int64)
    kv64 = (h // shape.group).to(tl.int64)
    offset = seq.offset
    drawn = seed
    if threshold is not None:
        drawn = tl.load(seed)
    dropout = Dropout(threshold, keep_scale, drawn)
    last = tl.minimum(i0 + BLOCK_M, seq.q_len) - 1

    rows = tl.minimum(tl.arange(0, BLOCK_M), seq.q_len - 1 - i0)  # past the end: the last row again, never stored
    i = (i0 + tl.arange(0, BLOCK_M))[:, None]  # [BLOCK_M, 1]
    i_in = (i0 + rows)[:, None]
    row0 = (seq.q_start + i0).to(tl.int64)
    q_base = inputs.q + b64 * inputs.q_strides.batch + h64 * inputs.q_strides.head + row0 * q_stride
    q_angle = b64 * q_angles.batch + row0 * HALF
    q = load_turned(q_base, q_angles, rows, q_stride, q_angle, HALF, D, BLOCK_D, INTERLEAVED)  # [BLOCK_M, BLOCK_D]
    k_base = inputs.k + kv64 * inputs.k_strides.head
    v_base = inputs.v + kv64 * inputs.v_strides.head
    if K_PAGE == 0:
        k_base += b64 * inputs.k_strides.batch
    if V_PAGE == 0:
        v_base += b64 * inputs.v_strides.batch
    if UNALIGNED:
        if K_PAGE == 0:
            k_base += seq.k_start.to(tl.int64) * k_stride
        if V_PAGE == 0:
            v_base += seq.k_start.to(tl.int64) * v_stride

    slope = None
    if operands.slope is not None:
        slope = tl.load(operands.slope + seq.b * operands.slope_batch + h)
    pi = i_in
    if CONFIG.explicit:
        pi = tl.load(positions.q + b64 * positions.q_batch + row0 + rows)[:, None]
    row_scale = None
    if operands.psi is not None:
        row_scale = tl.load(row_scales(pi, offset, operands, CONFIG.explicit))

    line = no_line()
    high = line.segment
    common = line
    m_i = tl.full([BLOCK_M], LOWEST, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    factor = LOG2E if CONFIG.scale_before_bias else scale * LOG2E

    lo, full_lo, full_hi, hi = key_spans(i0, last, seq, mask, BLOCK_N, CONFIG)
    if mask.reach is not None:
        at = block_number(bh // shape.heads, i0, seq.q_start, blocks, BLOCK_M, mask.cu_q is not None)
        pair = mask.reach + 2 * (tl.cast(at, tl.int64) * shape.heads + h)
        lo, full_lo, full_hi, hi = within(tl.load(pair), tl.load(pair + 1), lo, full_lo, full_hi, hi, BLOCK_N)
    share_lo = 0
    share_hi = seq.k_len
    if SPLITS > 1:
        share_lo = tl.program_id(1) * split_tiles * BLOCK_N
        share_hi = tl.minimum(share_lo + split_tiles * BLOCK_N, seq.k_len)
    for span in tl.static_range(0, 3):
        if span != 0 or CONFIG.has_left:
            if span == 0:
                span_lo, span_hi = lo, full_lo
            elif span == 1:
                span_lo, span_hi = full_lo, full_hi
            else:
                span_lo, span_hi = full_hi, hi
            if SPLITS > 1:
                span_lo = tl.maximum(span_lo, share_lo)
                span_hi = tl.minimum(span_hi, share_hi)
            for j_loop in tl.range(span_lo, span_hi, BLOCK_N):
                j0 = hidden(j_loop, NVIDIA and operands.dense is None)
                cols = tl.arange(0, BLOCK_N)
                if span != 1:
                    cols = tl.minimum(cols, seq.k_len - 1 - j0)
                j = (j0 + tl.arange(0, BLOCK_N))[None, :]
                j_in = (j0 + cols)[None, :]
                col0 = tl.cast(j0, tl.int64)
                k_angle = b64 * k_angles.batch + (seq.k_start + col0) * HALF
                token = seq.k_start + j0  # of its first key
                if K_PAGE > 0:
                    k_tile = paged_rows(
                        k_base, pages, seq.b, token, cols, inputs.k_strides.batch, k_stride, K_PAGE, K_WHOLE
                    )
                else:
                    k_tile = k_base + col0 * k_stride
                k = load_turned(k_tile, k_angles, cols, k_stride, k_angle, HALF, D, BLOCK_D, INTERLEAVED)
                pj = j_in
                if CONFIG.explicit:
                    pj = tl.load(positions.k + b64 * positions.k_batch + seq.k_start + col0 + cols)[None, :]
                t = TileCoord(seq.b, h, seq.q_start, seq.k_start, i0, j0, offset, i, j, i_in, j_in, pi, pj, 0)
                if operands.psi is not None:
                    line, high = next_line(line, t, row_scale, operands, BLOCK_N, CONFIG, NVIDIA)
                    common = common_line(line, high)
                s = start_logits(t, operands, BLOCK_M, BLOCK_N, CONFIG, NVIDIA)
                s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
                s, _ = logits_tile(
                    s,
                    common,
                    high,
                    t,
                    seq,
                    operands,
                    mask,
                    slope,
                    j0,
                    row_scale,
                    scale,
                    softcap,
                    span != 1,
                    CONFIG,
                    NVIDIA,
                )
                # What a tile's logits share is added to what is one number a row: the intercept of a profile's line,
                # and a slope's bias of the tile's first key.
                level = 0.0
                if CONFIG.linear:
                    level = slope * LOG2E * (j0 - i0 - offset).to(tl.float32)
                if operands.psi is not None:
                    level += common.intercept * LOG2E
                m_new = tl.maximum(m_i, tl.max(s, 1) * factor + level)
                p = tl.exp2(s * factor - (m_new - level)[:, None])
                alpha = tl.exp2(m_i - m_new)
                l_i = l_i * alpha + tl.sum(p, 1)
                acc = acc * alpha[:, None]
                if threshold is not None:
                    keep = keep_tile(dropout, t, shape.heads, BLOCK_M, BLOCK_N, not UNALIGNED)
                    p = tl.where(keep, p, 0.0)
                if V_PAGE > 0:
                    v_tile = paged_rows(
                        v_base, pages, seq.b, token, cols, inputs.v_strides.batch, v_stride, V_PAGE, V_WHOLE
                    )
                else:
                    v_tile = v_base + col0 * v_stride
                v = load_rows(v_tile, cols, v_stride, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
                m_i = m_new

    if CONFIG.linear:
        # The part of the bias that is constant along a row, left out above.
        m_i = tl.where(l_i > 0.0, m_i - slope * tl.arange(0, BLOCK_M).to(tl.float32) * LOG2E, m_i)
    if sinks is not None:
        if SPLITS == 1:
            sink = tl.load(sinks + h) * LOG2E
            m_new = tl.maximum(m_i, sink)
            alpha = tl.exp2(m_i - m_new)
            l_i = l_i * alpha + tl.exp2(sink - m_new)
            acc = acc * alpha[:, None]
            m_i = m_new
    empty = l_i == 0.0
    lse = tl.where(empty, float("-inf"), (m_i + tl.log2(l_i)) * LN2)
    out = acc / tl.where(empty, 1.0, l_i)[:, None]
    if threshold is not None:
        out = out * keep_scale

    offs_d = tl.arange(0, BLOCK_DV)
    split64 = tl.program_id(1).to(tl.int64)
    o_base = output.Out + split64 * output.out_split + b64 * output.strides.batch + h64 * output.strides.head
    o_base += row0 * output.strides.token
    inside = tl.arange(0, BLOCK_M) < seq.q_len - i0
    stored = inside[:, None]
    if DV != BLOCK_DV:
        stored = stored & (offs_d < DV)[None, :]
    tl.store(
        o_base + tl.arange(0, BLOCK_M)[:, None] * output.strides.token + offs_d[None, :],
        out.to(output.Out.dtype.element_ty),
        mask=stored,
    )
    lse_base = output.Lse + split64 * output.lse_split + (b64 * shape.heads + h64) * shape.q_tokens + row0
    tl.store(lse_base + tl.arange(0, BLOCK_M), lse, mask=inside)
