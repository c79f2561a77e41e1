"""Sandwich: b[h](d) = (sum_{c=1..n} cos(d / 10000^(c/n)) - n) / (8(h+1)/H), n = dim/2 (Chi 2023, arXiv 2212.10356)."""

from __future__ import annotations

import math

import torch

from posattn.encodings._checks import check_choice, check_positive_int
from posattn.encodings.base import Context, Encoding
from posattn.plan import Bias, Plan, Table


class Sandwich(Encoding):
    """The inner product of sinusoidal embeddings as a bias, fixed.

    Args:
        num_heads: number of query heads H.
        dim: the dimension of the sinusoidal embeddings, even.
        form: "centered" is the paper's, 0 at distance 0; "raw" is a second public form, sum_{c=0..n-1} with no - n.
    """

    def __init__(self, num_heads: int, dim: int = 128, form: str = "centered") -> None:
        super().__init__()
        self.num_heads = check_positive_int("num_heads", num_heads)
        if check_positive_int("dim", dim) % 2:
            raise ValueError(f"dim: expected an even number, got {dim}")
        self.dim = dim
        self.form = check_choice("form", form, ("centered", "raw"))

    def build(self, context: Context) -> Plan:
        first, _ = context.distance_range
        pairs = self.dim // 2
        start = 1 if self.form == "centered" else 0
        pair = torch.arange(start, start + pairs, dtype=torch.float64, device=context.device)
        frequencies = torch.exp(pair * (-math.log(10000.0) / pairs))
        # In float64, because angles reach thousands of radians; only at distances that exist, however far from zero.
        total = (context.distances()[:, None] * frequencies).cos().sum(dim=1)
        if self.form == "centered":
            total = total - pairs
        head = torch.arange(1, context.num_heads + 1, dtype=torch.float64, device=context.device)
        values = total / (8.0 * head / context.num_heads)[:, None]
        return Plan(bias=Bias(table=Table(values.to(context.table_dtype()), first)))

    @classmethod
    def examples(cls, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
        return {"Sandwich": cls(num_heads), "Sandwich raw": cls(num_heads, form="raw")}

    def extra_repr(self) -> str:
        return f"{self.num_heads}, dim={self.dim}, form={self.form!r}"
