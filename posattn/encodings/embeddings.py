"""Positions added to the token embeddings: PE[p, 2c] = sin(p / 10000^(2c/dim)), PE[p, 2c+1] = cos(same) (Vaswani 2017,
"Attention Is All You Need", arXiv 1706.03762), or a learned vector per position (Devlin 2018, "BERT", 1810.04805)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from posattn.encodings._checks import check_positive_int
from posattn.encodings.scaling import rotary_frequencies


class SinusoidalEmbedding(nn.Module):
    """Fixed sines and cosines. Call it with a length, or with integer positions of any shape; gives [..., dim].

    The result is on the device of the positions; a length may come with a `device`.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if check_positive_int("dim", dim) % 2:
            raise ValueError(f"dim: expected an even number, got {dim}")
        self.dim = dim

    def forward(
        self,
        positions: int | Tensor,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        positions = _as_positions(positions, device)
        # float64 up to the sine: angles of thousands of radians keep too few bits in float32.
        angles = positions[..., None] * rotary_frequencies(self.dim, 10000.0, positions.device)
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}"


class LearnedEmbedding(nn.Module):
    """A learned vector per position; `weight` [max_positions, dim].

    Call it with a length, or with integer positions of any shape; gives [..., dim]. ValueError for a position outside
    [0, max_positions), which for a tensor of positions reads its extremes back (not while compiling).
    """

    def __init__(self, max_positions: int, dim: int) -> None:
        super().__init__()
        self.max_positions = check_positive_int("max_positions", max_positions)
        self.dim = check_positive_int("dim", dim)
        self.weight = nn.Parameter(torch.empty(max_positions, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, positions: int | Tensor) -> Tensor:
        if isinstance(positions, int):
            if not 0 <= positions <= self.max_positions:
                raise ValueError(f"positions: expected a length up to {self.max_positions}, got {positions}")
            return self.weight[:positions]
        positions = _as_positions(positions, self.weight.device)
        if positions.numel() and not torch.compiler.is_compiling():
            smallest, largest = (int(x) for x in positions.aminmax())
            if smallest < 0 or largest >= self.max_positions:
                raise ValueError(
                    f"positions: expected positions in [0, {self.max_positions}), got {smallest} .. {largest}"
                )
        return nn.functional.embedding(positions, self.weight)

    def extra_repr(self) -> str:
        return f"{self.max_positions}, {self.dim}"


def _as_positions(positions: int | Tensor, device: torch.device | str | None) -> Tensor:
    if isinstance(positions, int):
        return torch.arange(positions, device=device)
    if positions.dtype.is_floating_point or positions.dtype.is_complex or positions.dtype == torch.bool:
        raise TypeError(f"positions: expected a length or a tensor of integers, got a tensor of {positions.dtype}")
    return positions
