"""No number without parity: every contender agrees with a float64 reference before it is timed, by parity.py's rule."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import posattn
from posattn import parity

from .cases import Case, Variant
from .peers import make_inputs

SHORT = 193  # odd, and past every tile size: where posattn's gradients are compared
ROWS = 64  # the last ones, at full length: where everybody's outputs are compared


def posattn_differs(variant: Variant, case: Case, device: str) -> str | None:
    """What is wrong at a short length with posattn's outputs and gradients, of all parameters too, or None."""
    q_len, k_len = min(case.q_len, SHORT), min(case.k_len, SHORT)
    inputs = make_inputs(replace(case, batch=1, q_len=q_len, k_len=k_len, mode="both"), variant.encoding, device)
    comparisons = parity.measure(
        inputs.q, inputs.k, inputs.v, inputs.position, {"causal": case.causal}, backend=variant.backend
    )
    return _first_wrong(comparisons)


def outputs_differ(variant: Variant, case: Case, device: str, out: Tensor) -> str | None:
    """What is wrong with the last rows of `out`, the variant's output on the whole of `case`, or None."""
    shape = case.shaped(variant)
    rows = min(ROWS, shape.q_len)
    inputs = make_inputs(shape, variant.encoding, device)

    @torch.no_grad()
    def attend(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        q, k, v = (x.to(dtype) for x in (inputs.q[:, :, -rows:], inputs.k, inputs.v))
        return posattn.attention(q, k, v, inputs.position, causal=case.causal, backend="reference", return_lse=True)

    (exact, lse), (naive, _) = attend(torch.float64), attend(out.dtype)
    # A rounding of a row's log-sum-exp, float32 in every backend, scales the row.
    sensitivity = torch.finfo(torch.float32).eps / parity.rounding(out.dtype) * lse.abs()[..., None] * exact.abs()
    return _first_wrong([parity.compare("out", out[:, :, -rows:], naive, exact, sensitivity, out.dtype)])


def _first_wrong(comparisons: list[parity.Comparison]) -> str | None:
    for comparison in comparisons:
        if not comparison.ok:
            return f"{comparison.worst}; error {comparison.error:.2e}, at most {comparison.allowed:.2e} allowed"
    return None
