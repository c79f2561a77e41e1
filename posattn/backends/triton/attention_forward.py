"""Host side of the plain family's forward pass: which kernels run for a call, and with what."""

from __future__ import annotations

import torch
from torch import Tensor

from posattn.backends.common.arch import key_splits
from posattn.backends.common.operands import k_max, power_of_two, q_max, sequences
from posattn.backends.common.strides import rows_like
from posattn.backends.triton import autotune
from posattn.backends.triton.arguments import (
    NO_PAGES,
    Launch,
    angles,
    attention_arguments,
    inputs,
    output,
    pages,
    strides,
    unit_stride,
)
from posattn.backends.triton.configs.forward import FEW_ROWS, FORWARD, forward_config
from posattn.backends.triton.configs.launch_config import LaunchConfig
from posattn.backends.triton.reach import keys_in_reach
from posattn.kernels.attention.combine import combine
from posattn.kernels.attention.forward import attention_forward
from posattn.kernels.common.arguments import Output
from posattn.kernels.common.rotary import rotary
from posattn.plan import Call


def rotated(
    launch: Launch,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    dtype: torch.dtype,
    sign: int = 1,
    paged: Call | None = None,
) -> Tensor:
    """x [B, H, T, D] with its pairs rotated, contiguous, in `dtype`; sign -1 rotates back. x may be the keys of a
    `paged` call: they are gathered in the same pass."""
    batch, heads, tokens, dim = x.shape
    table, page = NO_PAGES, 0
    if paged is not None:
        batch, tokens = paged.q.shape[0], paged.k_tokens
        table, page = pages(paged)
    out = torch.empty((batch, heads, tokens, dim), dtype=dtype, device=x.device)
    x = unit_stride(x)
    block = 32 if dim <= 128 else 16
    constexprs = {
        "HALF": cos.shape[-1],
        "D": dim,
        "BLOCK_D": power_of_two(dim),
        "BLOCK_T": block,
        "INTERLEAVED": interleaved,
        "SIGN": sign,
        "PAGE": page,
    }
    grid = (-(-tokens // block) * batch * heads,)
    launch(rotary, grid, (x, out, strides(x), angles(cos, sin), table, heads, tokens), constexprs, 4, 1, None)
    return out


def forward(call: Call, launch: Launch, arch: str, processors: int) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in q.dtype and the log-sum-exp [B, Hq, Tq] float32."""
    config = forward_config(arch, call)
    if autotune.enabled():
        time = autotune.milliseconds(lambda config: _forward(call, launch, config, processors))
        configs = (config, *autotune.candidates(FORWARD, arch, call))
        config = autotune.pick("forward", autotune.device_name(call.q.device), call, configs, time)
    return _forward(call, launch, config, processors)


def _forward(call: Call, launch: Launch, config: LaunchConfig, processors: int) -> tuple[Tensor, Tensor]:
    q, k, v = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v)
    batch, heads, q_tokens, _ = q.shape
    dim_v = v.shape[3]
    blocks = -(-q_max(call) // config.block_m)
    programs = blocks * sequences(call) * heads
    splits = key_splits(programs, k_max(call), processors)

    table, page = pages(call)
    k_page = page
    angles_of = call.plan.rotary
    q_angles = k_angles = angles(None, None)
    if angles_of is not None:
        q_angles = angles(angles_of.q_cos, angles_of.q_sin)
        # Rotating keys ahead takes two passes over them and a launch, which decoding would feel; in the kernel it takes
        # shared memory for the angles, for which larger tiles have no room.
        if q_max(call) <= FEW_ROWS:
            k_angles = angles(angles_of.k_cos, angles_of.k_sin)
        else:
            paged = call if page else None
            k = rotated(launch, k, angles_of.k_cos, angles_of.k_sin, angles_of.interleaved, k.dtype, paged=paged)
            k_page = 0

    # Packed documents may leave tokens outside every document, which no program would write.
    create = torch.empty if call.mask.cu_seqlens_q is None else torch.zeros
    out = rows_like(call, dim_v, lambda shape: create(shape, dtype=q.dtype, device=q.device))
    lse = create((batch, heads, q_tokens), dtype=torch.float32, device=q.device)
    partial, partial_lse = out[None], lse[None]
    if splits > 1:
        partial = create((splits, *out.shape), dtype=torch.float32, device=q.device)
        partial_lse = create((splits, *lse.shape), dtype=torch.float32, device=q.device)
    tiles = -(-k_max(call) // config.block_n)
    constexprs = {
        "HALF": 0 if angles_of is None else angles_of.q_cos.shape[-1],
        "INTERLEAVED": angles_of is not None and angles_of.interleaved,
        "SPLITS": splits,
        "K_PAGE": k_page,
        "V_PAGE": page,
    }
    arguments = attention_arguments(call, config.block_m, config.block_n)
    reach = keys_in_reach(call, launch, q, k, config.block_m, arguments, q_angles, k_angles, table, k_page)
    arguments.reaching(reach).launch(
        launch,
        attention_forward,
        (programs, splits),
        config,
        constexprs,
        inputs=inputs(q, k, v),
        output=Output(partial, partial_lse, strides(partial[0]), partial.stride(0), partial_lse.stride(0)),
        q_max=q_max(call),
        split_tiles=-(-tiles // splits),
        sinks=call.sinks,
        q_angles=q_angles,
        k_angles=k_angles,
        pages=table,
    )
    if splits > 1:
        rows = batch * heads * q_tokens
        constexprs = {
            "SPLITS": splits,
            "BLOCK_S": power_of_two(splits, 2),
            "DV": dim_v,
            "BLOCK_DV": power_of_two(dim_v),
        }
        values = (partial, partial_lse, output(out, lse), call.sinks, heads, q_tokens, rows)
        launch(combine, (rows,), values, constexprs, 4, 1, None)
    return out, lse
