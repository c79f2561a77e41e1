"""ALiBi: b[h](d) = -m_h * |d| (Press 2021, "Train Short, Test Long", arXiv 2108.12409)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from posattn.encodings._checks import check_positive_int
from posattn.encodings.base import Context, Encoding
from posattn.plan import Bias, Plan, Slope


def alibi_slopes(num_heads: int) -> list[float]:
    """The paper's slopes: 2^(-8(h+1)/H) for a power of two H, else those of the power of two below, then every second
    slope of twice that power (the order of BLOOM and GPT-NeoX)."""
    check_positive_int("num_heads", num_heads)
    below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (h + 1) / below) for h in range(below)]
    extra = [2.0 ** (-4.0 * (h + 1) / below) for h in range(0, 2 * below, 2)]
    return slopes + extra[: num_heads - below]


class ALiBi(Encoding):
    """A penalty linear in the distance, with one slope per head.

    Args:
        num_heads: number of query heads H.
        learnable: make `slopes` [H] a parameter; otherwise it is a buffer.
        signed: -m * d instead of -m * |d|: a key after its query gains what one before it loses.
        slopes: H numbers to use (or to start from) instead of the paper's.
    """

    slopes: Tensor

    def __init__(
        self, num_heads: int, learnable: bool = False, signed: bool = False, slopes: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self.num_heads = check_positive_int("num_heads", num_heads)
        self.signed = signed
        values = alibi_slopes(num_heads) if slopes is None else [float(m) for m in slopes]
        if len(values) != num_heads:
            raise ValueError(f"slopes: expected {num_heads} numbers, one per head, got {len(values)}")
        if not all(math.isfinite(m) for m in values):
            raise ValueError(f"slopes: expected finite numbers, got {values}")
        if learnable:
            self.slopes = nn.Parameter(torch.tensor(values))
        else:
            self.register_buffer("slopes", torch.tensor(values))

    def build(self, context: Context) -> Plan:
        return Plan(bias=Bias(slope=Slope(self.slopes.to(context.table_dtype(self.slopes)), self.signed)))

    @classmethod
    def examples(cls, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
        return {
            "ALiBi": cls(num_heads),
            "ALiBi learnable": cls(num_heads, learnable=True),
            "ALiBi signed": cls(num_heads, learnable=True, signed=True),
        }

    def extra_repr(self) -> str:
        return f"{self.num_heads}, learnable={isinstance(self.slopes, nn.Parameter)}, signed={self.signed}"
