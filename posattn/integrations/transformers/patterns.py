"""What a mask function of transformers says: causal, a window, packed documents; None where it says anything else.

transformers builds a mask from a function of (batch, head, query, key). Those of its own factories are read here from
their closures, or, where torch.compile traces, by running them on symbols (symbols.py). A factory is believed only if
what is read agrees with what it computes on a small grid, which is looked at once a process: after a change of
transformers a mask is dense, never wrong.

Two factories are replaced in transformers by classes whose objects show the documents that they hold to torch.compile,
which shows no closure: where they compute the same, else packed documents are dense.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from posattn.integrations.transformers.symbols import Packed, Remapped, run

MaskFunction = Callable[[Any, Any, Any, Any], Any]


@dataclass(frozen=True)
class Pattern:
    """Which keys a query sees; all conditions hold together. Distances count from query to key.

    left and right bound a window: query - left <= key <= query + right. documents [B, T] numbers the document of each
    token; a query sees its own alone. chunk: so many tokens, from `padding` [B] on, see one another alone; it counts
    `positions` [B, T] if there are some, else indices.
    """

    causal: bool = False
    left: int | None = None
    right: int | None = None
    documents: Tensor | None = None
    chunk: int | None = None
    padding: Tensor | None = None
    positions: Tensor | None = None

    def both(self, other: Pattern) -> Pattern | None:
        """What two patterns allow together; None if that is none."""
        if self.documents is not None and other.documents is not None:
            return None
        if self.chunk is not None and other.chunk is not None:
            return None
        chunked = other if self.chunk is None else self
        return Pattern(
            causal=self.causal or other.causal,
            left=_closer(self.left, other.left),
            right=_closer(self.right, other.right),
            documents=other.documents if self.documents is None else self.documents,
            chunk=chunked.chunk,
            padding=chunked.padding,
            positions=chunked.positions,
        )

    def segments(self, batch: int, tokens: int, device: torch.device) -> Tensor | None:
        """int64 [B, T]: what documents and chunks leave together, for as many queries as keys; None for neither.

        Both are runs: inside a document positions rise one by one.
        """
        if self.chunk is None or self.padding is None:
            return None if self.documents is None else self.documents.expand(batch, -1)
        place = torch.arange(tokens, device=device)[None] if self.positions is None else self.positions
        chunk = (place - self.padding.to(device)[:, None]).div(self.chunk, rounding_mode="floor").expand(batch, tokens)
        begins = chunk[:, 1:] != chunk[:, :-1]
        if self.documents is not None:
            documents = self.documents.expand(batch, tokens)
            begins = begins | (documents[:, 1:] != documents[:, :-1])
        return torch.nn.functional.pad(begins, (1, 0)).cumsum(1)

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
        if self.chunk is not None and self.padding is not None:
            padding = self.padding[rows]
            if self.positions is not None:
                query, key = self.positions[rows, query], self.positions[rows, key]
            seen = seen & ((query - padding) // self.chunk == (key - padding) // self.chunk)
        return seen


def read_pattern(function: MaskFunction) -> Pattern | None:
    """The pattern of a mask function that transformers made itself; None of any other."""
    if torch.compiler.is_compiling():
        own = isinstance(function, (Packed, Remapped)) or function.__module__ == masking_utils.__name__
        return run(function, Pattern) if own else None
    found = _read(function)
    return found if found is None or _trusted() else None


def _read(function: MaskFunction) -> Pattern | None:
    if function is masking_utils.causal_mask_function:
        return Pattern(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return Pattern()
    if isinstance(function, Packed):
        return Pattern(documents=function.documents)
    if isinstance(function, Remapped):
        return _remapped(function)
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return None
    factory = getattr(function, "__qualname__", "").partition(".")[0]
    cells = _cells(function)
    if factory == "sliding_window_overlay" and isinstance(cells.get("sliding_window"), int):
        return Pattern(left=cells["sliding_window"] - 1)
    if factory == "sliding_window_bidirectional_overlay" and isinstance(cells.get("sliding_window"), int):
        return Pattern(left=cells["sliding_window"], right=cells["sliding_window"])
    if factory == "chunked_overlay" and isinstance(cells.get("chunk_size"), int):
        return Pattern(chunk=cells["chunk_size"], padding=cells["left_padding"])
    if factory == "and_masks" and isinstance(cells.get("mask_functions"), tuple):
        return _both([_read(part) for part in cells["mask_functions"]])
    return None


def _remapped(function: Remapped) -> Pattern | None:
    """Positions that count inside documents: inside one, distances are the same, and others are hidden anyway."""
    inner = _read(function.mask_function)
    return inner if inner is None or inner.chunk is None else replace(inner, positions=function.position_ids)


def _both(parts: list[Pattern | None]) -> Pattern | None:
    whole: Pattern | None = Pattern()
    for part in parts:
        whole = None if whole is None or part is None else whole.both(part)
    return whole


def _closer(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _cells(function: MaskFunction) -> dict[str, Any]:
    code, closure = getattr(function, "__code__", None), getattr(function, "__closure__", None) or ()
    return dict(zip(code.co_freevars, (cell.cell_contents for cell in closure))) if code is not None else {}


def adopt() -> None:
    """Replace transformers' two factories of packed documents by ours, each if it takes and computes the same."""
    documents, positions = torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([[0, 1, 0, 1, 2]])
    rows, index = torch.zeros(1, 1, 1, 1, dtype=torch.long), torch.arange(5)
    for name, ours, arguments in (
        ("packed_sequence_mask_function", Packed, (documents,)),
        ("remap_positions_for_packed_sequence", Remapped, (masking_utils.causal_mask_function, positions)),
    ):
        theirs = getattr(masking_utils, name, None)
        if theirs is None or list(inspect.signature(theirs).parameters) != list(inspect.signature(ours).parameters):
            continue
        found = [made(*arguments)(rows, rows, index[:, None], index) for made in (theirs, ours)]
        if torch.equal(*found):
            setattr(masking_utils, name, ours)


adopt()


@functools.cache
def _trusted() -> bool:
    """Whether every factory computes what is read of it here."""
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]])
    packed = Packed(documents)
    window = masking_utils.sliding_window_causal_mask_function(2)
    samples = [
        masking_utils.causal_mask_function,
        masking_utils.bidirectional_mask_function,
        window,
        masking_utils.sliding_window_bidirectional_mask_function(1),
        masking_utils.and_masks(Remapped(window, positions), packed),
        masking_utils.chunked_causal_mask_function(2, torch.tensor([0, 1])),
        masking_utils.and_masks(
            Remapped(masking_utils.chunked_causal_mask_function(2, torch.tensor([0, 0])), positions), packed
        ),
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
