"""Asserts the tolerance rule of posattn.parity on one call, and shows the worst coordinates of what breaks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from posattn.encodings.base import Encoding
from posattn.parity import measure


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
    broken = [c for c in measure(q, k, v, position, options, backend, seed) if not c.ok]
    if broken:
        lines = [f"{c.name}: error {c.error:.3g}, allowed {c.allowed:.3g} (naive {c.naive_error:.3g})" for c in broken]
        raise AssertionError("\n".join(["outside the tolerance rule", *lines, *(c.worst for c in broken)]))
