"""FIRE: b[h](i, j) = f_h(psi(i - j) / (psi(max(i, L)) + eps)), psi(y) = log(|c y| + 1) (Li 2023, arXiv 2310.04418)."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from posattn.encodings._checks import check_choice, check_flag, check_positive_float32, check_positive_int
from posattn.encodings._linear import weight_and_bias
from posattn.encodings.base import Context, Encoding
from posattn.plan import Bias, Plan, Profile


class FIRE(Encoding):
    """A small network of the distance, normalised by the query's position past a learned threshold L.

    f = Linear(1, width) -> activation -> Linear(width, H) is `mlp`; `c` and `length_multiplier`, [1] each, are learned,
    and L = |length_multiplier * initial_length|. f is a ReLU network of one number, hence piecewise linear, and lowers
    to its exact pieces: kernels evaluate no network.

    Args:
        num_heads: number of query heads H.
        width: hidden units of the network.
        bidirectional: use sign(i - j) * psi(i - j), so that keys after the query differ from those before it.
        initial_c, initial_length, eps: as in the paper.
        activation: "relu", or "leaky_relu" of slope 0.01: the FIRE of DAPE's authors has it, and initial_length=256.
    """

    sole_operands = frozenset({"profile"})

    def __init__(
        self,
        num_heads: int,
        width: int = 32,
        bidirectional: bool = False,
        initial_c: float = 0.1,
        initial_length: float = 512.0,
        eps: float = 1e-6,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.num_heads = check_positive_int("num_heads", num_heads)
        self.width = check_positive_int("width", width)
        self.bidirectional = check_flag("bidirectional", bidirectional)
        self.initial_length = check_positive_float32("initial_length", initial_length)
        self.eps = check_positive_float32("eps", eps)
        self.activation = check_choice("activation", activation, ("relu", "leaky_relu"))
        self._leak = 0.01 if activation == "leaky_relu" else 0.0
        between = nn.LeakyReLU(self._leak) if self._leak else nn.ReLU()
        self.mlp = nn.Sequential(nn.Linear(1, width), between, nn.Linear(width, num_heads))
        self.initial_c = check_positive_float32("initial_c", initial_c)
        # [1] and not [], because fully_shard splits the first dimension of a parameter.
        self.c = nn.Parameter(torch.empty(1))
        self.length_multiplier = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """c and length_multiplier as a new encoding has them; the layers of mlp reset themselves."""
        with torch.no_grad():
            self.c.fill_(self.initial_c)
            self.length_multiplier.fill_(1.0)

    def build(self, context: Context) -> Plan:
        parameters = list(self.parameters())
        dtype = context.table_dtype(*parameters)
        c = self.c.to(dtype)
        threshold = (self.length_multiplier.to(dtype) * self.initial_length).abs()

        distance = context.distances().to(dtype)
        psi = _psi(c, distance)
        if self.bidirectional:
            psi = psi * distance.sign()
        row_first, rows = context.query_range
        position = torch.arange(row_first, row_first + rows, device=context.device).to(dtype)
        row_scale = 1.0 / (_psi(c, torch.maximum(position, threshold)) + self.eps)

        (a, b), (weight, bias) = weight_and_bias(self.mlp[0]), weight_and_bias(self.mlp[2])
        knots, slope, intercept = piecewise_linear(a[:, 0], b, weight, bias, dtype, self._leak)
        profile = Profile(psi, context.distance_range[0], row_scale, row_first, knots, slope, intercept)
        return Plan(bias=Bias(profile=profile))

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        for name in ("c", "length_multiplier"):
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and saved.dim() == 0:  # as they once were
                state_dict[prefix + name] = saved.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)

    @classmethod
    def examples(cls, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
        # Half of the queries past the threshold and half before it.
        length = max(tokens / 2.0, 1.0)
        return {
            "FIRE": cls(num_heads, initial_length=length),
            "FIRE bidirectional": cls(num_heads, bidirectional=True, initial_length=length),
            "FIRE leaky": cls(num_heads, initial_length=length, activation="leaky_relu"),
        }

    def extra_repr(self) -> str:
        return (
            f"{self.num_heads}, width={self.width}, bidirectional={self.bidirectional}, activation={self.activation!r}"
        )


def piecewise_linear(
    a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, leak: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The pieces of f(y) = weight @ relu(a * y + b) + bias, for a, b [W], weight [H, W], bias [H]; of a leaky ReLU of
    slope `leak`.

    Gives knots [W], ascending and finite or +inf, slope and intercept [H, W + 1]: f(y) = slope[:, s] * y +
    intercept[:, s], s the number of knots < y. Slope and intercept are differentiable; the knots need not be, since f
    is continuous in them.
    """
    a, b, weight, bias = a.double(), b.double(), weight.double(), bias.double()
    with torch.no_grad():
        side = a.sign()
        # A unit with a = 0 never switches: it is on for all y, or off.
        on_at_start = ((a < 0) | ((a == 0) & (b > 0))).double()
        info = torch.finfo(dtype)
        knots = torch.where(a == 0, torch.inf, -b / a).clamp(min=info.min).to(dtype)
        # ReLU is off at 0. A unit that switches off is to be off at its knot too, so its knot moves down by one ulp
        # (a normal number, since hardware may flush others to 0); at d = 0 with b = 0 the gradient depends on it.
        below = torch.where(knots == 0, -info.tiny, torch.nextafter(knots, torch.full_like(knots, info.min)))
        knots, order = torch.where(a < 0, below, knots).sort()

    def prefix(start: Tensor, step: Tensor) -> Tensor:
        return torch.cat([start[:, None], step[:, order]], dim=1).cumsum(dim=1).to(dtype)

    # A unit that is off has the slope `leak`, so a switch moves it by the rest of 1.
    start, rest = on_at_start + leak * (1.0 - on_at_start), (1.0 - leak) * side
    slope = prefix(weight @ (a * start), weight * (a * rest))
    intercept = prefix(weight @ (b * start) + bias, weight * (b * rest))
    return knots, slope, intercept


def _psi(c: Tensor, y: Tensor) -> Tensor:
    return torch.log1p((c * y).abs())
