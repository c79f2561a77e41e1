"""Which backend runs a call: a named one or its reason not to, or the first that can with "auto".

A fused backend is a module with `unsupported(call) -> reason | None`, `forward` and `backward` (see posattn/plan.py for
what they are given). One whose backward pass runs fewer calls than its forward pass says so in `unsupported_backward`.
`unsupported_pages` likewise says why keys in pages have to be gathered for it, and a module without that reads none.
One that does worse than another for some calls says so in `gives_way`. Each is imported when first asked for, and one
that fails to import has that failure as its reason. The backend named "reference" is no such module: it is
posattn.reference, plain PyTorch that autograd and torch.compile see through, so ops.py calls it by itself.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Protocol, cast

import torch
from torch import Tensor

from posattn.errors import ArgumentValueError
from posattn.plan import Call

FUSED = ("cpu", "cuda", "triton")
NAMES = (*FUSED, "reference")

# What "auto" tries on each device, in order. CUDA's kernels take fewer cycles than Triton's for the same call
# (docs/lab/cuda.md, docs/lab/triton.md); Triton's run what they refuse: float32, AMD's GPUs, a machine without
# cuda.core.
_AUTO = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


class Backend(Protocol):
    """What a backend module offers. `backward` returns the gradients named in `needs`, float32 for parameters."""

    def unsupported(self, call: Call) -> str | None: ...

    def forward(self, call: Call) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        call: Call,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        needs: frozenset[str],
    ) -> dict[str, Tensor]: ...


@cache
def load(name: str) -> Backend | str:
    """The backend of that name, or why it cannot be imported."""
    try:
        return cast(Backend, importlib.import_module(f"posattn.backends.{name}"))
    except ModuleNotFoundError as error:
        if error.name == f"posattn.backends.{name}":
            return "this version of posattn does not have it"
        return f"it needs {error.name}, which is not installed"
    except ImportError as error:
        return f"it cannot be imported: {error}"


def reason_against(name: str, call: Call) -> str | None:
    """Why the backend of that name cannot run `call`; None if it can."""
    backend = load(name)
    return backend if isinstance(backend, str) else backend.unsupported(call)


def goes_to_reference(call: Call, name: str) -> bool:
    """The reference builds the N x N logits, so "auto" means it for float64 alone, where precision was asked for."""
    return name == "reference" or (name == "auto" and call.q.dtype == torch.float64)


def reason_to_gather(backend: Backend, call: Call) -> str | None:
    """Why keys in pages are gathered for this backend, which runs the call then; None if it reads the block table."""
    reads = getattr(backend, "unsupported_pages", None)
    return "it reads no pages" if reads is None else cast("str | None", reads(call))


def _gives_way(name: str, call: Call, backward: bool) -> bool:
    asks = getattr(load(name), "gives_way", None)
    return asks is not None and bool(asks(call, backward))


def _in_turn(call: Call, backward: bool) -> list[str]:
    """What "auto" tries for a call, or for its backward pass: those that give way to others last."""
    return sorted(_AUTO.get(call.q.device.type, ()), key=lambda name: _gives_way(name, call, backward))


def choose(call: Call, name: str, backward: bool = False) -> Backend:
    """The fused backend that runs `call`. Raises ValueError with every reason if there is none.

    `backward` asks for its backward pass, which with "auto" may be another backend's than the forward pass was.
    """
    candidates = (name,) if name != "auto" else _in_turn(call, backward)
    reasons = []
    for candidate in candidates:
        backend = load(candidate)
        reason = backend if isinstance(backend, str) else backend.unsupported(call)
        if reason is None and backward and hasattr(backend, "unsupported_backward"):
            reason = backend.unsupported_backward(call)
        if reason is None:
            return cast(Backend, backend)
        reasons.append(f"{candidate}: {reason}")
    if name != "auto":
        raise ArgumentValueError(f"backend {name!r} cannot run this call: {reasons[0].partition(': ')[2]}")
    if not candidates:
        reasons.append(f"no backend is written for {call.q.device.type} tensors")
    raise ArgumentValueError(
        f"no fused backend can run this call ({'; '.join(reasons)}); "
        'posattn.attention(..., backend="reference") computes it in plain PyTorch, in memory that grows with Tq * Tk'
    )
