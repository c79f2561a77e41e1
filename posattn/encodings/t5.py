"""T5: b[h](d) = weight[bucket(d), h], buckets exact when near, logarithmic when far (Raffel 2020, arXiv 1910.10683)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from posattn.encodings._checks import check_flag, check_positive_int
from posattn.encodings.base import Context, Encoding
from posattn.plan import Bias, Plan, Table


class T5Bias(Encoding):
    """A learned bias per bucket of distances; `weight` [num_buckets, H], as in T5 checkpoints.

    T5 itself also uses scale=1.0. Without `bidirectional`, every key after its query shares bucket 0.

    Args:
        num_heads: number of query heads H.
        num_buckets: how many buckets; with bidirectional, half of them for each side.
        max_distance: distances from here on share the last bucket.
        bidirectional: tell keys after the query from keys before it.
    """

    def __init__(
        self, num_heads: int, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = False
    ) -> None:
        super().__init__()
        self.num_heads = check_positive_int("num_heads", num_heads)
        self.num_buckets = check_positive_int("num_buckets", num_buckets)
        self.max_distance = check_positive_int("max_distance", max_distance)
        self.bidirectional = check_flag("bidirectional", bidirectional)
        smallest = 4 if bidirectional else 2
        if num_buckets < smallest or (bidirectional and num_buckets % 2):
            raise ValueError(
                f"num_buckets: expected {'an even number' if bidirectional else 'a number'} of at least {smallest}, "
                f"got {num_buckets}"
            )
        if max_distance <= self._exact:
            raise ValueError(
                f"max_distance: expected more than the {self._exact} distances with a bucket each, got {max_distance}"
            )
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    @property
    def _side(self) -> int:
        """Buckets for one side."""
        return self.num_buckets // 2 if self.bidirectional else self.num_buckets

    @property
    def _exact(self) -> int:
        return self._side // 2

    def buckets(self, distance: Tensor) -> Tensor:
        """The bucket of each integer distance i - j, int64 of the same shape."""
        side, exact = self._side, self._exact
        if self.bidirectional:
            reach, offset = distance.abs(), (distance < 0).long() * side
        else:
            reach, offset = distance.clamp(min=0), torch.zeros_like(distance)
        # float32 and this order of operations, because checkpoints were trained with the buckets that they round to.
        ratio = torch.log(reach.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (side - exact)).long()).clamp(max=side - 1)
        return offset + torch.where(reach < exact, reach, far)

    def build(self, context: Context) -> Plan:
        weight = self.weight.to(context.table_dtype(self.weight))
        values = weight[self.buckets(context.distances())].t()
        return Plan(bias=Bias(table=Table(values, context.distance_range[0])))

    @classmethod
    def examples(cls, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
        return {"T5Bias": cls(num_heads), "T5Bias bidirectional": cls(num_heads, bidirectional=True)}

    def extra_repr(self) -> str:
        return f"{self.num_heads}, {self.num_buckets}, {self.max_distance}, bidirectional={self.bidirectional}"
