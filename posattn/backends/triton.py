"""Fused kernels in Triton, for NVIDIA and AMD GPUs. The kernels and their host side are in `posattn.kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from posattn.backends import launch as seam
from posattn.kernels import attention, gradients
from posattn.plan import Call

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256


def unsupported(call: Call) -> str | None:
    """Why these kernels cannot run `call`; None if they can."""
    q, v = call.q, call.v
    if not seam.has_device(q.device):
        return f"it needs a CUDA or HIP device, got {q.device.type} tensors"
    if q.dtype not in _DTYPES:
        return f"it computes float16, bfloat16 and float32, got {q.dtype}"
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        return f"it takes head dimensions up to {MAX_HEAD_DIM}, got {max(q.shape[3], v.shape[3])}"
    return None


def forward(call: Call) -> tuple[Tensor, Tensor]:
    device = call.q.device
    return attention.forward(call, seam.launch, seam.architecture(device), seam.processors(device))


def backward(
    call: Call,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    return gradients.backward(
        call, out, lse, grad_out, grad_lse, needs, seam.launch, seam.architecture(call.q.device)
    )
