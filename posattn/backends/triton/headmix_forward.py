"""Host side of the HeadMix family: what its kernels are given, and the forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from posattn.backends.common.operands import bias_operands, k_max, power_of_two, q_max, sequences
from posattn.backends.triton.arguments import (
    Arguments,
    Launch,
    bias_arguments,
    bias_form,
    common_arguments,
    unit_stride,
)
from posattn.backends.triton.attention_forward import turned
from posattn.backends.triton.configs.headmix import chunks, forward_tile, halves, keeps_queries, scales_queries
from posattn.backends.triton.configs.launch_config import Tile
from posattn.kernels.common.config import MixForm
from posattn.kernels.headmix.forward import mixed_forward
from posattn.plan import Call, HeadMix


def _inner_name(name: str) -> str:
    return f"Inner{name}" if name[0].isupper() else f"inner_{name}"


def _padded(weight: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    out = weight.new_zeros((rows, columns), dtype=dtype)
    out[: weight.shape[0], : weight.shape[1]] = weight
    return out


def concat(mix: HeadMix) -> bool:
    return bool(mix.inner) and mix.form != "add"


def _rows_by_distance(call: Call, mix: HeadMix, heads_padded: int, beyond: int) -> Tensor | None:
    """The inner bias [distances, heads] from distance 1 - q_max - beyond on, where it depends on the distance alone:
    a tile on the border reads distances beyond those of the sequence."""
    inner = mix.inner
    if not concat(mix) or inner.profile is not None or inner.dense is not None or call.q_positions is not None:
        return None
    if inner.slope is not None and inner.slope.slope.dim() == 2:
        return None
    heads = call.q.shape[1]
    distances = torch.arange(1 - q_max(call) - beyond, k_max(call) + beyond, device=call.q.device)
    rows = torch.zeros((distances.shape[0], heads_padded), dtype=torch.float32, device=call.q.device)
    if inner.table is not None:
        entries = (distances - inner.table.first).clamp(0, inner.table.values.shape[1] - 1)
        rows[:, :heads] += inner.table.values.float()[:, entries].T
    if inner.slope is not None:
        reach = distances if inner.slope.signed else distances.abs()
        rows[:, :heads] -= reach[:, None] * inner.slope.slope.float()
    return rows.to(call.q.dtype)


def mix_arguments(call: Call, mix: HeadMix, tile: Tile, inputs: Mapping[str, Any]) -> Arguments:
    """common_arguments, the inner bias's beside them, the MLP's weights, and `inputs` (Q, K, V, and dO in backward)."""
    arguments = common_arguments(call, tile.block_m, tile.block_n)
    inner = bias_operands(call, mix.inner, tile.block_m, tile.block_n)
    heads, width = call.q.shape[1], mix.w1.shape[0]
    heads_padded, width_padded = power_of_two(heads), power_of_two(width)
    dtype = call.q.dtype
    b1 = torch.zeros(width_padded, dtype=torch.float32, device=call.q.device)
    b1[:width] = mix.b1
    beyond = tile.block_m + tile.block_n
    rows = _rows_by_distance(call, mix, heads_padded, beyond)
    w1b = _padded(mix.w1[:, heads:].T, heads_padded, width_padded, dtype) if concat(mix) else None
    carried = False
    if rows is not None and w1b is not None and heads + 2 <= heads_padded:
        carried = True
        # Two spare heads of the rows are 1 and their weights b1, rounded, and what the rounding left.
        rows[:, heads : heads + 2] = 1.0
        w1b[heads] = b1
        w1b[heads + 1] = b1 - w1b[heads].float()
    values: dict[str, Any] = {_inner_name(name): value for name, value in bias_arguments(inner).items()}
    values.update(
        W1X=_padded(mix.w1[:, :heads].T, heads_padded, width_padded, dtype),
        W1B=w1b,
        B1=None if carried else b1,
        W2=_padded(mix.w2, heads_padded, width_padded, dtype),
        B2=mix.b2.float().contiguous(),
        Rows=rows,
        rows_first=1 - q_max(call) - beyond,
    )
    constants = arguments.constants
    plain = constants["FORM"]
    form = MixForm(
        dim=constants["D"],
        block_dim=constants["BLOCK_D"],
        value_dim=constants["DV"],
        block_value_dim=constants["BLOCK_DV"],
        q_step=inputs["Q"].stride(2),
        k_step=inputs["K"].stride(2),
        v_step=inputs["V"].stride(2),
        grad_step=inputs["GradOut"].stride(2) if "GradOut" in inputs else 0,
        group=tile.num_warps,
        groups=-(-heads // tile.num_warps),
        heads=heads_padded,
        width=width_padded,
        keep_queries=keeps_queries(call),
        scaled_queries=scales_queries(call),
        chunks=chunks(tile),
        halves=halves(call, tile) and (rows is not None or not concat(mix)),
        near=all(inputs[x].stride(1) * inputs[x].shape[1] < 1 << 30 for x in ("Q", "K", "V", "GradOut") if x in inputs),
        concat=concat(mix),
        residual=mix.form != "concat",
        has_inner=bool(mix.inner),
        has_outer=bool(call.plan.bias),
        explicit=plain.explicit,
        has_left=plain.has_left,
        has_right=plain.has_right,
        top_left=plain.top_left,
        inner=bias_form(inner),
        outer=plain.bias,
        bounds_block=plain.bounds_block,
        precision=plain.precision,
    )
    values.update(inputs)
    return arguments.with_(values, {"FORM": form, "HEADS": heads_padded})


def input_arguments(call: Call, launch: Launch) -> dict[str, Any]:
    """q, k and v, turned, and their strides. The step from token to token is part of the Form, so a constant of the
    kernel: it is the head dimension or a layer's width, and offsets inside a tile then cost nothing."""
    q, k, v = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v)
    rotary = call.plan.rotary
    if rotary is not None:
        q = turned(launch, q, rotary.q_cos, rotary.q_sin, rotary.interleaved, q.dtype)
        k = turned(launch, k, rotary.k_cos, rotary.k_sin, rotary.interleaved, k.dtype)
    values: dict[str, Any] = {"Q": q, "K": k, "V": v}
    for name, x in (("q", q), ("k", k), ("v", v)):
        values[f"stride_{name}b"], values[f"stride_{name}h"] = x.stride()[:2]
    return values


def forward(call: Call, mix: HeadMix, launch: Launch, arch: str) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in q.dtype and the log-sum-exp [B, Hq, Tq] float32."""
    q, v = call.q, call.v
    tile = forward_tile(arch, call)
    create = torch.empty if call.mask.cu_seqlens_q is None else torch.zeros
    out = create((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    lse = create(q.shape[:3], dtype=torch.float32, device=q.device)
    values = {"Out": out, "Lse": lse, **dict(zip(("stride_ob", "stride_oh", "stride_om"), out.stride()))}
    programs = -(-q_max(call) // tile.block_m) * sequences(call)
    arguments = mix_arguments(call, mix, tile, {**input_arguments(call, launch), **values})
    arguments.launch_with(launch, mixed_forward, (programs,), tile.num_warps, tile.num_stages, tile.registers)
    return out, lse
