"""No number without parity: every contender agrees with a float64 reference before it is timed.

The rule is the test suite's: an error at most twice that of naive PyTorch in the same dtype, plus a few roundings.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import posattn

from .cases import Case, Variant
from .peers import Contender, contender, make_inputs

SHORT = 193  # odd, and past every tile size: where all gradients are compared
ROWS = 64  # the last ones, at full length: where outputs are compared
ROUNDINGS = 8


def short_differs(variant: Variant, case: Case, device: str) -> str | None:
    """What is wrong at a short length, outputs and all gradients, or None. Raises Unavailable as `contender` does."""
    q_len = min(case.q_len, SHORT)
    k_len = q_len if case.q_len == case.k_len else min(case.k_len, SHORT)
    small = replace(case, q_len=q_len, k_len=k_len, batch=1)
    got = _results(contender(replace(variant, length=None), small, device), small)
    naive = _results(contender(Variant("eager", variant.encoding), small, device), small)
    exact = _results(_exact(variant.encoding, small, device), small)
    # The fourth leaf of SDPA with a trained mask is the mask, where the reference has the encoding's parameters.
    count = 4 if variant.peer == "sdpa-mask-grad" else len(exact)
    for index, (g, n, e) in enumerate(zip(got[:count], naive, exact)):
        wrong = _compare(g, n, e, small.dtype)
        if wrong:
            name = ("out", "dq", "dk", "dv")[index] if index < 4 else f"gradient of parameter {index - 4}"
            return f"{name}: {wrong}"
    return None


def outputs_differ(variant: Variant, case: Case, device: str, out: Tensor) -> str | None:
    """What is wrong with the last rows of `out`, the variant's output on the whole of `case`, or None."""
    shape = case.shaped(variant)
    rows = min(ROWS, shape.q_len)
    inputs = make_inputs(shape, variant.encoding, device)

    @torch.no_grad()
    def attend(dtype: torch.dtype) -> Tensor:
        q, k, v = (x.to(dtype) for x in (inputs.q[:, :, -rows:], inputs.k, inputs.v))
        return posattn.attention(q, k, v, inputs.position, causal=case.causal, backend="reference")

    return _compare(out[:, :, -rows:], attend(out.dtype), attend(torch.float64), case.dtype)


def _exact(encoding: str, case: Case, device: str) -> Contender:
    """Naive PyTorch in float64 on the very values of the narrower inputs."""
    inputs = make_inputs(case, encoding, device)
    q, k, v = (x.detach().double().requires_grad_(x.requires_grad) for x in (inputs.q, inputs.k, inputs.v))
    position = None if inputs.position is None else inputs.position.double()
    parameters = () if position is None else (p for p in position.parameters() if p.requires_grad)

    def forward() -> Tensor:
        return posattn.attention(q, k, v, position, causal=case.causal, backend="reference")

    return Contender(forward, (q, k, v, *parameters), inputs.grad_out.double())


def _results(ready: Contender, case: Case) -> list[Tensor | None]:
    if case.mode == "forward":
        with torch.no_grad():
            return [ready.forward()]
    out = ready.forward()
    return [out.detach(), *ready.backward(out)]


def _compare(got: Tensor | None, naive: Tensor | None, exact: Tensor | None, dtype: str) -> str | None:
    if exact is None or naive is None or got is None:
        return None if exact is None or not exact.any() else "expected a gradient, got None"
    if not got.isfinite().all():
        return "expected finite values, got some that are not"
    scale = exact.abs().max().item()
    error = (got.double() - exact).abs().max().item()
    naive_error = (naive.double() - exact).abs().max().item()
    allowed = 2.0 * naive_error + ROUNDINGS * torch.finfo(getattr(torch, dtype)).eps * scale
    return None if error <= allowed else f"error {error:.2e}, at most {allowed:.2e} allowed (naive {naive_error:.2e})"
