"""The second step of split-KV attention: weigh the partial outputs of a row by their log-sum-exps, and add the sink."""

import triton
import triton.language as tl

from ..common.arguments import Output
from ..common.scores import LN2, LOG2E, LOWEST


@triton.jit
def combine(
    partial, partial_lse, output: Output, sinks, heads, q_tokens, rows,
    SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """partial [SPLITS, rows, DV] and partial_lse [SPLITS, rows] float32, rows = B * H * Tq; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    h = (row // q_tokens) % heads
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_DV)
    lse = tl.load(partial_lse + offs_s.to(tl.int64) * rows + row, mask=offs_s < SPLITS, other=float("-inf")) * LOG2E
    m = tl.maximum(tl.max(lse, 0), LOWEST)
    if sinks is not None:
        sink = tl.load(sinks + h) * LOG2E
        m = tl.maximum(m, sink)
    weight = tl.exp2(lse - m)  # [BLOCK_S]
    total = tl.sum(weight, 0)
    if sinks is not None:
        total += tl.exp2(sink - m)
    inside = (offs_s < SPLITS)[:, None] & (offs_d < DV)[None, :]
    tile = partial + (offs_s.to(tl.int64) * rows + row)[:, None] * DV + offs_d[None, :]
    part = tl.load(tile, mask=inside, other=0.0)  # [BLOCK_S, BLOCK_DV]
    empty = total == 0.0
    out = tl.sum(part * weight[:, None], 0) / tl.where(empty, 1.0, total)
    base = (
        output.Out
        + (row // q_tokens // heads) * output.strides.batch
        + h * output.strides.head
        + (row % q_tokens) * output.strides.token
    )
    tl.store(base + offs_d, out.to(output.Out.dtype.element_ty), mask=offs_d < DV)
    tl.store(output.Lse + row, tl.where(empty, float("-inf"), (m + tl.log2(total)) * LN2))
