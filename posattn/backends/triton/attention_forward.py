"""Host side of the plain family's forward pass: which kernels run for a call, and with what."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posattn.backends.common.arch import key_splits
from posattn.backends.common.operands import k_max, power_of_two, q_max, sequences
from posattn.backends.triton import autotune
from posattn.backends.triton.arguments import (
    Arguments,
    Launch,
    common_arguments,
    rotary_arguments,
    strides,
    unit_stride,
)
from posattn.backends.triton.configs.forward import FEW_ROWS, FORWARD, forward_tile
from posattn.backends.triton.configs.launch_config import Tile
from posattn.kernels.attention.combine import combine
from posattn.kernels.attention.forward import attention_forward
from posattn.kernels.common.rotary import turn
from posattn.plan import Call


def turned(
    launch: Launch, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype, sign: int = 1
) -> Tensor:
    """x [B, H, T, D] with its pairs turned, contiguous, in `dtype`; sign -1 turns back."""
    batch, heads, tokens, dim = x.shape
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    x, cos, sin = unit_stride(x), cos.float().contiguous(), sin.float().contiguous()
    block = 32 if dim <= 128 else 16
    values: dict[str, Any] = {
        "X": x,
        "Cos": cos,
        "Sin": sin,
        "Out": out,
        "stride_xb": x.stride(0),
        "stride_xh": x.stride(1),
        "stride_xt": x.stride(2),
        "stride_angle_b": cos.stride(0) if cos.shape[0] > 1 else 0,
        "num_heads": heads,
        "tokens": tokens,
    }
    constants = {
        "HALF": cos.shape[-1],
        "D": dim,
        "BLOCK_D": power_of_two(dim),
        "BLOCK_T": block,
        "INTERLEAVED": interleaved,
        "SIGN": sign,
    }
    grid = (-(-tokens // block) * batch * heads,)
    Arguments(values, constants).launch_with(launch, turn, grid, num_warps=4, num_stages=1)
    return out


def forward(call: Call, launch: Launch, arch: str, processors: int) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in q.dtype and the log-sum-exp [B, Hq, Tq] float32."""
    tile = forward_tile(arch, call)
    if autotune.enabled():
        time = autotune.milliseconds(lambda tile: _forward(call, launch, tile, processors))
        tiles = (tile, *autotune.candidates(FORWARD, arch, call))
        tile = autotune.pick("forward", autotune.device_name(call.q.device), call, tiles, time)
    return _forward(call, launch, tile, processors)


def _forward(call: Call, launch: Launch, tile: Tile, processors: int) -> tuple[Tensor, Tensor]:
    q, k, v = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v)
    batch, heads, q_tokens, _ = q.shape
    dim_v = v.shape[3]
    blocks = -(-q_max(call) // tile.block_m)
    programs = blocks * sequences(call) * heads
    splits = key_splits(programs, k_max(call), processors)

    arguments = common_arguments(call, tile.block_m, tile.block_n)
    rotary = call.plan.rotary
    k_cos = k_sin = None
    if rotary is not None:
        # Turning keys ahead takes two passes over them and a launch, which decoding would feel; in the kernel it takes
        # shared memory for the angles, for which larger tiles have no room.
        if q_max(call) <= FEW_ROWS:
            k_cos, k_sin = rotary.k_cos, rotary.k_sin
        else:
            k = turned(launch, k, rotary.k_cos, rotary.k_sin, rotary.interleaved, k.dtype)

    # Packed documents may leave tokens outside every document, which no program would write.
    create = torch.empty if call.mask.cu_seqlens_q is None else torch.zeros
    out = create((batch, heads, q_tokens, dim_v), dtype=q.dtype, device=q.device)
    lse = create((batch, heads, q_tokens), dtype=torch.float32, device=q.device)
    partial, partial_lse = out[None], lse[None]
    if splits > 1:
        partial = create((splits, *out.shape), dtype=torch.float32, device=q.device)
        partial_lse = create((splits, *lse.shape), dtype=torch.float32, device=q.device)
    tiles = -(-k_max(call) // tile.block_n)
    values: dict[str, Any] = {
        "Q": q,
        "K": k,
        "V": v,
        "Out": partial,
        "Lse": partial_lse,
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **dict(zip(("stride_os", "stride_ob", "stride_oh", "stride_om"), partial.stride())),
        "stride_ls": partial_lse.stride(0),
        "split_tiles": -(-tiles // splits),
        **rotary_arguments(None if rotary is None else rotary.q_cos, None if rotary is None else rotary.q_sin, "q"),
        **rotary_arguments(k_cos, k_sin, "k"),
    }
    arguments.with_(values, {"SPLITS": splits}).launch_with(
        launch, attention_forward, (programs, splits), tile.num_warps, tile.num_stages, tile.registers
    )
    if splits > 1:
        rows = batch * heads * q_tokens
        values = {
            "Partial": partial,
            "PartialLse": partial_lse,
            "Out": out,
            "Lse": lse,
            "Sinks": call.sinks,
            "num_heads": heads,
            "q_tokens": q_tokens,
            "rows": rows,
            **dict(zip(("stride_ob", "stride_oh", "stride_om"), out.stride())),
        }
        constants = {
            "SPLITS": splits,
            "BLOCK_S": power_of_two(splits, 2),
            "DV": dim_v,
            "BLOCK_DV": power_of_two(dim_v),
        }
        Arguments(values, constants).launch_with(launch, combine, (rows,), num_warps=4, num_stages=1)
    return out, lse
