"""A Call as the tuples that kernels take (kernels/common/arguments.py), and what they are compiled for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from posattn.backends.common.operands import (
    BiasOperands,
    bias_operands,
    dropout_operands,
    mask_operands,
    position_operands,
    power_of_two,
)
from posattn.backends.common.strides import steps
from posattn.backends.triton.configs.launch_config import LaunchConfig
from posattn.kernels.common.arguments import (
    Angles,
    Dropout,
    Inputs,
    Mask,
    Operands,
    Output,
    OutputGradient,
    PairStrides,
    Positions,
    Shape,
    Strides,
)
from posattn.kernels.common.config import AttentionConfig, BiasConfig
from posattn.kernels.common.pages import Pages
from posattn.plan import Call

Launch = Callable[[Any, Sequence[int], Sequence[Any], Mapping[str, Any], int, int, int | None], None]


MAX_TOKEN_STRIDE = 1 << 23


def nothing(of: type[Any]) -> Any:
    """A tuple of arguments that a kernel takes all of and this call has none of."""
    return of(*[None] * len(of._fields))


def unit_stride(x: Tensor) -> Tensor:
    """x itself if the kernels can read it, else a copy: its last dimension contiguous, and its tokens near enough for
    offsets inside a tile to be 32-bit (offsets of tiles are 64-bit)."""
    return x if has_unit_stride(x) else x.contiguous()


def has_unit_stride(x: Tensor) -> bool:
    return (x.stride(-1) == 1 or x.shape[-1] == 1) and x.stride(-2) < MAX_TOKEN_STRIDE


def strides(x: Tensor) -> Strides:
    return Strides(*x.stride()[:3])


def inputs(q: Tensor, k: Tensor, v: Tensor) -> Inputs:
    return Inputs(q, k, v, strides(q), strides(k), strides(v))


def output_gradient(grad_out: Tensor, lse2: Tensor, delta: Tensor) -> OutputGradient:
    return OutputGradient(grad_out, lse2, delta, strides(grad_out))


def output(out: Tensor, lse: Tensor) -> Output:
    """One output, not split."""
    return Output(out, lse, strides(out), None, None)


def shape(call: Call) -> Shape:
    heads = call.q.shape[1]
    return Shape(heads, heads // call.k.shape[1], call.q.shape[2], call.k_tokens)


NO_PAGES = Pages(None, None, None)


def pages(call: Call) -> tuple[Pages, int]:
    """The block table of a call and the tokens of a page; NO_PAGES and 0 where its keys lie side by side."""
    table = call.block_table
    if table is None:
        return NO_PAGES, 0
    count, _, page, _ = call.k.shape
    return Pages(table.to(torch.int32).contiguous(), table.shape[1], count - 1), page


def angles(cos: Tensor | None, sin: Tensor | None) -> Angles:
    """None for a side that is rotated already."""
    if cos is None or sin is None:
        return Angles(None, None, 0)
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    return Angles(cos, sin, steps(cos)[0])


def operands(bias: BiasOperands) -> Operands:
    values = {name: getattr(bias, name) for name in Operands._fields}
    return Operands(**{**values, "dense_strides": PairStrides(*bias.dense_strides)})


def bias_config(bias: BiasOperands) -> BiasConfig:
    return BiasConfig(bias.signed, bias.clamp, bias.padded_knots)


def _positions(call: Call) -> Positions:
    positions = position_operands(call)
    return Positions(positions.q, positions.k, positions.q_batch, positions.k_batch)


def _signed32(word: int) -> int:
    """The same 32 bits as an int32, so that a value never changes the type a kernel is compiled for."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _dropout(call: Call) -> Dropout:
    dropout = dropout_operands(call)
    if dropout is None:
        return Dropout(None, None, None)
    return Dropout(_signed32(dropout.threshold), dropout.keep_scale, dropout.seed)


def _scale_before_bias(call: Call) -> bool:
    """Whether the logits are multiplied by the scale before anything is added to them.

    Else the scale joins the exponent, which saves a multiply an element, and what is added is divided by it: a
    profile's line, or a table alone, at which the tensor cores' sums then start (exact float32 products would each be
    rounded at its size)."""
    bias = call.plan.bias
    if call.softcap != 0.0 or bias.dense is not None or not 1e-3 < call.scale < 1e6:
        return True
    if bias.table is None:
        return bias.slope is not None and bias.profile is None
    alone = bias.slope is None and bias.profile is None
    return not alone or call.q_positions is not None or call.q.dtype == torch.float32


@dataclass(frozen=True)
class Arguments:
    """What all kernels of a call take, for one tile: values, and constants that they are compiled for."""

    shape: Shape
    scale: float
    softcap: float | None
    operands: Operands
    mask: Mask
    positions: Positions
    dropout: Dropout
    config: AttentionConfig
    constexprs: Mapping[str, Any]

    def reaching(self, reach: Tensor | None) -> Arguments:
        """The same with what is in reach of the blocks of a kernel."""
        return replace(self, mask=self.mask._replace(reach=reach))

    def launch(
        self,
        launch: Launch,
        kernel: Any,
        grid: Sequence[int],
        config: LaunchConfig,
        constexprs: Mapping[str, Any],
        **own: Any,
    ) -> None:
        """Starts `kernel` with arguments of its `own` and those of these that it takes, by its parameters' names."""
        shared = {name: getattr(self, name) for name in _SHARED}
        values = {**shared, **self.dropout._asdict(), **own}
        constexprs = {**self.constexprs, **constexprs}
        args = [values[name] for name in kernel.arg_names if name not in constexprs]
        launch(kernel, grid, args, constexprs, config.num_warps, config.num_stages, config.registers)


_SHARED = ("shape", "scale", "softcap", "operands", "mask", "positions")


def attention_arguments(call: Call, block_m: int, block_n: int) -> Arguments:
    q, v = call.q, call.v
    mask = mask_operands(call)
    bias = bias_operands(call, call.plan.bias, block_m, block_n)
    given = operands(bias)
    scale_before_bias = _scale_before_bias(call)
    if given.table is not None and not scale_before_bias:
        given = given._replace(table=given.table / call.scale)
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    config = AttentionConfig(
        dim=q.shape[3],
        block_dim=power_of_two(q.shape[3]),
        value_dim=v.shape[3],
        block_value_dim=power_of_two(v.shape[3]),
        bias=bias_config(bias),
        linear=bias.linear,
        scale_before_bias=scale_before_bias,
        explicit=call.q_positions is not None,
        has_left=mask.has_left,
        has_right=mask.has_right,
        bounds_block=bias.bounds_block,
        precision="tf32" if tf32 or q.dtype != torch.float32 else "ieee",
    )
    return Arguments(
        shape=shape(call),
        scale=call.scale,
        softcap=call.softcap or None,
        operands=given,
        mask=Mask(
            mask.k_lengths,
            mask.k_starts,
            mask.cu_q,
            mask.cu_k,
            mask.offsets,
            mask.offset if mask.has_offset else None,
            mask.left,
            mask.right,
            mask.boolean,
            PairStrides(*mask.boolean_strides),
            None,
        ),
        positions=_positions(call),
        dropout=_dropout(call),
        config=config,
        constexprs={"BLOCK_M": block_m, "BLOCK_N": block_n, "CONFIG": config, "NVIDIA": torch.version.hip is None},
    )
