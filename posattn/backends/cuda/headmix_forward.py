"""Host side of the CUDA forward kernel that mixes heads (DAPE), and what the backward one has in common with it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from posattn.backends.common.operands import q_max, sequences
from posattn.backends.common.strides import narrowed_rows, rows_like
from posattn.backends.cuda import headmix_rows, launch, operands
from posattn.backends.cuda.configs.headmix import (
    HeadMixConfig,
    dims,
    folds_slope,
    forward_config,
    forward_shared_bytes,
)
from posattn.backends.cuda.constants import HeadMixConstants, HeadMixForwardConstants, OuterBiasConstants
from posattn.backends.cuda.operands import Members
from posattn.backends.cuda.rotary import rotated_pair
from posattn.plan import Call, HeadMix


def rows(x: Tensor) -> Tensor:
    """x [B, H, T, D] itself if a row is 16-byte chunks, a multiple of 32 elements in all; else a copy that is."""
    extra = -x.shape[-1] % 32
    return operands.in_chunks(pad(x, (0, extra)) if extra else x)


def common(
    call: Call, mix: HeadMix, config: HeadMixConfig, shared_bytes: int, fold_slope: bool = False
) -> tuple[Members, HeadMixConstants]:
    """What forward and backward kernels share."""
    mask, mask_constants = operands.mask(call)
    inner, inner_constants = operands.bias(call, mix.inner, config.block_m, config.block_n)
    outer, outer_constants = operands.bias(call, call.plan.bias, config.block_m, config.block_n)
    dropout = operands.dropout(call)
    dim, dim_v = dims(call)
    constants = HeadMixConstants(
        bf16=call.q.dtype == torch.bfloat16,
        head_dim=dim,
        head_dim_v=dim_v,
        mask=mask_constants,
        explicit=call.q_positions is not None,
        bias=inner_constants,
        outer=OuterBiasConstants(
            outer_slope=outer_constants.operands.has_slope,
            outer_signed=outer_constants.operands.signed,
            outer_table=outer_constants.operands.has_table,
            outer_profile=outer_constants.operands.has_profile,
            outer_dense=outer_constants.operands.dense,
        ),
        has_dropout=bool(dropout),
        has_softcap=call.softcap != 0.0,
        heads=config.heads,
        heads_per_warp=config.heads_per_warp,
        width=mix.w1.shape[0],
        has_inner=bool(mix.inner),
        concat=bool(mix.inner) and mix.form != "add",
        residual=bool(mix.inner) and mix.form != "concat",
        fold_slope=fold_slope,
        block_m=config.block_m,
        block_n=config.block_n,
        warps=config.warps,
        mlp_warps=config.mlp_warps,
        threads=32 * config.warps,
        shared_bytes=shared_bytes,
    )
    values = {
        "shape": operands.shape(call, config.block_m, config.block_n),
        "mask": mask,
        "positions": operands.positions(call),
        "inner": inner,
        "outer": outer,
        "mix": {name: getattr(mix, name).float().contiguous() for name in ("w1", "b1", "w2", "b2")},
        "dropout": dropout,
        "scale": call.scale,
        "softcap": call.softcap,
    }
    return values, constants


def forward(call: Call, mix: HeadMix) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in q.dtype and the log-sum-exp [B, Hq, Tq] float32."""
    device = call.q.device
    config = forward_config(launch.architecture(device), call, mix)
    assert config is not None  # unsupported() said so
    # Every warp reads keys straight into fragments, so they come rotated.
    q, k = (rows(x) for x in rotated_pair(call, call.q, call.k))
    v = rows(call.v)
    batch, heads, q_tokens, _ = q.shape
    out = rows_like(call, v.shape[3], lambda shape: operands.written_by_queries(call, shape, q.dtype))
    lse = operands.written_by_queries(call, (batch, heads, q_tokens), torch.float32)

    shared = forward_shared_bytes(call, mix, config)
    values, shared_constants = common(call, mix, config, shared, folds_slope(call, mix))
    constants = HeadMixForwardConstants(shared_constants, has_sinks=call.sinks is not None, blocks_per_sm=1)
    tiles, key_rows = headmix_rows.key_tiles(call, k, v)
    values.update({"q": q, "tiles": tiles, "key_rows": key_rows, "out": out, "lse": lse, "sinks": call.sinks})
    values.update({"q_strides": operands.strides(q), "out_strides": operands.strides(out)})
    grid = (-(-q_max(call) // config.block_m) * sequences(call),)
    launch.run(
        "headmix/forward.cu", "headmix_forward", "HeadMixForwardParams", constants, values, grid, 32 * config.warps,
        shared, device,
    )  # fmt: skip
    return narrowed_rows(call, out, call.v.shape[3]), lse
