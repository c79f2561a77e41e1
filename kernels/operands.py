"""A Call as the arguments that the kernels share, by parameter name.

Kernels take their parameters in their own order and subset; `launch_with` picks them by name. Absent operands are
None, which Triton compiles away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from posattn.backends.strides import steps
from posattn.plan import Bias, Call, Profile

from .form import BiasForm, Form

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


def padded(dim: int, least: int = 16) -> int:
    """The power of two that holds `dim`, at least what a tensor-core product needs."""
    return max(least, 1 << max(dim - 1, 0).bit_length())


def _signed32(word: int) -> int:
    """The same 32 bits as an int32, so that a value never changes the type a kernel is compiled for."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


def sequences(call: Call) -> int:
    """How many sequences attend on their own: packed documents, else the batch."""
    cu = call.mask.cu_seqlens_q
    return call.q.shape[0] if cu is None else cu.shape[0] - 1


def all_blocks(call: Call, tokens: int, longest: int, block: int) -> int:
    """Blocks of all sequences; of packed documents as many as tokens can fill, however long the longest is."""
    if call.mask.cu_seqlens_q is not None:
        return tokens // block + sequences(call)
    return -(-longest // block) * sequences(call)


def q_max(call: Call) -> int:
    return call.mask.max_q or call.q.shape[2]


def k_max(call: Call) -> int:
    return call.mask.max_k or call.k.shape[2]


def covers(call: Call, first: int, length: int) -> bool:
    """True if a table from `first` on holds every implicit distance, so that no index needs clamping."""
    return call.q_positions is None and first <= -(q_max(call) - 1) and first + length - 1 >= k_max(call) - 1


def mask_arguments(call: Call) -> Arguments:
    mask = call.mask
    left, right = mask.left, mask.right
    if mask.causal:
        right = 0 if right is None else min(right, 0)
    far = q_max(call) + k_max(call)  # as good as unlimited, and no sum of it and an index overflows
    values: dict[str, Any] = {
        "KLengths": mask.k_lengths,
        "CuQ": mask.cu_seqlens_q,
        "CuK": mask.cu_seqlens_k,
        "left": 0 if left is None else min(left, far),
        "right": 0 if right is None else min(right, far),
        "Boolean": mask.boolean,
        **dict.fromkeys(("stride_bb", "stride_bh", "stride_bi", "stride_bj"), 0),
    }
    if mask.boolean is not None:
        values.update(zip(("stride_bb", "stride_bh", "stride_bi", "stride_bj"), steps(mask.boolean)))
    return Arguments(values, {"HAS_LEFT": left is not None, "HAS_RIGHT": right is not None, "TOP_LEFT": mask.top_left})


def position_arguments(call: Call) -> dict[str, Any]:
    q_positions, k_positions = call.q_positions, call.k_positions
    return {
        "QPositions": q_positions,
        "KPositions": k_positions,
        "stride_qpos": 0 if q_positions is None else steps(q_positions)[0],
        "stride_kpos": 0 if k_positions is None else steps(k_positions)[0],
    }


def dropout_arguments(call: Call) -> dict[str, Any]:
    if call.dropout_p == 0.0 or call.seed is None:
        return {"threshold": None, "keep_scale": None, "seed_lo": None, "seed_hi": None}
    seed = int(call.seed)
    least_kept = min(math.ceil(call.dropout_p * 2**32), 2**32 - 1)
    return {
        "threshold": _signed32(least_kept),
        "keep_scale": 1.0 / (1.0 - call.dropout_p),
        "seed_lo": _signed32(seed),
        "seed_hi": _signed32(seed >> 32),
    }


def linear(call: Call, bias: Bias) -> bool:
    """True if no visible distance is negative, or the sign is kept: the slope's |d| is then linear in j.

    Not in float32, which would be rounded at the size of a whole tile's bias where the logit's own is small."""
    if bias.slope is None or call.q_positions is not None or call.q.dtype == torch.float32:
        return False
    mask = call.mask
    right = 0 if mask.causal else mask.right
    return bias.slope.signed or (right is not None and right <= 0 and not mask.top_left)


def _block_bounds(x: Tensor, block: int) -> Tensor:
    """Least and greatest of blocks n and n + 1, `block` entries each, for every n: [blocks, 2]."""
    padding = -x.shape[0] % block
    low, high = torch.aminmax(torch.cat([x, x[-1:].expand(padding)]).view(-1, block), dim=1)
    low = torch.minimum(low, torch.cat([low[1:], low[-1:]]))
    high = torch.maximum(high, torch.cat([high[1:], high[-1:]]))
    return torch.stack([low, high], dim=1)


def _knots(profile: Profile) -> int:
    """The knots as the kernels pad them: a power of two, and at least one is +inf."""
    return padded(profile.knots.shape[0] + 1, 1)


def _extended(x: Tensor, by: int) -> Tensor:
    """x [..., L] with its first and last entry repeated `by` times more: what clamping the index gives."""
    return torch.cat([x[..., :1].expand(*x.shape[:-1], by), x, x[..., -1:].expand(*x.shape[:-1], by)], dim=-1)


def _profile_arguments(profile: Profile | None, bounds_block: int, beyond: int) -> dict[str, Any]:
    names = ("Psi", "PsiBounds", "RowScale", "RowBounds", "Knots", "SegmentSlope", "SegmentIntercept")
    if profile is None:
        return {
            **dict.fromkeys(names),
            **dict.fromkeys(("psi_first", "psi_last", "row_first", "row_last", "num_knots"), 0),
        }
    psi, row_scale = _extended(profile.psi.float(), beyond), profile.row_scale.float().contiguous()
    knots = profile.knots.float()
    knots = torch.nn.functional.pad(knots, (0, _knots(profile) - knots.shape[0]), value=math.inf)
    return {
        "Psi": psi,
        "psi_first": profile.first - beyond,
        "psi_last": profile.first - beyond + psi.shape[0] - 1,
        "PsiBounds": _block_bounds(psi, bounds_block),
        "RowScale": row_scale,
        "row_first": profile.row_first,
        "row_last": profile.row_first + row_scale.shape[0] - 1,
        "RowBounds": _block_bounds(row_scale, bounds_block),
        "Knots": knots,
        "num_knots": profile.knots.shape[0],
        "SegmentSlope": profile.slope.float().contiguous(),
        "SegmentIntercept": profile.intercept.float().contiguous(),
    }


def slope_arguments(slope: Tensor | None) -> dict[str, Any]:
    if slope is None:
        return {"Slope": None, "stride_slope_b": 0}
    slope = slope.float().contiguous()
    return {"Slope": slope, "stride_slope_b": slope.stride(0) if slope.dim() == 2 else 0}


def bias_arguments(call: Call, bias: Bias, block_m: int, block_n: int) -> Arguments:
    # A tile on the border holds distances beyond those of the sequence, which nobody uses but kernels read.
    beyond = 0 if call.q_positions is not None else block_m + block_n
    table = None if bias.table is None else _extended(bias.table.values.float(), beyond)
    profile = bias.profile
    dense = None if bias.dense is None else bias.dense.bias
    if dense is not None and dense.dtype == torch.float64:
        dense = dense.float()
    first = 0 if bias.table is None else bias.table.first - beyond
    values: dict[str, Any] = {
        **slope_arguments(None if bias.slope is None else bias.slope.slope),
        "Table": table,
        "stride_table_h": 0 if table is None else table.stride(0),
        "table_first": first,
        "table_last": 0 if table is None else first + table.shape[1] - 1,
        **_profile_arguments(profile, padded(block_m + block_n), beyond),
        "Dense": dense,
        **dict.fromkeys(("stride_db", "stride_dh", "stride_di", "stride_dj"), 0),
    }
    if dense is not None:
        values.update(zip(("stride_db", "stride_dh", "stride_di", "stride_dj"), steps(dense)))
    inside = (bias.table is None or covers(call, bias.table.first, bias.table.values.shape[1])) and (
        profile is None or covers(call, profile.first, profile.psi.shape[0])
    )
    constants = {
        "SIGNED": bias.slope is not None and bias.slope.signed,
        "LINEAR": linear(call, bias),
        "CLAMP": not inside,
        "KNOTS": 1 if profile is None else _knots(profile),
        "BOUNDS_BLOCK": padded(block_m + block_n),
    }
    return Arguments(values, constants)


def bias_form(bias: Arguments) -> BiasForm:
    """What kernels are compiled for of bias_arguments()."""
    return BiasForm(bias.constants["SIGNED"], bias.constants["CLAMP"], bias.constants["KNOTS"])


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
    mask = mask_arguments(call)
    bias = bias_arguments(call, call.plan.bias, block_m, block_n)
    natural = _natural(call)
    if call.plan.bias.table is not None and not natural:
        bias = bias.with_({"Table": bias.values["Table"] / call.scale}, {})
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    values: dict[str, Any] = {
        **mask.values,
        **bias.values,
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
        linear=bias.constants["LINEAR"],
        natural=natural,
        explicit=call.q_positions is not None,
        has_left=mask.constants["HAS_LEFT"],
        has_right=mask.constants["HAS_RIGHT"],
        top_left=mask.constants["TOP_LEFT"],
        bounds_block=bias.constants["BOUNDS_BLOCK"],
        precision="tf32" if tf32 or q.dtype != torch.float32 else "ieee",
    )
    constants = {
        "FORM": form,
        "D": q.shape[3],
        "BLOCK_D": padded(q.shape[3]),
        "DV": v.shape[3],
        "BLOCK_DV": padded(v.shape[3]),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "HALF": 0 if call.plan.rotary is None else call.plan.rotary.q_cos.shape[-1],
        "INTERLEAVED": call.plan.rotary is not None and call.plan.rotary.interleaved,
        "NVIDIA": torch.version.hip is None,
    }
    return Arguments(values, constants)
