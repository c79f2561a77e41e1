"""What a mask function does, seen by running it on stand-ins for its indices: inside torch.compile, which shows no
closure of a function that was made while it traces.

Only what transformers' own factories compute is understood; anything else raises Unread. The function itself runs, so
what is read is what it says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from posattn.integrations.transformers.patterns import Pattern


class Unread(Exception):
    """A mask function did something with its indices that no pattern has."""


class Row:
    """The batch index. A tensor that it indexes, one number a row, stays whole."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and args[0].dim() == 1:
            return PerRow(args[0])
        raise Unread


class PerRow:
    """numbers [B]."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers


class Place:
    """The index of a query or of a key, `shift` later, less `less` [B] of its row; or its position, of `positions`
    [B, T], instead."""

    def __init__(
        self, of: str, pattern: type[Pattern], shift: int = 0, less: Any = None, positions: Tensor | None = None
    ) -> None:
        self.of = of
        self.pattern = pattern
        self.shift = shift
        self.less = less
        self.positions = positions

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, PerRow) and self.less is None and self.shift == 0:
            return Place(self.of, self.pattern, 0, other.numbers, self.positions)
        if isinstance(other, Place):
            return Distance(self, other)
        if isinstance(other, int) and self.less is None:
            return Place(self.of, self.pattern, self.shift - other, None, self.positions)
        raise Unread

    def __le__(self, other: Any) -> Found:
        """key <= query."""
        if not (isinstance(other, Place) and self._meets(other) and self.shift == other.shift == 0):
            raise Unread
        return Found(self.pattern(causal=True))

    def __gt__(self, other: Any) -> Found:
        """key > query - window."""
        if not (isinstance(other, Place) and self._meets(other) and self.shift == 0 and other.shift < 0):
            raise Unread
        return Found(self.pattern(left=-other.shift - 1))

    def __ge__(self, other: Any) -> Found:
        """query >= 0."""
        if not (isinstance(other, int) and other == 0 and self.shift == 0 and self.less is None):
            raise Unread
        return Found(self.pattern())

    def __floordiv__(self, size: Any) -> Chunk:
        if not (isinstance(size, int) and self.shift == 0 and self.less is not None):
            raise Unread
        return Chunk(self, size)

    def new_ones(self, *args: Any, **kwargs: Any) -> Found:
        """What an intersection begins with."""
        return Found(self.pattern())

    def new_zeros(self, *args: Any, **kwargs: Any) -> Found:
        """What a union begins with."""
        raise Unread

    def _meets(self, other: Place) -> bool:
        return self.of == "key" and other.of == "query" and self.less is None and other.less is None


class Distance:
    """query - key."""

    def __init__(self, left: Place, right: Place) -> None:
        if not (right._meets(left) and left.shift == right.shift == 0):
            raise Unread
        self.pattern = left.pattern

    def __abs__(self) -> Distance:
        return self

    def __le__(self, reach: Any) -> Found:
        """|query - key| <= reach, for there is nothing else that takes the difference."""
        if not isinstance(reach, int):
            raise Unread
        return Found(self.pattern(left=reach, right=reach))


class Chunk:
    """The chunk of `size` that a place is in."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, place: Place, size: int) -> None:
        self.place = place
        self.size = size

    def __eq__(self, other: object) -> Any:
        if not isinstance(other, Chunk) or self.size != other.size or self.place.less is not other.place.less:
            raise Unread
        place = self.place
        return Found(place.pattern(chunk=self.size, padding=place.less, positions=place.positions))


class Found:
    """The pattern of a part of a mask function: a stand-in for its boolean."""

    device = None

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern

    def to(self, device: Any) -> Found:
        return self

    def __and__(self, other: Any) -> Found:
        if not isinstance(other, Found):
            raise Unread
        both = self.pattern.both(other.pattern)
        if both is None:
            raise Unread
        return Found(both)


class Packed:
    """transformers' packed_sequence_mask_function, as an object, whose tensor torch.compile shows."""

    def __init__(self, packed_sequence_mask: Tensor) -> None:
        self.documents = packed_sequence_mask

    def __call__(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        if isinstance(q_idx, Place):
            return Found(q_idx.pattern(documents=self.documents))
        return self.documents[batch_idx, q_idx] == self.documents[batch_idx, kv_idx]


class Remapped:
    """transformers' remap_positions_for_packed_sequence, as an object."""

    def __init__(self, mask_function: Any, position_ids: Tensor) -> None:
        self.mask_function = mask_function
        self.position_ids = position_ids

    def __call__(self, batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        if isinstance(q_idx, Place):
            query, key = (Place(x.of, x.pattern, positions=self.position_ids) for x in (q_idx, kv_idx))
            return self.mask_function(batch_idx, head_idx, query, key)
        positions = self.position_ids
        return self.mask_function(batch_idx, head_idx, positions[batch_idx, q_idx], positions[batch_idx, kv_idx])


def run(function: Any, pattern: type[Pattern]) -> Pattern | None:
    """The pattern of a mask function of transformers; None if it says anything else."""
    try:
        found = function(Row(), 0, Place("query", pattern), Place("key", pattern))
    except (Unread, TypeError, AttributeError):  # an operation that a stand-in lacks
        return None
    return found.pattern if isinstance(found, Found) else None
