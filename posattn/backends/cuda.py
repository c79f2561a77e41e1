"""Fused kernels in CUDA C++ for NVIDIA GPUs of compute capability 8.0 and later, compiled at first use."""

from __future__ import annotations

from torch import Tensor

from posattn.backends import cuda_backward, cuda_compile, cuda_forward, cuda_launch, cuda_mix, cuda_mix_backward
from posattn.backends.cuda_operands import DTYPES, HEAD_DIMS
from posattn.plan import Call


def unsupported(call: Call) -> str | None:
    """Why these kernels cannot run `call`; None if they can."""
    q, v = call.q, call.v
    if not cuda_launch.has_device(q.device):
        return f"it needs an NVIDIA GPU, got {q.device.type} tensors"
    if q.dtype not in DTYPES:
        return f"it computes float16 and bfloat16, got {q.dtype}"
    if max(q.shape[3], v.shape[3]) > HEAD_DIMS[-1]:
        return f"it takes head dimensions up to {HEAD_DIMS[-1]}, got {max(q.shape[3], v.shape[3])}"
    missing = cuda_compile.missing() or cuda_compile.unsupported(cuda_launch.architecture(q.device))
    if missing is not None:
        return missing
    if call.plan.mix is not None:
        return cuda_mix.unsupported(call, call.plan.mix, cuda_launch.architecture(q.device))
    return None


def unsupported_backward(call: Call) -> str | None:
    """Why the backward kernels cannot run a call that the forward kernels can; None if they can."""
    if call.plan.mix is None:
        return None
    return cuda_mix_backward.unsupported(call, call.plan.mix, cuda_launch.architecture(call.q.device))


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in q.dtype and the log-sum-exp [B, Hq, Tq] float32."""
    if call.plan.mix is not None:
        return cuda_mix.forward(call, call.plan.mix)
    return cuda_forward.forward(call)


def backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients named in `needs`, parameters' in float32."""
    if call.plan.mix is not None:
        return cuda_mix_backward.backward(call, call.plan.mix, out, lse, grad_out, grad_lse, needs)
    return cuda_backward.backward(call, out, lse, grad_out, grad_lse, needs)
