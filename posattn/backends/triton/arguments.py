"""A Call as the arguments that the kernels share, by parameter name.

Kernels take their parameters in their own order and subset; `launch_with` picks them by name. Absent operands are
None, which Triton compiles away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from posattn.backends.common.operands import (
    BiasOperands,
    MaskOperands,
    bias_operands,
    dropout_operands,
    k_max,
    mask_operands,
    position_operands,
    power_of_two,
    q_max,
    slopes,
)
from posattn.backends.common.strides import steps
from posattn.kernels.common.config import BiasForm, Form
from posattn.plan import Call, Slope

Launch = Callable[[Any, Sequence[int], Sequence[Any], Mapping[str, Any], int, int, int | None], None]


MAX_TOKEN_STRIDE = 1 << 23


@dataclass
class Arguments:
    """Runtime values and compile-time constants, by the name of the kernel parameter that takes them."""

    values: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)

    def with_(self, values: Mapping[str, Any], constants: Mapping[str, Any]) -> Arguments:
        return Arguments({**self.values, **values}, {**self.constants, **constants})

    def launch_with(
        self,
        launch: Launch,
        kernel: Any,
        grid: Sequence[int],
        num_warps: int,
        num_stages: int,
        registers: int | None = None,
    ) -> None:
        names = kernel.arg_names
        constants = {name: self.constants[name] for name in names if name in self.constants}
        values = [self.values[name] for name in names if name not in constants]
        launch(kernel, grid, values, constants, num_warps, num_stages, registers)


def unit_stride(x: Tensor) -> Tensor:
    """x itself if the kernels can read it, else a copy: its last dimension contiguous, and its tokens near enough for
    offsets inside a tile to be 32-bit (offsets of tiles are 64-bit)."""
    readable = (x.stride(-1) == 1 or x.shape[-1] == 1) and x.stride(-2) < MAX_TOKEN_STRIDE
    return x if readable else x.contiguous()


def _signed32(word: int) -> int:
    """The same 32 bits as an int32, so that a value never changes the type a kernel is compiled for."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


def mask_arguments(call: Call) -> tuple[dict[str, Any], MaskOperands]:
    mask = mask_operands(call)
    values = {
        "KLengths": mask.k_lengths,
        "CuQ": mask.cu_q,
        "CuK": mask.cu_k,
        "left": mask.left,
        "right": mask.right,
        "Boolean": mask.boolean,
        **dict(zip(("stride_bb", "stride_bh", "stride_bi", "stride_bj"), mask.boolean_strides)),
    }
    return values, mask


def position_arguments(call: Call) -> dict[str, Any]:
    positions = position_operands(call)
    return {
        "QPositions": positions.q,
        "KPositions": positions.k,
        "stride_qpos": positions.q_batch,
        "stride_kpos": positions.k_batch,
    }


def dropout_arguments(call: Call) -> dict[str, Any]:
    dropout = dropout_operands(call)
    if dropout is None:
        return {"threshold": None, "keep_scale": None, "seed_lo": None, "seed_hi": None}
    return {
        "threshold": _signed32(dropout.threshold),
        "keep_scale": dropout.keep_scale,
        "seed_lo": _signed32(dropout.key_low),
        "seed_hi": _signed32(dropout.key_high),
    }


def slope_arguments(slope: Slope | None) -> dict[str, Any]:
    return dict(zip(("Slope", "stride_slope_b"), slopes(slope)))


def bias_arguments(bias: BiasOperands) -> dict[str, Any]:
    return {
        "Slope": bias.slope,
        "stride_slope_b": bias.slope_batch,
        "Table": bias.table,
        "stride_table_h": bias.table_head,
        "table_first": bias.table_first,
        "table_last": bias.table_last,
        "Psi": bias.psi,
        "psi_first": bias.psi_first,
        "psi_last": bias.psi_last,
        "PsiBounds": bias.psi_bounds,
        "RowScale": bias.row_scale,
        "row_first": bias.row_first,
        "row_last": bias.row_last,
        "RowBounds": bias.row_bounds,
        "Knots": bias.knots,
        "num_knots": bias.num_knots,
        "SegmentSlope": bias.segment_slope,
        "SegmentIntercept": bias.segment_intercept,
        "Dense": bias.dense,
        **dict(zip(("stride_db", "stride_dh", "stride_di", "stride_dj"), bias.dense_strides)),
    }


def bias_form(bias: BiasOperands) -> BiasForm:
    """What kernels are compiled for of a bias."""
    return BiasForm(bias.signed, bias.clamp, bias.padded_knots)


def rotary_arguments(cos: Tensor | None, sin: Tensor | None, side: str) -> dict[str, Any]:
    """The angles of one side, "q" or "k"; None for a side that is turned already."""
    prefix = side.upper()
    if cos is None or sin is None:
        return {prefix + "Cos": None, prefix + "Sin": None, f"stride_{side}_angle": 0}
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    return {prefix + "Cos": cos, prefix + "Sin": sin, f"stride_{side}_angle": steps(cos)[0]}


def strides(name: str, x: Tensor) -> dict[str, int]:
    """The batch, head and token strides of a [B, H, T, D] tensor, as stride_qb, stride_qh, stride_qm (n for keys)."""
    token = "n" if name in "kv" else "m"
    return dict(zip((f"stride_{name}b", f"stride_{name}h", f"stride_{name}{token}"), x.stride()[:3]))


def _natural(call: Call) -> bool:
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


def common_arguments(call: Call, block_m: int, block_n: int) -> Arguments:
    """All that forward and backward kernels of the plain family take beside their own tensors."""
    q, v = call.q, call.v
    mask_values, mask = mask_arguments(call)
    bias = bias_operands(call, call.plan.bias, block_m, block_n)
    bias_values = bias_arguments(bias)
    natural = _natural(call)
    if bias.table is not None and not natural:
        bias_values["Table"] = bias.table / call.scale
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    values: dict[str, Any] = {
        **mask_values,
        **bias_values,
        **position_arguments(call),
        **dropout_arguments(call),
        "scale": call.scale,
        "softcap": call.softcap or None,
        "num_heads": q.shape[1],
        "group": q.shape[1] // call.k.shape[1],
        "q_tokens": q.shape[2],
        "k_tokens": call.k.shape[2],
        "q_max": q_max(call),
        "k_max": k_max(call),
        "Sinks": call.sinks,
    }
    form = Form(
        bias=bias_form(bias),
        linear=bias.linear,
        natural=natural,
        explicit=call.q_positions is not None,
        has_left=mask.has_left,
        has_right=mask.has_right,
        top_left=mask.top_left,
        bounds_block=bias.bounds_block,
        precision="tf32" if tf32 or q.dtype != torch.float32 else "ieee",
    )
    constants = {
        "FORM": form,
        "D": q.shape[3],
        "BLOCK_D": power_of_two(q.shape[3]),
        "DV": v.shape[3],
        "BLOCK_DV": power_of_two(v.shape[3]),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "HALF": 0 if call.plan.rotary is None else call.plan.rotary.q_cos.shape[-1],
        "INTERLEAVED": call.plan.rotary is not None and call.plan.rotary.interleaved,
        "NVIDIA": torch.version.hip is None,
    }
    return Arguments(values, constants)
