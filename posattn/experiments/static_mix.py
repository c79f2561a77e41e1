"""f(B): the network of DAPE given the bias alone, which for a function of the distance is a function of the distance
again; what DAPE's ablation compares f(A, B) with (Zheng 2024, arXiv 2405.14722)."""

from __future__ import annotations

from torch import nn

from posattn.encodings.base import Context, Encoding
from posattn.plan import Bias, Plan, Table


class StaticMix(Encoding):
    """b + f(b) over the heads, f = Linear -> LeakyReLU(0.01) -> Linear.

    Args:
        inner: an encoding that lowers to a table, a function of the distance.
        num_heads: number of heads H.
        width: of the hidden layer.
    """

    def __init__(self, inner: Encoding, num_heads: int, width: int = 32) -> None:
        super().__init__()
        self.num_heads, self.inner = num_heads, inner
        self.mlp = nn.Sequential(nn.Linear(num_heads, width), nn.LeakyReLU(0.01), nn.Linear(width, num_heads))

    def build(self, context: Context) -> Plan:
        bias = self.inner(context).bias
        if bias.table is None or any((bias.slope, bias.profile, bias.dense)):
            raise ValueError(f"inner: expected an encoding whose bias is a table alone, got {self.inner}")
        values = bias.table.values
        mixed = self.mlp(values.movedim(-2, -1).to(next(self.mlp.parameters()).dtype)).movedim(-1, -2)
        return Plan(bias=Bias(table=Table(values + mixed.to(values.dtype), bias.table.first)))
