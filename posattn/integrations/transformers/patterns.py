"""What a mask function of transformers says: causal, a window, packed documents; None where it says anything else.

transformers builds a mask from a function of (batch, head, query, key). Those of its own factories are read here from
their closures. A factory is believed only if what is read agrees with what it computes on a small grid, which is looked
at once a process: after a change of transformers a mask is dense, never wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

MaskFunction = Callable[[Any, Any, Any, Any], Any]


@dataclass(frozen=True)
class Pattern:
    """Which keys a query sees; all conditions hold together. Distances count from query to key.

    left and right bound a window: query - left <= key <= query + right. documents [B, T] numbers the document of each
    token; a query sees its own alone.
    """

    causal: bool = False
    left: int | None = None
    right: int | None = None
    documents: Tensor | None = None

    def holds(self, query: Tensor, key: Tensor, rows: Tensor) -> Tensor:
        """bool, broadcast of query and key positions and rows of the batch."""
        seen = torch.ones((), dtype=torch.bool, device=query.device) & (query == query) & (key == key)
        if self.causal:
            seen = seen & (key <= query)
        if self.left is not None:
            seen = seen & (key >= query - self.left)
        if self.right is not None:
            seen = seen & (key <= query + self.right)
        if self.documents is not None:
            seen = seen & (self.documents[rows, query] == self.documents[rows, key])
        return seen


def read_pattern(function: MaskFunction) -> Pattern | None:
    """The pattern of a mask function that transformers made itself; None of any other."""
    found = _read(function)
    return found if found is None or torch.compiler.is_compiling() or _trusted() else None


def _read(function: MaskFunction) -> Pattern | None:
    if function is masking_utils.causal_mask_function:
        return Pattern(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return Pattern()
    if torch.compiler.is_compiling():
        return None  # the closure of a function made while tracing cannot be read
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return None
    factory = getattr(function, "__qualname__", "").partition(".")[0]
    cells = _cells(function)
    if factory == "sliding_window_overlay" and isinstance(cells.get("sliding_window"), int):
        return Pattern(left=cells["sliding_window"] - 1)
    if factory == "sliding_window_bidirectional_overlay" and isinstance(cells.get("sliding_window"), int):
        return Pattern(left=cells["sliding_window"], right=cells["sliding_window"])
    if factory == "packed_sequence_mask_function" and isinstance(cells.get("packed_sequence_mask"), Tensor):
        return Pattern(documents=cells["packed_sequence_mask"])
    if factory == "remap_positions_for_packed_sequence" and callable(cells.get("mask_function")):
        return _remapped(cells["mask_function"])
    if factory == "and_masks" and isinstance(cells.get("mask_functions"), tuple):
        return _both([_read(part) for part in cells["mask_functions"]])
    return None


def _remapped(function: MaskFunction) -> Pattern | None:
    """Positions that count inside documents: inside one, distances are the same, and others are hidden anyway."""
    return _read(function)


def _both(parts: list[Pattern | None]) -> Pattern | None:
    whole = Pattern()
    for part in parts:
        if part is None or (part.documents is not None and whole.documents is not None):
            return None
        whole = replace(
            whole,
            causal=whole.causal or part.causal,
            left=_closer(whole.left, part.left),
            right=_closer(whole.right, part.right),
            documents=whole.documents if part.documents is None else part.documents,
        )
    return whole


def _closer(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _cells(function: MaskFunction) -> dict[str, Any]:
    code, closure = getattr(function, "__code__", None), getattr(function, "__closure__", None) or ()
    return dict(zip(code.co_freevars, (cell.cell_contents for cell in closure))) if code is not None else {}


@functools.cache
def _trusted() -> bool:
    """Whether every factory computes what is read of it here."""
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]])
    packed = masking_utils.packed_sequence_mask_function(documents)
    window = masking_utils.sliding_window_causal_mask_function(2)
    samples = [
        masking_utils.causal_mask_function,
        masking_utils.bidirectional_mask_function,
        window,
        masking_utils.sliding_window_bidirectional_mask_function(1),
        masking_utils.and_masks(masking_utils.remap_positions_for_packed_sequence(window, positions), packed),
    ]
    rows, index = torch.arange(2)[:, None, None, None], torch.arange(6)
    query, key = index[:, None], index[None, :]
    for sample in samples:
        pattern = _read(sample)
        if pattern is None:
            return False
        computed = torch.as_tensor(sample(rows, torch.zeros_like(rows), query, key))
        if not torch.equal(computed.expand(2, 1, 6, 6), pattern.holds(query, key, rows).expand(2, 1, 6, 6)):
            return False
    return True
