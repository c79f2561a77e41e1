"""Fused kernels in CUDA C++ for NVIDIA GPUs of compute capability 8.0 and later, compiled at first use."""

from __future__ import annotations

from torch import Tensor

from posattn.backends.common import mixes, segments
from posattn.backends.cuda import (
    attention_backward,
    attention_forward,
    compiler,
    headmix_backward,
    headmix_forward,
    launch,
)
from posattn.backends.cuda.configs import headmix
from posattn.backends.cuda.configs.forward import decode_config
from posattn.backends.cuda.operands import DTYPES, HEAD_DIMS, lies_in_chunks
from posattn.plan import Call


def unsupported(call: Call) -> str | None:
    """Why these kernels cannot run `call`; None if they can."""
    q, v = call.q, call.v
    if not launch.has_device(q.device):
        return f"it needs an NVIDIA GPU, got {q.device.type} tensors"
    if q.dtype not in DTYPES:
        return f"it computes float16 and bfloat16, got {q.dtype}"
    if max(q.shape[3], v.shape[3]) > HEAD_DIMS[-1]:
        return f"it takes head dimensions up to {HEAD_DIMS[-1]}, got {max(q.shape[3], v.shape[3])}"
    reason = segments.unsupported(call) or mixes.unsupported_decay(call) or mixes.unsupported(call)
    if reason is not None:
        return reason
    missing = compiler.missing() or compiler.unsupported(launch.architecture(q.device))
    if missing is not None:
        return missing
    if call.plan.mix is not None:
        return headmix.forward_unsupported(call, call.plan.mix, launch.architecture(q.device))
    return None


# Whose fifth-generation tensor cores these kernels do not use, as Triton's do: theirs are a fraction of its rate.
_BY_TENSOR_MEMORY = ("sm_100", "sm_103")


def gives_way(call: Call, backward: bool) -> bool:
    """Whether "auto" takes another backend for a call, if one runs it. Few queries wait for memory, not for products;
    heads are mixed by small ones, which the older instructions do. Not for a backward pass: Triton's does not run on
    the PTX machine as sm_100 yet (docs/lab/gpu-proof.md has its two faults), and this one is proved."""
    return (
        not backward
        and launch.architecture(call.q.device) in _BY_TENSOR_MEMORY
        and call.plan.mix is None
        and decode_config(call) is None
    )


def unsupported_pages(call: Call) -> str | None:
    """Why keys in pages are gathered before these kernels run; None if they read through the block table."""
    if call.plan.mix is not None:
        return "a mix of heads takes keys and values in tiles of its own, which are packed from one run of tokens"
    if not (lies_in_chunks(call.k) and lies_in_chunks(call.v)):
        return "copies of 16 bytes cannot read these pages, and a copy of the pool would be larger"
    return None


def unsupported_backward(call: Call) -> str | None:
    """Why the backward kernels cannot run a call that the forward kernels can; None if they can."""
    if call.plan.mix is None:
        return None
    return headmix.backward_unsupported(call, call.plan.mix, launch.architecture(call.q.device))


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in q.dtype and the log-sum-exp [B, Hq, Tq] float32."""
    return segments.forward(call, _forward)


def backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients named in `needs`, parameters' in float32."""
    return segments.backward(call, out, lse, grad_out, grad_lse, needs, _backward)


def _forward(call: Call) -> tuple[Tensor, Tensor]:
    if call.plan.mix is not None:
        return headmix_forward.forward(call, call.plan.mix)
    return attention_forward.forward(call)


def _backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, needs: frozenset[str]
) -> dict[str, Tensor]:
    if call.plan.mix is not None:
        return headmix_backward.backward(call, call.plan.mix, out, lse, grad_out, grad_lse, needs)
    return attention_backward.backward(call, out, lse, grad_out, grad_lse, needs)
