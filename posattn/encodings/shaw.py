"""Relative keys of clipped distances: x = s * <q_i, k_j + a[clip(j - i, -k, k)]> (Shaw 2018, arXiv 1803.02155)."""

from __future__ import annotations

import torch
from torch import nn

from posattn.encodings._checks import check_positive_int
from posattn.encodings._heads import check_head_dim
from posattn.encodings.base import Context, Encoding
from posattn.plan import Bias, Plan, RelativeKeys


class ShawRelative(Encoding):
    """A learned vector for each clipped distance, shared by the heads, that queries meet beside the key; `weight`
    [2 * max_distance + 1, D], the row of j - i = -max_distance first.

    The paper's second table, whose rows are added to the values, is not offered: its share of the output is a sum of
    weights by distance, another operand, and the paper itself finds that keys alone may do (section 4.3).

    Fused kernels do not compute it: backend="reference", in memory that grows with Tq * Tk.

    Args:
        num_heads: number of query heads H.
        head_dim: dimension D of a head.
        max_distance: k; keys farther away use the row of this distance.
    """

    has_bias = False
    fused = False
    sole_operands = frozenset({"relative"})

    def __init__(self, num_heads: int, head_dim: int, max_distance: int) -> None:
        super().__init__()
        self.num_heads = check_positive_int("num_heads", num_heads)
        self.head_dim = check_positive_int("head_dim", head_dim)
        self.max_distance = check_positive_int("max_distance", max_distance)
        self.weight = nn.Parameter(torch.empty(2 * max_distance + 1, head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)

    def build(self, context: Context) -> Plan:
        check_head_dim(self, self.head_dim, context)
        # The plan's rows go by i - j, these by j - i.
        rows = self.weight.to(context.table_dtype(self.weight)).flip(0)
        return Plan(bias=Bias(), relative=RelativeKeys(rows[None], None, -self.max_distance))

    @classmethod
    def examples(cls, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
        return {"ShawRelative": cls(num_heads, head_dim, max(tokens // 3, 1))}

    def extra_repr(self) -> str:
        return f"{self.num_heads}, {self.head_dim}, {self.max_distance}"
