"""Host side of the CUDA forward pass: which kernels run for a call, and with what."""

from __future__ import annotations

import torch
from torch import Tensor

from posattn.backends.common.arch import MAX_SPLITS, key_splits
from posattn.backends.common.operands import k_max, q_max, sequences
from posattn.backends.common.strides import narrowed_rows, rows_like
from posattn.backends.cuda import launch, operands
from posattn.backends.cuda.configs.forward import DECODE_ROWS, DecodeConfig, decode_config, forward_config
from posattn.backends.cuda.constants import CombineConstants, DecodeConstants, ForwardConstants, PrefillConstants
from posattn.backends.cuda.reach import keys_in_reach
from posattn.backends.cuda.rotary import rotated
from posattn.plan import Call

# Rotating K in the kernel costs each query block one pass over K; ahead of time it costs two passes over memory and a
# launch. With one or two query blocks a head the first is less.
ROTATE_IN_KERNEL_BLOCKS = 2


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in q.dtype and the log-sum-exp [B, Hq, Tq] float32."""
    q, k, v = (operands.in_chunks(x) for x in (call.q, call.k, call.v))
    batch, heads, q_tokens, _ = q.shape
    device = q.device
    config = decode_config(call) or forward_config(launch.architecture(device), call)
    decoding = isinstance(config, DecodeConfig)
    shape = operands.shape(call, config.block_m, config.block_n)
    if decoding:
        shape["q_blocks"] = -(-q_max(call) * shape["group"] // config.block_m)
    blocks = shape["q_blocks"] * sequences(call) * (heads // shape["group"] if decoding else heads)
    splits = key_splits(blocks, k_max(call), launch.processors(device))

    out = rows_like(call, v.shape[3], lambda shape: operands.written_by_queries(call, shape, q.dtype))
    lse = operands.written_by_queries(call, (batch, heads, q_tokens), torch.float32)
    partial, partial_lse = out[None], lse[None]
    if splits > 1:
        partial = operands.written_by_queries(call, (splits, *out.shape), torch.float32)
        partial_lse = operands.written_by_queries(call, (splits, *lse.shape), torch.float32)

    mask, mask_constants = operands.mask(call)
    bias, bias_constants = operands.bias(call, call.plan.bias, config.block_m // config.warps, config.block_n)
    dropout = operands.dropout(call)
    rotary = call.plan.rotary
    rotate_here = rotary is not None and shape["q_blocks"] <= ROTATE_IN_KERNEL_BLOCKS
    table, page = operands.pages(call)
    k_page = page
    if rotary is not None and not rotate_here:
        k = rotated(k, rotary.k_cos, rotary.k_sin, rotary, paged=call if page else None)
        k_page = 0
    rows = DECODE_ROWS if decoding else config.block_m
    reach = keys_in_reach(call, q, k, rows, rotary, rotary if rotate_here else None, table, k_page)
    head_dim, head_dim_v = config.padded(q.shape[3]), config.padded(v.shape[3])
    explicit, has = call.q_positions is not None, bias_constants.operands
    shared = config.shared_bytes(head_dim, head_dim_v, not explicit and (has.has_table or has.has_profile))
    common = ForwardConstants(
        element=operands.element(call),
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        mask=mask_constants,
        explicit=explicit,
        operands=has,
        has_dropout=bool(dropout),
        rotary_q=rotary is not None,
        rotary_k=rotate_here,
        pairs=operands.pairs(rotary),
        has_softcap=call.softcap != 0.0,
        has_sinks=call.sinks is not None,
        split=splits > 1,
        block_m=config.block_m,
        block_n=config.block_n,
        warps=config.warps,
        threads=32 * config.warps,
        stages=config.stages,
        shared_bytes=shared,
        k_page=k_page,
        v_page=page,
        reach_rows=0 if reach is None else rows,
    )
    constants: DecodeConstants | PrefillConstants
    if isinstance(config, DecodeConfig):
        scale_before_bias = bool(call.plan.bias) or call.softcap != 0.0 or call.scale <= 0.0
        constants = DecodeConstants(common, scale_before_bias)
    else:
        constants = PrefillConstants(
            common, bias_constants.linear, bias_constants.bounds_block, config.blocks, config.q_in_registers
        )
    values = {
        "q": q,
        "k": k,
        "v": v,
        "out": partial,
        "lse": partial_lse,
        "sinks": call.sinks,
        "q_strides": operands.strides(q),
        "k_strides": operands.strides(k),
        "v_strides": operands.strides(v),
        "out_strides": operands.strides(partial[0]),
        "out_split": partial.stride(0),
        "lse_split": partial_lse.stride(0),
        "shape": shape,
        "mask": mask,
        "positions": operands.positions(call),
        "bias": bias,
        "q_angles": operands.angles(rotary.q_cos, rotary.q_sin) if rotary is not None else {},
        "k_angles": operands.angles(rotary.k_cos, rotary.k_sin) if rotary is not None and rotate_here else {},
        "dropout": dropout,
        "scale": call.scale,
        "softcap": call.softcap,
        "split_tiles": -(-shape["k_blocks"] // splits),
        "pages": table,
        "reach": reach,
    }
    entry = "attention_decode" if decoding else "attention_forward"
    launch.run(
        config.source, entry, "ForwardParams", constants, values, (blocks, splits), 32 * config.warps, shared, device
    )
    if splits > 1:
        _combine(call, partial, partial_lse, out, lse)
    return narrowed_rows(call, out, call.v.shape[3]), lse


def _combine(call: Call, partial: Tensor, partial_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """out and lse from those of the splits."""
    threads = 128
    constants = CombineConstants(
        bf16=out.dtype == torch.bfloat16,
        dim_v=out.shape[3],
        has_sinks=call.sinks is not None,
        max_splits=MAX_SPLITS,
        threads=threads,
    )
    values = {
        "partial": partial,
        "partial_lse": partial_lse,
        "out": out,
        "lse": lse,
        "sinks": call.sinks,
        "out_strides": operands.strides(out),
        "rows": lse.numel(),
        "heads": out.shape[1],
        "q_tokens": out.shape[2],
        "splits": partial.shape[0],
    }
    grid = (-(-lse.numel() * 32 // threads),)
    launch.run(
        "forward/combine.cu", "attention_combine", "CombineParams", constants, values, grid, threads, 0, out.device
    )
