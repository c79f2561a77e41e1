"""Which pairs of spans a rank computes in each step of a ring, and how many it does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from posattn.distributed import blocks
from posattn.distributed.blocks import Block, Settings
from posattn.distributed.group import Group
from posattn.distributed.layout import Span, spans
from posattn.distributed.reach import Reach
from posattn.encodings.base import Encoding


@dataclass
class Pairs:
    """Pairs of a span of queries and one of keys, of this rank.

    Attributes:
        computed: those that kernels were called for.
        masked: those that the mask, the window or the documents leave empty.
        out_of_reach: those whose bias has fallen so far that all of it is below rounding.
    """

    computed: int = 0
    masked: int = 0
    out_of_reach: int = 0


_counting: list[Pairs] = []


@contextmanager
def count_pairs() -> Iterator[Pairs]:
    """Counts the pairs of the ring's forward passes in its body; their backward passes take the same ones.

        with count_pairs() as pairs:
            out = attention(q, k, v, posattn.ALiBi(12), causal=True, method="ring")
        print(pairs.out_of_reach)

    Yields:
        Pairs of this rank, counted up as calls are made; a call of one layer has at most 4 P of them.
    """
    pairs = Pairs()
    _counting.append(pairs)
    try:
        yield pairs
    finally:
        _counting[:] = [other for other in _counting if other is not pairs]


class Schedule:
    """The pairs of each step, in which this rank has the keys of the rank `step` before it. `steps` is how many steps
    any rank has pairs in: nothing is passed on after them."""

    def __init__(
        self, group: Group, layout: str, settings: Settings, position: Encoding | None, q: Tensor, k: Tensor
    ) -> None:
        self.settings, self.device = settings, q.device
        rank, ranks, tokens = group.rank(), group.size(), q.shape[2]
        mine = spans(layout, tokens, rank, ranks)
        found = [
            [(a, b, at) for a in mine for at, b in enumerate(spans(layout, tokens, (rank - step) % ranks, ranks))]
            for step in range(ranks)
        ]
        seen = [[pair for pair in step if self.block(*pair[:2]) is not None] for step in found]
        in_reach = seen
        if settings.falls and ranks > 1:
            assert position is not None
            reach = Reach(group, position, settings, q, k, mine)
            asked = [(step, pair) for step in range(ranks) for pair in seen[step]]
            # One look at the device for all of them.
            out = [reach.is_out(a, b, reach.of_keys[(rank - step) % ranks][at]) for step, (a, b, at) in asked]
            gone = {pair[:2] for (_, pair), is_out in zip(asked, torch.stack(out).tolist()) if is_out}
            in_reach = [[pair for pair in step if pair[:2] not in gone] for step in seen]
        self.pairs = [[(a, b) for a, b, _ in step] for step in in_reach]
        self.steps = self._steps(layout, tokens, ranks)
        total, unmasked, computed = (sum(map(len, pairs)) for pairs in (found, seen, in_reach))
        for pairs in _counting:
            pairs.computed += computed
            pairs.masked += total - unmasked
            pairs.out_of_reach += unmasked - computed

    def blocks(self, step: int) -> Iterator[Block]:
        for queries, keys in self.pairs[step]:
            block = self.block(queries, keys)
            assert block is not None
            yield block

    def block(self, queries: Span, keys: Span) -> Block | None:
        return blocks.block_of(queries, keys, self.settings, self.device)

    def _steps(self, layout: str, tokens: int, ranks: int) -> int:
        if layout != "contiguous" or self.settings.documents is not None:
            return ranks  # a zigzag's neighbours are in both directions
        # Whether a pair sees anything goes by how far apart its shards are: `step`, or step - P past the ring's end.
        whole = [spans(layout, tokens, rank, ranks)[0] for rank in range(ranks)]
        used = [
            step
            for step in range(ranks)
            if self.block(whole[-1], whole[ranks - 1 - step]) is not None
            or (step and self.block(whole[0], whole[ranks - step]) is not None)
        ]
        return used[-1] + 1
