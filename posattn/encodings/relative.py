"""Learned relative bias: b[h](d) = R_h[clip(d, -m, m)], or R_h[min(|d|, m)] (the scalar form of Shaw 2018, arXiv
1803.02155)."""

from __future__ import annotations

import torch
from torch import nn

from posattn.encodings._checks import check_flag, check_positive_int
from posattn.encodings.base import Context, Encoding
from posattn.plan import Bias, Plan, Table


class RelativeTable(Encoding):
    """A learned number per head and distance; `weight` [H, 2 * max_distance + 1] ([H, max_distance + 1] if symmetric).

    Args:
        num_heads: number of query heads H.
        max_distance: distances beyond +/- this one use its entry.
        symmetric: one entry for d and -d.
    """

    def __init__(self, num_heads: int, max_distance: int, symmetric: bool = False) -> None:
        super().__init__()
        self.num_heads = check_positive_int("num_heads", num_heads)
        self.max_distance = check_positive_int("max_distance", max_distance)
        self.symmetric = check_flag("symmetric", symmetric)
        self.weight = nn.Parameter(torch.empty(num_heads, max_distance + 1 if symmetric else 2 * max_distance + 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def build(self, context: Context) -> Plan:
        distance = context.distances()
        if self.symmetric:
            index = distance.abs().clamp(max=self.max_distance)
        else:
            index = distance.clamp(-self.max_distance, self.max_distance) + self.max_distance
        values = self.weight.to(context.table_dtype(self.weight))[:, index]
        return Plan(bias=Bias(table=Table(values, context.distance_range[0])))

    @classmethod
    def examples(cls, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
        reach = max(tokens // 2, 1)
        return {
            "RelativeTable": cls(num_heads, reach),
            "RelativeTable symmetric": cls(num_heads, reach, symmetric=True),
        }

    def extra_repr(self) -> str:
        return f"{self.num_heads}, {self.max_distance}, symmetric={self.symmetric}"
