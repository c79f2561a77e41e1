"""How a sequence lies on the ranks of a group: which tokens a rank holds, as spans of the whole."""

from __future__ import annotations

from dataclasses import dataclass

from posattn.errors import ArgumentValueError

LAYOUTS = ("zigzag", "contiguous")


@dataclass(frozen=True)
class Span:
    """Tokens first .. first + length - 1 of the sequence, which lie from `at` on in a rank's shard."""

    first: int
    length: int
    at: int

    @property
    def end(self) -> int:
        return self.first + self.length

    @property
    def here(self) -> slice:
        return slice(self.at, self.at + self.length)


def spans(layout: str, tokens: int, rank: int, ranks: int) -> list[Span]:
    """What `rank` holds, in the order of its shard, of `tokens` a rank.

    "contiguous" gives each rank a run of tokens. Under a causal mask the last rank then has P times the first one's
    work, so "zigzag" cuts the sequence in 2 P pieces and gives rank r the pieces r and 2 P - 1 - r: all have the same.
    """
    if layout not in LAYOUTS:
        raise ArgumentValueError(f"layout: expected one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    if layout == "contiguous":
        return [Span(rank * tokens, tokens, 0)]
    if tokens % 2:
        raise ArgumentValueError(f"layout: expected an even number of tokens a rank for 'zigzag', got {tokens}")
    piece = tokens // 2
    return [Span(rank * piece, piece, 0), Span((2 * ranks - 1 - rank) * piece, piece, piece)]


def order(layout: str, tokens: int, ranks: int) -> list[Span]:
    """The spans of all ranks in the order of the sequence, `at` counted in the shards of all ranks side by side."""
    found = [
        Span(span.first, span.length, rank * tokens + span.at)
        for rank in range(ranks)
        for span in spans(layout, tokens, rank, ranks)
    ]
    return sorted(found, key=lambda span: span.first)
