"""The tolerance rule that `posattn check`, posattn.check and the tests share, and what they measure by it.

The rule: a result's error against a float64 reference is at most twice that of naive PyTorch in the same dtype, plus a
few roundings of its scale. It is never a bare tolerance.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posattn import backends, encodings
from posattn.attention import attention
from posattn.encodings.base import Encoding
from posattn.plan import Bias, Call, Mask, Plan

# Summing in another order moves a float32 result by a few ulp even where naive PyTorch happens to be exact. Narrower
# results are sums in float32 too, rounded once.
SUMMATION_ULPS = 4.0


@dataclass(frozen=True)
class Comparison:
    """One result beside naive PyTorch's.

    name says which; error and naive_error are the largest ones against float64, allowed is the largest that passes, and
    worst says where the error lies and what stands there.
    """

    name: str
    error: float
    naive_error: float
    allowed: float
    worst: str

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # False for NaN too


def compare(
    name: str, got: Tensor, naive: Tensor, exact: Tensor, sensitivity: Tensor, dtype: torch.dtype
) -> Comparison:
    """The rule on one tensor, called `name` in the result: `got` beside `naive` PyTorch's and float64's `exact` one.

    `sensitivity` is how far roundings on the way move it, in units of rounding(dtype).

    Infinities (the log-sum-exp of an empty row) must be in the same places, and NaN or a wrong shape is an error of
    infinity.
    """
    if got.shape != exact.shape:
        return Comparison(name, torch.inf, 0.0, 0.0, f"shape {list(got.shape)}, expected {list(exact.shape)}")
    if not exact.numel():
        return Comparison(name, 0.0, 0.0, 0.0, "empty")
    errors = _errors(got, exact)
    naive_error = _errors(naive, exact).nan_to_num(posinf=0.0).max().item()
    scale = torch.where(exact.isfinite(), exact, 0.0).abs().max().item()
    place = tuple(int(i) for i in torch.unravel_index(errors.argmax(), errors.shape))
    allowed = 2.0 * naive_error + rounding(got.dtype) * scale + rounding(dtype) * sensitivity.max().item()
    worst = (
        f"{name}{list(place)}: got {got[place].item():.9g}, expected {exact[place].item():.9g}, "
        f"naive {naive[place].item():.9g}; {int((errors > allowed).sum())} of {errors.numel()} beyond the limit"
    )
    return Comparison(name, errors.max().item(), naive_error, allowed, worst)


def rounding(dtype: torch.dtype) -> float:
    """The rounding to expect of a result of size one."""
    return max(torch.finfo(dtype).eps, SUMMATION_ULPS * torch.finfo(torch.float32).eps)


def _errors(got: Tensor, exact: Tensor) -> Tensor:
    errors = (got.double() - exact).abs()
    return torch.where(got.double() == exact, 0.0, errors).nan_to_num(nan=torch.inf, posinf=torch.inf)


def measure(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Encoding | None = None,
    options: Mapping[str, Any] | None = None,
    backend: str = "auto",
    seed: int = 0,
) -> list[Comparison]:
    """attention() on `backend` beside naive PyTorch: its output, its log-sum-exp, and all its gradients.

    Gradients are those of q, k and v, of every parameter of `position`, and of a bias or sinks among `options`, which
    are attention's keywords. The gradients that they start from, and any dropout, are drawn from `seed`.
    """
    options = dict(options or {})
    generator = torch.Generator().manual_seed(seed)
    exact_run = _Run(q.double(), k.double(), v.double(), _double(position), _double_options(options), "reference", seed)
    grad_out = torch.randn(exact_run.out.shape, generator=generator).to(q.device, q.dtype)
    grad_lse = torch.randn(exact_run.lse.shape, generator=generator).to(q.device)
    grad_lse.masked_fill_(exact_run.lse.isinf(), 0.0)

    exact = exact_run.results(grad_out.double(), grad_lse.double())
    sensitivity = exact_run.sensitivity(grad_out.double(), grad_lse.double(), q.dtype, generator)
    naive = _Run(q, k, v, position, options, "reference", seed).results(grad_out, grad_lse)
    got = _Run(q, k, v, position, options, backend, seed).results(grad_out, grad_lse)
    return [compare(name, got[name], naive[name], exact[name], sensitivity[name], q.dtype) for name in exact]


class _Run:
    """One attention call on fresh leaves."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: Encoding | None,
        options: dict[str, Any],
        backend: str,
        seed: int,
    ) -> None:
        self.leaves = {name: _leaf(x) for name, x in (("q", q), ("k", k), ("v", v))}
        options = dict(options)
        for name in ("bias", "sinks"):
            if options.get(name) is not None:
                self.leaves[name] = options[name] = _leaf(options[name])
        if position is not None:
            self.leaves.update((n, p) for n, p in position.named_parameters() if p.requires_grad)
        self.dropout_p = options.get("dropout_p", 0.0)
        torch.manual_seed(seed)
        self.out: Tensor
        self.lse: Tensor
        self.out, self.lse = attention(
            self.leaves["q"],
            self.leaves["k"],
            self.leaves["v"],
            position,
            **options,
            backend=backend,
            return_lse=True,
        )

    def results(self, grad_out: Tensor, grad_lse: Tensor) -> dict[str, Tensor]:
        outputs, grads = (self.out, self.lse), (grad_out, grad_lse.to(self.lse.dtype))
        return {"out": self.out.detach(), "lse": self.lse.detach(), **self._gradients(outputs, grads)}

    def sensitivity(
        self, grad_out: Tensor, grad_lse: Tensor, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """How far roundings of each row's intermediates move each result, in units of rounding(dtype).

        A logit or log-sum-exp is off by its own size times eps, which scales row i of the softmax by 1 + eps lse_i: as
        scaling the output does, and in the backward the gradients of output and log-sum-exp. The row sum dO . O is off
        by its terms' size times eps, which adds P_ij e_i to the logits' gradient: as a gradient of the log-sum-exp
        does. These are the errors to expect where logits are in the hundreds, and where the gradient itself cancels,
        in a row with one key for instance.
        """
        v = self.leaves["v"].detach()
        group = self.out.shape[1] // max(v.shape[1], 1)  # a call without heads has no groups
        v = v.repeat_interleave(group, 1).nan_to_num(0.0).abs() / (1.0 - self.dropout_p)
        reach = (grad_out.abs() * v.amax(2, keepdim=True)).sum(-1) if v.shape[2] else torch.zeros_like(grad_lse)
        # Logits are float32 whatever q is, and one eps of their size is two roundings.
        relative = torch.finfo(torch.float32).eps / rounding(dtype)
        size = relative * self.lse.detach().masked_fill(self.lse.isinf(), 0.0).abs()
        rows, reach = size[..., None] * grad_out, reach + (1.0 + size) * grad_lse.abs()
        draws = []
        for _ in range(2):  # the signs of one draw may cancel by chance
            signs = torch.randint(2, reach.shape, generator=generator).to(reach) * 2 - 1
            draws.append(self._gradients((self.out, self.lse), (rows * signs[..., None], reach * signs)))
        moved = {name: torch.maximum(draws[0][name].abs(), draws[1][name].abs()) for name in draws[0]}
        return {"out": size[..., None] * self.out.detach().abs(), "lse": torch.zeros(1), **moved}

    def _gradients(self, outputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> dict[str, Tensor]:
        found = torch.autograd.grad(outputs, tuple(self.leaves.values()), grads, allow_unused=True, retain_graph=True)
        return {
            f"d{name}": torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(self.leaves.items(), found)
        }


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _double(position: Encoding | None) -> Encoding | None:
    return None if position is None else copy.deepcopy(position).double()


def _double_options(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    }


def examples(num_heads: int, head_dim: int, tokens: int, every: bool = False) -> dict[str, Encoding]:
    """Every exported encoding, in the variants that its class shows, for calls of at most `tokens` tokens; with `every`
    those too that no kernel computes."""
    found: dict[str, Encoding] = {}
    for name in encodings.__all__:
        found.update(getattr(encodings, name).examples(num_heads, head_dim, tokens))
    return found if every else {name: encoding for name, encoding in found.items() if encoding.fused}


def positions_for(position: Encoding | None, q_len: int, k_len: int) -> dict[str, Any]:
    """Explicit positions for an encoding that needs them: segments of three tokens."""
    if position is None or not position.needs_positions:
        return {}
    k_positions = torch.arange(k_len) // 3
    q_positions = (torch.arange(q_len) + max(k_len - q_len, 0)) // 3
    return {"q_positions": q_positions, "k_positions": k_positions}


def plain_call(device: str, dtype: torch.dtype = torch.bfloat16) -> Call:
    """The smallest call without an encoding: what a backend that is there at all can run, in the dtype all have."""
    q = torch.zeros(1, 1, 1, 16, device=device, dtype=dtype)
    return Call(q, q, q, Plan(bias=Bias()), Mask(max_q=1, max_k=1), scale=1.0)


def available(device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """The fused backends that run on `device`, in that dtype."""
    call = plain_call(device, dtype)
    return [name for name in backends.FUSED if backends.reason_against(name, call) is None]
