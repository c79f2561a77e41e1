"""HeadMix gradients of the keys and values: one program owns BLOCK_N keys of all heads and walks the queries."""

import triton
import triton.language as tl

from ..common.arguments import DROPOUT_BITS, Dropout, Inputs, Mask, Operands, OutputGradient, Positions, Shape
from ..common.masks import query_spans
from ..common.sequences import open_sequence
from .backward_step import open_tensors, score_gradients
from .bias import head_offsets, open_tile, queries_exist
from .layout import column_of, summed
from .mlp import MixWeights, load_weights
from .scores import Mix, head_groups, input_gradient, mlp_gradient


@triton.jit
def _transposed_product(a, b, acc, PRECISION: tl.constexpr):
    return tl.dot(tl.permute(a.to(b.dtype), (0, 2, 1)), b, acc, input_precision=PRECISION)


@triton.jit
def _store(Target, acc, offs_h, num_heads, tokens, row0, count, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows row0 .. row0 + count of [H, tokens, D]."""
    offs_n = tl.arange(0, acc.shape[1])
    column = column_of(tl.arange(0, BLOCK_D), BLOCK_D)[None, None, :]
    inside = (offs_h < num_heads)[:, None, None] & (offs_n < count)[None, :, None] & (column < D)
    row = (offs_h.to(tl.int64)[:, None] * tokens + row0 + offs_n[None, :])[:, :, None]
    tl.store(Target + row * D + column, acc.to(Target.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=DROPOUT_BITS)
def headmix_backward_kv(
    inputs: Inputs, upstream: OutputGradient, DK, DV, shape: Shape, k_max, scale, softcap,
    outer: Operands, inner: Operands, weights: MixWeights, mask: Mask, positions: Positions,
    threshold, keep_scale, seed,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CONFIG: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """DK [B, Hq, Tk, D] or DV [B, Hq, Tk, DV], contiguous, by query head; the other is None, as the accumulators of
    both do not fit in registers."""
    PRECISION: tl.constexpr = CONFIG.precision
    blocks = tl.cdiv(k_max, BLOCK_N)
    pid = tl.program_id(0)
    GROUPS: tl.constexpr = CONFIG.groups
    GROUP: tl.constexpr = CONFIG.group
    j0 = (pid % blocks) * BLOCK_N
    seq = open_sequence(pid // blocks, mask, shape)
    if j0 >= seq.k_len:
        return
    drawn = seed
    if threshold is not None:
        drawn = tl.load(seed)
    dropout = Dropout(threshold, keep_scale, drawn)
    mix = Mix(inner, outer, weights.rows, weights.rows_first, scale, softcap, shape.heads, mask, positions, dropout)
    x = open_tensors(seq, inputs, upstream, shape, CONFIG)
    w = load_weights(weights, CONFIG)
    heads, kv = head_groups(shape, CONFIG)
    WIDE: tl.constexpr = CONFIG.block_dim if DV is None else CONFIG.block_value_dim
    acc = ()
    for _ in tl.static_range(GROUPS):
        acc += (tl.zeros([GROUP, BLOCK_N, WIDE], tl.float32),)
    last = tl.minimum(j0 + BLOCK_N, seq.k_len) - 1
    lo, _full_lo, _full_hi, hi = query_spans(j0, last, seq, mask, BLOCK_M, CONFIG)
    for i0 in tl.range(lo, hi, BLOCK_M):
        tile = open_tile(seq, i0, j0, positions, BLOCK_M, BLOCK_N, False, CONFIG.explicit)
        kept, ds, slack, _x_rows, _inner_rows, before = score_gradients(
            x, tile, seq, heads, kv, w, mix, CONFIG, DV is None, NVIDIA
        )  # fmt: skip
        i64 = i0.to(tl.int64)
        added = ()
        if DV is not None:
            for g in tl.static_range(GROUPS):
                do = summed(
                    x.do + i64 * CONFIG.grad_step,
                    head_offsets(heads[g], upstream.strides.head, CONFIG),
                    queries_exist(tile, seq),
                    BLOCK_M,
                    CONFIG.grad_step,
                    CONFIG.value_dim,
                    CONFIG.block_value_dim,
                )
                added += (_transposed_product(kept[g], do, acc[g], PRECISION),)
        else:
            _ds_rows, dbefore = mlp_gradient(ds, before, w, CONFIG)
            dx = input_gradient(ds, dbefore, w.w1x, tile, CONFIG, True)
            for g in tl.static_range(GROUPS):
                q = summed(
                    x.q + i64 * CONFIG.q_step,
                    head_offsets(heads[g], inputs.q_strides.head, CONFIG),
                    queries_exist(tile, seq),
                    BLOCK_M,
                    CONFIG.q_step,
                    CONFIG.dim,
                    CONFIG.block_dim,
                )
                added += (_transposed_product(dx[g] * slack[g], q, acc[g], PRECISION),)
        acc = added

    for g in tl.static_range(GROUPS):
        offs_h = g * CONFIG.group + tl.arange(0, CONFIG.group)
        first = seq.b.to(tl.int64) * shape.heads * shape.k_tokens
        row0 = seq.k_start + j0
        if DV is not None:
            _store(
                DV + first * CONFIG.value_dim,
                acc[g],
                offs_h,
                shape.heads,
                shape.k_tokens,
                row0,
                seq.k_len - j0,
                CONFIG.value_dim,
                CONFIG.block_value_dim,
            )
        else:
            _store(
                DK + first * CONFIG.dim,
                acc[g] * scale,
                offs_h,
                shape.heads,
                shape.k_tokens,
                row0,
                seq.k_len - j0,
                CONFIG.dim,
                CONFIG.block_dim,
            )
