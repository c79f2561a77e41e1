"""A Call as what CUDA kernels share: member structs of csrc/cuda/params.h by name, and what they are compiled with.

How a mask, a bias or a seed becomes numbers is the same for every GPU backend.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from posattn.backends.common import operands as common
from posattn.backends.cuda import params
from posattn.backends.cuda.constants import (
    BiasConstants,
    ElementConstants,
    MaskConstants,
    OperandConstants,
    PairConstants,
    SequenceConstants,
)
from posattn.plan import Bias, Call, Rotary

LOG2E = math.log2(math.e)
HEAD_DIMS = (32, 64, 96, 128, 192, 256)
DTYPES = (torch.float16, torch.bfloat16)

_DENSE = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}  # enum DenseType of dense.h

Members = dict[str, Any]


def written_by_queries(call: Call, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """For what blocks of queries write: zeros if documents are packed, which may leave tokens outside all of them."""
    create = torch.empty if call.mask.cu_seqlens_q is None else torch.zeros
    return create(shape, dtype=dtype, device=call.q.device)


def by_distance(values: Tensor, first: int, least: int, count: int) -> Tensor:
    """Entries of values [..., L], which begins at distance `first`, for `count` distances from `least` on."""
    distance = torch.arange(count, device=values.device) + least
    return values.float()[..., (distance - first).clamp(0, values.shape[-1] - 1)].contiguous()


def padded(dim: int) -> int:
    """The head dimension of the kernels that serves `dim`."""
    return min(d for d in HEAD_DIMS if d >= dim)


def lies_in_chunks(x: Tensor) -> bool:
    """Whether 16-byte copies can read the rows of x [B, H, T, D]."""
    aligned = x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s, n in zip(x.stride()[:3], x.shape[:3]) if n > 1)
    return x.shape[-1] % 8 == 0 and x.stride(-1) == 1 and aligned


def in_chunks(x: Tensor) -> Tensor:
    """x [B, H, T, D] itself if 16-byte copies can read its rows, else a copy that they can, zeros up to D % 8 == 0."""
    if lies_in_chunks(x):
        return x
    return pad(x, (0, -x.shape[-1] % 8)).contiguous()


def strides(x: Tensor) -> Members:
    """The batch, head and token strides of a [B, H, T, D] tensor."""
    return dict(zip(("batch", "head", "token"), x.stride()[:3]))


def pair_strides(x: Tensor | None) -> Members:
    """PairStrides; null where there is no tensor."""
    return {} if x is None else _named(common.pair_strides(x))


def _named(strides: common.PairStrides) -> Members:
    return dict(zip(("batch", "head", "query", "key"), strides))


def shape(call: Call, block_m: int, block_n: int) -> Members:
    """ShapeParams."""
    return {
        "heads": call.q.shape[1],
        "group": call.q.shape[1] // call.k.shape[1],
        "q_tokens": call.q.shape[2],
        "k_tokens": call.k_tokens,
        "q_blocks": -(-common.q_max(call) // block_m),
        "k_blocks": -(-common.k_max(call) // block_n),
    }


def mask(call: Call) -> tuple[Members, MaskConstants]:
    """MaskParams."""
    found = common.mask_operands(call)
    sequence = SequenceConstants(
        has_left=found.has_left,
        has_right=found.has_right,
        has_offset=found.has_offset,
        has_offsets=found.offsets is not None,
        has_k_lengths=found.k_lengths is not None,
        has_k_starts=found.k_starts is not None,
        packed=found.cu_q is not None,
    )
    return members(found, "MaskParams"), MaskConstants(sequence, has_boolean=found.boolean is not None)


def pages(call: Call) -> tuple[Members, int]:
    """PageParams, and the tokens of a page: nothing and 0 where keys lie side by side."""
    table = call.block_table
    if table is None:
        return {}, 0
    count, _, page, _ = call.k.shape
    return {"table": table.to(torch.int32).contiguous(), "entries": table.shape[1], "last": count - 1}, page


def positions(call: Call) -> Members:
    """PositionParams."""
    return members(common.position_operands(call), "PositionParams")


def bias(call: Call, bias: Bias, rows: int, columns: int) -> tuple[Members, BiasConstants]:
    """BiasParams of one bias of the plan; `rows` x `columns` logits share bounds of a profile (a warp's tile)."""
    found = common.bias_operands(call, bias, rows, columns)
    operands = OperandConstants(
        has_slope=found.slope is not None,
        signed=found.signed,
        has_table=found.table is not None,
        has_profile=found.psi is not None,
        knots=max(1, found.num_knots),
        dense=0 if found.dense is None else _DENSE[found.dense.dtype],
    )
    return members(found, "BiasParams"), BiasConstants(operands, found.linear, found.bounds_block)


def angles(cos: Tensor | None, sin: Tensor | None) -> Members:
    """AngleParams of one side; null where there is nothing to rotate."""
    if cos is None or sin is None:
        return {}
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    return {"cos": cos, "sin": sin, "batch": 0 if cos.shape[0] == 1 else cos.stride(0)}


def pairs(rotary: Rotary | None) -> PairConstants:
    if rotary is None:
        return PairConstants(interleaved=False, half=1)
    return PairConstants(rotary.interleaved, rotary.q_cos.shape[-1])


def dropout(call: Call) -> Members:
    """DropoutParams; empty if there is none."""
    found = common.dropout_operands(call)
    return {} if found is None else members(found, "DropoutParams")


def members(operands: Any, struct: str) -> Members:
    """The members of a struct of params.h, from operands that have them by the same names."""
    found = {name: getattr(operands, name) for name in params.names(struct)}
    return {name: _named(value) if name.endswith("_strides") else value for name, value in found.items()}


def element(call: Call) -> ElementConstants:
    dim, dim_v = -(-call.q.shape[3] // 8) * 8, -(-call.v.shape[3] // 8) * 8
    return ElementConstants(call.q.dtype == torch.bfloat16, dim, dim_v)
