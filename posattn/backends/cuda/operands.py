"""A Call as what CUDA kernels share: member structs of csrc/cuda/params.h by name, and compile-time constants.

How a mask, a bias or a seed becomes numbers is the same for every GPU backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from posattn.backends.common import operands as common
from posattn.backends.cuda import params
from posattn.backends.cuda.compiler import Constant
from posattn.plan import Bias, Call

HEAD_DIMS = (32, 64, 96, 128, 192, 256)
DTYPES = (torch.float16, torch.bfloat16)

_DENSE = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}  # enum DenseType of dense.h

Members = dict[str, Any]
Constants = dict[str, Constant]


def padded(dim: int) -> int:
    """The head dimension of the kernels that serves `dim`."""
    return min(d for d in HEAD_DIMS if d >= dim)


def in_chunks(x: Tensor) -> Tensor:
    """x [B, H, T, D] itself if 16-byte copies can read its rows, else a copy that they can, zeros up to D % 8 == 0."""
    aligned = x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s, n in zip(x.stride()[:3], x.shape[:3]) if n > 1)
    if x.shape[-1] % 8 == 0 and x.stride(-1) == 1 and aligned:
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
        "k_tokens": call.k.shape[2],
        "q_blocks": -(-common.q_max(call) // block_m),
        "k_blocks": -(-common.k_max(call) // block_n),
    }


def mask(call: Call) -> tuple[Members, Constants]:
    """MaskParams."""
    found = common.mask_operands(call)
    constants: Constants = {
        "HAS_LEFT": found.has_left,
        "HAS_RIGHT": found.has_right,
        "TOP_LEFT": found.top_left,
        "HAS_BOOLEAN": found.boolean is not None,
        "HAS_K_LENGTHS": found.k_lengths is not None,
        "PACKED": found.cu_q is not None,
    }
    return members(found, "MaskParams"), constants


def positions(call: Call) -> tuple[Members, Constants]:
    """PositionParams."""
    return members(common.position_operands(call), "PositionParams"), {"EXPLICIT": call.q_positions is not None}


def bias(call: Call, bias: Bias, rows: int, columns: int) -> tuple[Members, Constants]:
    """BiasParams of one bias of the plan; `rows` x `columns` logits share bounds of a profile (a warp's tile)."""
    found = common.bias_operands(call, bias, rows, columns)
    constants: Constants = {
        "HAS_SLOPE": found.slope is not None,
        "SIGNED": found.signed,
        "LINEAR": found.linear,  # no visible distance is negative, or the slope keeps its sign
        "HAS_TABLE": found.table is not None,
        "HAS_PROFILE": found.psi is not None,
        "KNOTS": max(1, found.num_knots),
        "BOUNDS_BLOCK": found.bounds_block,
        "DENSE": 0 if found.dense is None else _DENSE[found.dense.dtype],
    }
    return members(found, "BiasParams"), constants


def angles(cos: Tensor | None, sin: Tensor | None) -> Members:
    """AngleParams of one side; null where there is nothing to turn."""
    if cos is None or sin is None:
        return {}
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    return {"cos": cos, "sin": sin, "batch": 0 if cos.shape[0] == 1 else cos.stride(0)}


def dropout(call: Call) -> tuple[Members, Constants]:
    """DropoutParams."""
    found = common.dropout_operands(call)
    if found is None:
        return {}, {"HAS_DROPOUT": False}
    return members(found, "DropoutParams"), {"HAS_DROPOUT": True}


def members(operands: Any, struct: str) -> Members:
    """The members of a struct of params.h, from operands that have them by the same names."""
    found = {name: getattr(operands, name) for name in params.names(struct)}
    return {name: _named(value) if name.endswith("_strides") else value for name, value in found.items()}


def element(call: Call) -> Constants:
    """The element type and the head dimensions, as given (in chunks of 8) and as the kernels pad them."""
    dim, dim_v = -(-call.q.shape[3] // 8) * 8, -(-call.v.shape[3] // 8) * 8
    return {
        "BF16": call.q.dtype == torch.bfloat16,
        "DIM": dim,
        "DIM_V": dim_v,
        "HEAD_DIM": padded(dim),
        "HEAD_DIM_V": padded(dim_v),
    }


def natural(call: Call) -> bool:
    """Whether logits are formed before the softmax; else the scale is folded into its exponent."""
    return bool(call.plan.bias) or call.softcap != 0.0 or call.scale <= 0.0
