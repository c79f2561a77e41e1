"""Fused kernels in Triton, for NVIDIA and AMD GPUs: what they can run, and both passes of a call. The kernels
themselves are in `posattn.kernels`."""

from __future__ import annotations

import re

import torch
import triton
from torch import Tensor

from posattn.backends.common import mixes, segments
from posattn.backends.triton import attention_backward, attention_forward, headmix_backward, headmix_forward
from posattn.backends.triton import launch as seam
from posattn.backends.triton.arguments import has_unit_stride
from posattn.backends.triton.configs import headmix
from posattn.backends.triton.configs.launch_config import family
from posattn.plan import Call

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 512
# Where tiles of 16 rows of q, k, v and dO at 512 do not fit in a block's memory: AMD's 64 KiB, and, for float32's 129
# KiB, the 99 KB of sm_86 and its like.
MAX_HEAD_DIM_SMALL = 256
# The kernels take tuples and hand them on, which older releases cannot.
OLDEST_TRITON = (3, 6)


def _too_old(triton: str) -> bool:
    """Of a release, whatever follows its first two numbers; builds that have none are taken for new."""
    numbers = re.match(r"(\d+)\.(\d+)", triton)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < OLDEST_TRITON


def unsupported(call: Call) -> str | None:
    """Why these kernels cannot run `call`; None if they can."""
    q, v = call.q, call.v
    if _too_old(triton.__version__):
        return f"it needs Triton {'.'.join(map(str, OLDEST_TRITON))} or later, got {triton.__version__}"
    if not seam.has_device(q.device):
        return f"it needs a CUDA or HIP device, got {q.device.type} tensors"
    if q.dtype not in _DTYPES:
        return f"it computes float16, bfloat16 and float32, got {q.dtype}"
    if (dim := max(q.shape[3], v.shape[3])) > MAX_HEAD_DIM_SMALL:
        of = family(seam.architecture(q.device))
        small = of == "gfx942" or (of == "sm_86" and q.dtype == torch.float32)
        widest = MAX_HEAD_DIM_SMALL if small else MAX_HEAD_DIM
        if dim > widest:
            return f"it takes head dimensions up to {widest} here, got {dim}"
    reason = segments.unsupported(call) or mixes.unsupported_decay(call) or mixes.unsupported(call)
    return reason or headmix.unsupported(call)


def unsupported_pages(call: Call) -> str | None:
    """Why keys in pages are gathered before these kernels run; None if they read through the block table."""
    if call.plan.mix is not None:
        return "a mix of heads reads its keys once a group of heads, in tiles of one run of tokens"
    if not (has_unit_stride(call.k) and has_unit_stride(call.v)):
        return "the last dimension of these pages is not contiguous, and a copy of the pool would be larger"
    return None


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in q.dtype and the log-sum-exp [B, Hq, Tq] float32."""
    return segments.forward(call, _forward)


def backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients named in `needs`, parameters' in float32."""
    return segments.backward(call, out, lse, grad_out, grad_lse, needs, _backward)


def _forward(call: Call) -> tuple[Tensor, Tensor]:
    device = call.q.device
    arch = seam.architecture(device)
    result: tuple[Tensor, Tensor]
    if call.plan.mix is not None:
        result = headmix_forward.forward(call, call.plan.mix, seam.launch, arch)
    else:
        result = attention_forward.forward(call, seam.launch, arch, seam.processors(device))
    return result


def _backward(
    call: Call,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    arch = seam.architecture(call.q.device)
    grads: dict[str, Tensor]
    if call.plan.mix is not None:
        grads = headmix_backward.backward(call, call.plan.mix, out, lse, grad_out, grad_lse, needs, seam.launch, arch)
    else:
        grads = attention_backward.backward(call, out, lse, grad_out, grad_lse, needs, seam.launch, arch)
    return grads
