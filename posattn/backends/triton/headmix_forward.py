"""Host side of the HeadMix family: what its kernels are given, and the forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posattn.backends.common.operands import bias_operands, distances, power_of_two, q_max, sequences
from posattn.backends.common.strides import rows_like
from posattn.backends.triton.arguments import (
    Arguments,
    Launch,
    attention_arguments,
    bias_config,
    inputs,
    operands,
    output,
    unit_stride,
)
from posattn.backends.triton.attention_forward import rotated
from posattn.backends.triton.configs.headmix import chunks, forward_config, halves, keeps_queries, scales_queries
from posattn.backends.triton.configs.launch_config import LaunchConfig
from posattn.kernels.common.arguments import Inputs, Operands
from posattn.kernels.common.config import HeadMixConfig
from posattn.kernels.headmix.forward import headmix_forward
from posattn.kernels.headmix.mlp import MixWeights
from posattn.plan import Call, HeadMix


def _padded(weight: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    out = weight.new_zeros((rows, columns), dtype=dtype)
    out[: weight.shape[0], : weight.shape[1]] = weight
    return out


def concat(mix: HeadMix) -> bool:
    return bool(mix.inner) and mix.form != "add"


def _rows_by_distance(call: Call, mix: HeadMix, heads_padded: int, beyond: int) -> Tensor | None:
    """The inner bias [distances, heads] from `beyond` before the least distance on, where it depends on the distance
    alone: a tile on the border reads distances beyond those of the sequence."""
    inner = mix.inner
    if not concat(mix) or inner.profile is not None or inner.dense is not None or call.q_positions is not None:
        return None
    if inner.slope is not None and inner.slope.slope.dim() == 2:
        return None
    heads = call.q.shape[1]
    least, greatest = distances(call)
    distance = torch.arange(least - beyond, greatest + 1 + beyond, device=call.q.device)
    rows = torch.zeros((distance.shape[0], heads_padded), dtype=torch.float32, device=call.q.device)
    if inner.table is not None:
        entries = (distance - inner.table.first).clamp(0, inner.table.values.shape[1] - 1)
        rows[:, :heads] += inner.table.values.float()[:, entries].T
    if inner.slope is not None:
        reach = distance if inner.slope.signed else distance.abs()
        rows[:, :heads] -= reach[:, None] * inner.slope.slope.float()
    return rows.to(call.q.dtype)


@dataclass(frozen=True)
class MixArguments:
    """What all kernels of a call with HeadMix take: the plain family's arguments, whose bias is the outer one."""

    plain: Arguments
    config: LaunchConfig
    inputs: Inputs
    inner: Operands
    weights: MixWeights
    constant: HeadMixConfig

    def launch(
        self, launch: Launch, kernel: Any, grid: Sequence[int], constexprs: Mapping[str, Any] | None = None, **own: Any
    ) -> None:
        constants = {"CONFIG": self.constant, **(constexprs or {})}
        given = {"inputs": self.inputs, "outer": self.plain.operands, "inner": self.inner, "weights": self.weights}
        self.plain.launch(launch, kernel, grid, self.config, constants, **given, **own)


def mix_arguments(
    call: Call, mix: HeadMix, config: LaunchConfig, given: Inputs, grad_out: Tensor | None = None
) -> MixArguments:
    """For inputs that are rotated already; grad_out: in backward, the gradient of the output."""
    arguments = attention_arguments(call, config.block_m, config.block_n)
    inner = bias_operands(call, mix.inner, config.block_m, config.block_n)
    heads, width = call.q.shape[1], mix.w1.shape[0]
    heads_padded, width_padded = power_of_two(heads), power_of_two(width)
    dtype = call.q.dtype
    b1 = torch.zeros(width_padded, dtype=torch.float32, device=call.q.device)
    b1[:width] = mix.b1
    beyond = config.block_m + config.block_n
    rows = _rows_by_distance(call, mix, heads_padded, beyond)
    w1b = _padded(mix.w1[:, heads:].T, heads_padded, width_padded, dtype) if concat(mix) else None
    carried = False
    if rows is not None and w1b is not None and heads + 2 <= heads_padded:
        carried = True
        # Two spare heads of the rows are 1 and their weights b1, rounded, and what the rounding left.
        rows[:, heads : heads + 2] = 1.0
        w1b[heads] = b1
        w1b[heads + 1] = b1 - w1b[heads].float()
    weights = MixWeights(
        w1x=_padded(mix.w1[:, :heads].T, heads_padded, width_padded, dtype),
        w1b=w1b,
        b1=None if carried else b1,
        w2=_padded(mix.w2, heads_padded, width_padded, dtype),
        b2=mix.b2.float().contiguous(),
        rows=rows,
        rows_first=distances(call)[0] - beyond,
    )
    plain = arguments.config
    tensors = [given.q, given.k, given.v, *([] if grad_out is None else [grad_out])]
    constant = HeadMixConfig(
        dim=plain.dim,
        block_dim=plain.block_dim,
        value_dim=plain.value_dim,
        block_value_dim=plain.block_value_dim,
        q_step=given.q.stride(2),
        k_step=given.k.stride(2),
        v_step=given.v.stride(2),
        grad_step=0 if grad_out is None else grad_out.stride(2),
        group=config.num_warps,
        groups=-(-heads // config.num_warps),
        heads=heads_padded,
        width=width_padded,
        keep_queries=keeps_queries(call),
        scaled_queries=scales_queries(call),
        chunks=chunks(config),
        halves=halves(call, config) and (rows is not None or not concat(mix)),
        near=all(x.stride(1) * x.shape[1] < 1 << 30 for x in tensors),
        concat=concat(mix),
        residual=mix.form != "concat",
        has_inner=bool(mix.inner),
        has_outer=bool(call.plan.bias),
        explicit=plain.explicit,
        has_left=plain.has_left,
        has_right=plain.has_right,
        inner=bias_config(inner),
        outer=plain.bias,
        bounds_block=plain.bounds_block,
        precision=plain.precision,
    )
    return MixArguments(arguments, config, given, operands(inner), weights, constant)


def rotated_inputs(call: Call, launch: Launch) -> Inputs:
    """q, k and v, rotated. The step from token to token is a constant of the kernels (HeadMixConfig): it is the head
    dimension or a layer's width, and offsets inside a tile then cost nothing."""
    q, k, v = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v)
    rotary = call.plan.rotary
    if rotary is not None:
        q = rotated(launch, q, rotary.q_cos, rotary.q_sin, rotary.interleaved, q.dtype)
        k = rotated(launch, k, rotary.k_cos, rotary.k_sin, rotary.interleaved, k.dtype)
    return inputs(q, k, v)


def forward(call: Call, mix: HeadMix, launch: Launch, arch: str) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in q.dtype and the log-sum-exp [B, Hq, Tq] float32."""
    q, v = call.q, call.v
    config = forward_config(arch, call)
    create = torch.empty if call.mask.cu_seqlens_q is None else torch.zeros
    out = rows_like(call, v.shape[3], lambda shape: create(shape, dtype=q.dtype, device=q.device))
    lse = create(q.shape[:3], dtype=torch.float32, device=q.device)
    programs = -(-q_max(call) // config.block_m) * sequences(call)
    mix_arguments(call, mix, config, rotated_inputs(call, launch)).launch(
        launch, headmix_forward, (programs,), output=output(out, lse), q_max=q_max(call), sinks=call.sinks
    )
    return out, lse
