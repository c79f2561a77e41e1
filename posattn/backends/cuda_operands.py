"""A Call as what CUDA kernels share: member structs of csrc/cuda/params.h by name, and compile-time constants.

How a mask, a bias or a seed becomes numbers is the same for every GPU backend, and is in posattn.kernels.operands.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from posattn.backends.cuda_compile import Constant
from posattn.backends.strides import steps
from posattn.kernels import operands
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


def pair_strides(x: Tensor) -> Members:
    """PairStrides of a [B, H, Tq, Tk] tensor whose dimensions of size 1 serve every index."""
    return dict(zip(("batch", "head", "query", "key"), steps(x)))


def shape(call: Call, block_m: int, block_n: int) -> Members:
    """ShapeParams."""
    return {
        "heads": call.q.shape[1],
        "group": call.q.shape[1] // call.k.shape[1],
        "q_tokens": call.q.shape[2],
        "k_tokens": call.k.shape[2],
        "q_blocks": -(-operands.q_max(call) // block_m),
        "k_blocks": -(-operands.k_max(call) // block_n),
    }


def mask(call: Call) -> tuple[Members, Constants]:
    """MaskParams."""
    found = operands.mask_arguments(call)
    values = found.values
    members = {
        "k_lengths": call.mask.k_lengths,
        "cu_q": call.mask.cu_seqlens_q,
        "cu_k": call.mask.cu_seqlens_k,
        "boolean": call.mask.boolean,
        "boolean_strides": {} if call.mask.boolean is None else pair_strides(call.mask.boolean),
        "left": values["left"],
        "right": values["right"],
    }
    constants = {
        **found.constants,
        "HAS_BOOLEAN": call.mask.boolean is not None,
        "HAS_K_LENGTHS": call.mask.k_lengths is not None,
        "PACKED": call.mask.cu_seqlens_q is not None,
    }
    return members, constants


def positions(call: Call) -> tuple[Members, Constants]:
    """PositionParams."""
    values = operands.position_arguments(call)
    members = {
        "q": values["QPositions"],
        "k": values["KPositions"],
        "q_batch": values["stride_qpos"],
        "k_batch": values["stride_kpos"],
    }
    return members, {"EXPLICIT": call.q_positions is not None}


def bias(call: Call, bias: Bias, rows: int, columns: int) -> tuple[Members, Constants]:
    """BiasParams of one bias of the plan; `rows` x `columns` logits share bounds of a profile (a warp's tile)."""
    found = operands.bias_arguments(call, bias, rows, columns)
    values = found.values
    members = {
        "slope": values["Slope"],
        "slope_batch": values["stride_slope_b"],
        "table": values["Table"],
        "table_head": values["stride_table_h"],
        "psi": values["Psi"],
        "psi_bounds": values["PsiBounds"],
        "row_scale": values["RowScale"],
        "row_bounds": values["RowBounds"],
        "knots": values["Knots"],
        "segment_slope": values["SegmentSlope"],
        "segment_intercept": values["SegmentIntercept"],
        "dense": values["Dense"],
        "dense_strides": {} if values["Dense"] is None else pair_strides(values["Dense"]),
        **{n: values[n] for n in ("table_first", "table_last", "psi_first", "psi_last", "row_first", "row_last")},
        "num_knots": values["num_knots"],
    }
    dense = values["Dense"]
    constants: Constants = {
        "HAS_SLOPE": bias.slope is not None,
        "SIGNED": bias.slope is not None and bias.slope.signed,
        "LINEAR": found.constants["LINEAR"],  # no visible distance is negative, or the slope keeps its sign
        "HAS_TABLE": bias.table is not None,
        "HAS_PROFILE": bias.profile is not None,
        "KNOTS": max(1, values["num_knots"]),
        "BOUNDS_BLOCK": operands.padded(rows + columns),
        "DENSE": 0 if dense is None else _DENSE[dense.dtype],
    }
    return members, constants


def angles(cos: Tensor | None, sin: Tensor | None) -> Members:
    """AngleParams of one side; null where there is nothing to turn."""
    if cos is None or sin is None:
        return {}
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    return {"cos": cos, "sin": sin, "batch": 0 if cos.shape[0] == 1 else cos.stride(0)}


def dropout(call: Call) -> tuple[Members, Constants]:
    """DropoutParams."""
    values = operands.dropout_arguments(call)
    if values["threshold"] is None:
        return {}, {"HAS_DROPOUT": False}
    bits = {name: values[given] & 0xFFFFFFFF for name, given in _RANDOM.items()}
    return {**bits, "keep_scale": values["keep_scale"]}, {"HAS_DROPOUT": True}


_RANDOM = {"threshold": "threshold", "key_low": "seed_lo", "key_high": "seed_hi"}


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
