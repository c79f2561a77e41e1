"""Kerple: b[h](d) = -p_h * log(1 + a_h * |d|), or -a_h * |d|^p_h (Chi 2022, "KERPLE", arXiv 2205.09921)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from posattn.encodings._checks import check_choice, check_positive_int
from posattn.encodings.base import Context, Encoding
from posattn.plan import Bias, Plan, Table

SMALLEST = 1e-2


class Kerple(Encoding):
    """A learned penalty, logarithmic or a power of the distance; `p` and `a` [H] are its parameters.

    The authors keep p and a at 1e-2 or more (the power p at 2 or less) by clamping the parameters in place. Here the
    values are clamped and the gradient passes, so that a parameter beyond its bound can still come back.

    Args:
        num_heads: number of query heads H.
        form: "log" or "power".
    """

    def __init__(self, num_heads: int, form: str = "log") -> None:
        super().__init__()
        self.num_heads = check_positive_int("num_heads", num_heads)
        self.form = check_choice("form", form, ("log", "power"))
        self.p = nn.Parameter(torch.empty(num_heads))
        self.a = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """p uniform in [0, 2), a uniform in [0, 1), as in the paper's section 4."""
        with torch.no_grad():
            self.p.uniform_(0.0, 2.0)
            self.a.uniform_(0.0, 1.0)

    def build(self, context: Context) -> Plan:
        dtype = context.table_dtype(self.p, self.a)
        p = _clamped(self.p.to(dtype), 2.0 if self.form == "power" else None)[:, None]
        a = _clamped(self.a.to(dtype), None)[:, None]
        distance = context.distances().abs().to(dtype)
        values = -p * torch.log1p(a * distance) if self.form == "log" else -a * distance.pow(p)
        return Plan(bias=Bias(table=Table(values, context.distance_range[0])))

    @classmethod
    def examples(cls, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
        return {"Kerple": cls(num_heads), "Kerple power": cls(num_heads, form="power")}

    def extra_repr(self) -> str:
        return f"{self.num_heads}, form={self.form!r}"


def _clamped(x: Tensor, largest: float | None) -> Tensor:
    return x.detach().clamp(SMALLEST, largest) + (x - x.detach())
