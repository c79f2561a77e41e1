"""Bit patterns in and out of snippets, for tests that compare bit for bit."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from .kernel import Options
from .snippet import snippet

_STORAGE = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


def tensor(bits: Sequence[int], width: int) -> torch.Tensor:
    """Bit patterns as a tensor of an integer type of that width."""
    signed = [value - (1 << width) if width > 8 and value >> (width - 1) else value for value in bits]
    return torch.tensor(signed, dtype=_STORAGE[width])


def patterns(result: torch.Tensor) -> list[int]:
    """The elements of `result` as unsigned bit patterns."""
    width = 8 * result.element_size()
    return [value & ((1 << width) - 1) for value in result.view(_STORAGE[width]).tolist()]


def as_signed(value: int, width: int) -> int:
    return value - (1 << width) if value >> (width - 1) else value


def integers(width: int, count: int = 256) -> list[int]:
    """Random patterns with the edges of the signed and unsigned ranges among them."""
    top = 1 << (width - 1)
    edges = [0, 1, 2, 3, 7, 100, top - 1, top, 2 * top - 2, 2 * top - 1]
    return [random.choice(edges) if random.random() < 0.4 else random.getrandbits(width) for _ in range(count)]


def run(
    body: str,
    operands: Sequence[tuple[Sequence[int], int]],
    width: int,
    *,
    declare: str = "",
    options: Options | None = None,
) -> list[int]:
    """Runs `body` on operands given as (patterns, width); returns the patterns of %d0."""
    out = torch.zeros(len(operands[0][0]), dtype=_STORAGE[width])
    snippet(body, [tensor(values, w) for values, w in operands], [out], declare=declare, options=options)
    return patterns(out)
