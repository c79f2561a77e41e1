"""Asserts the tolerance rule of posattn.parity on one call, and shows the worst coordinates of what breaks it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import posattn
from posattn.encodings.base import Encoding
from posattn.parity import Comparison, compare, measure


def assert_parity(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Encoding | None = None,
    options: Mapping[str, Any] | None = None,
    backend: str = "auto",
    seed: int = 0,
) -> None:
    """Output, log-sum-exp and every gradient of attention() on `backend` keep the rule."""
    _assert_kept(measure(q, k, v, position, options, backend, seed))


def assert_forward_parity(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Encoding | None = None,
    options: Mapping[str, Any] | None = None,
    backend: str = "auto",
) -> None:
    """Output and log-sum-exp alone, of a call without gradients."""
    options = dict(options or {})
    exact_options = {name: _double(value) for name, value in options.items()}
    exact_position = None if position is None else copy.deepcopy(position).double()

    def run(backend: str, tensors: tuple[Tensor, ...], position: Encoding | None, options: Mapping[str, Any]) -> Any:
        torch.manual_seed(5)  # of dropout
        with torch.no_grad():
            return posattn.attention(*tensors, position, return_lse=True, backend=backend, **options)

    got = run(backend, (q, k, v), position, options)
    naive = run("reference", (q, k, v), position, options)
    exact = run("reference", (q.double(), k.double(), v.double()), exact_position, exact_options)
    none = torch.zeros(1, device=q.device)
    _assert_kept([compare(name, *results, none, q.dtype) for name, *results in zip(("out", "lse"), got, naive, exact)])


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _assert_kept(found: list[Comparison]) -> None:
    broken = [comparison for comparison in found if not comparison.ok]
    if broken:
        lines = [f"{c.name}: error {c.error:.3g}, allowed {c.allowed:.3g} (naive {c.naive_error:.3g})" for c in broken]
        raise AssertionError("\n".join(["outside the tolerance rule", *lines, *(c.worst for c in broken)]))
