"""RoPE over several axes: pair c turns by (the token's position on the axis of c) * theta_c (2-D: Heo 2024, "Rotary
Position Embedding for Vision Transformer", arXiv 2403.13298; M-RoPE: Wang 2024, "Qwen2-VL", arXiv 2409.12191)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from posattn.encodings._checks import check_choice, check_flag, check_positive_int, check_sequence
from posattn.encodings.base import Context, Encoding
from posattn.encodings.rope import Factor, RotaryEncoding
from posattn.encodings.scaling import Scaling, rotary_frequencies

if TYPE_CHECKING:
    from typing_extensions import Self

ARRANGEMENTS = ("blocks", "interleaved")


class _AxesRoPE(RotaryEncoding):
    """What encodings of several axes share: a position for each of them, where a call gives those."""

    _axis_count: int
    _q_ids: Tensor | None = None
    _k_ids: Tensor | None = None

    def at(self, q_ids: Tensor, k_ids: Tensor | None = None) -> Self:
        """This encoding at given positions, a number an axis: [axes, B or 1, Tq] and [axes, B or 1, Tk] (those of q if
        None), integers or fractions."""
        placed = copy.copy(self)
        placed._q_ids = self._check_ids("q_ids", q_ids)
        placed._k_ids = placed._q_ids if k_ids is None else self._check_ids("k_ids", k_ids)
        return placed

    def token_positions(self, context: Context) -> tuple[Tensor, Tensor]:
        q_own, k_own = super().token_positions(context)
        if self._q_ids is None or self._k_ids is None:
            return q_own, k_own
        for name, ids, own in (("q_ids", self._q_ids, q_own), ("k_ids", self._k_ids, k_own)):
            if ids.shape[2] != own.shape[1] or ids.shape[1] not in (1, context.batch):
                raise ValueError(
                    f"{name}: expected [{self._axis_count}, {context.batch} or 1, {own.shape[1]}], "
                    f"got {list(ids.shape)}"
                )
        return self._q_ids, self._k_ids

    def _check_ids(self, name: str, ids: Tensor) -> Tensor:
        if ids.dtype == torch.bool:
            raise TypeError(f"{name}: expected a tensor of numbers, got {ids.dtype}")
        if ids.dim() != 3 or ids.shape[0] != self._axis_count:
            raise ValueError(f"{name}: expected [{self._axis_count}, B or 1, T], got {list(ids.shape)}")
        return ids.double() if ids.is_floating_point() else ids.long()


class AxialRoPE(_AxesRoPE):
    """2-D: the first half of the pairs turns with the row of a token, the second half with its column.

    Position p is the cell (p // width, p % width), so tokens in row-major order need no explicit positions; `at` takes
    rows and columns themselves, fractions too. Each axis has rotary_dim / 4 frequencies, theta_c =
    base^(-4c/rotary_dim).

    With `mixed` (RoPE-Mixed, Heo 2024), every pair of every head turns with both: by theta[0, h, c] * column +
    theta[1, h, c] * row. `theta` [2, key heads, rotary_dim / 2] is learned. It starts as in the paper: the frequencies
    of each axis, turned in the plane by one random angle a head.

    Args:
        head_dim, layout, rotary_dim: as in `RoPE`; rotary_dim is a multiple of 4.
        width: cells in a row.
        base: the base of the frequencies; 10000 by default, 10 if mixed.
        mixed: learn both frequencies of each pair of each head.
        num_heads: query heads H, with mixed alone.
        kv_heads: key heads, where they are fewer; those that share one also share its frequencies.
    """

    _axis_count = 2

    def __init__(
        self,
        head_dim: int,
        width: int,
        base: float | None = None,
        layout: str = "half",
        rotary_dim: int | None = None,
        mixed: bool = False,
        num_heads: int | None = None,
        kv_heads: int | None = None,
    ) -> None:
        usual = 10.0 if check_flag("mixed", mixed) else 10000.0
        super().__init__(head_dim, usual if base is None else base, layout, rotary_dim)
        self.width = check_positive_int("width", width)
        if self.rotary_dim % 4:
            raise ValueError(f"rotary_dim: expected a multiple of 4 for two axes, got {self.rotary_dim}")
        self.mixed = mixed
        if not mixed:
            for name, value in (("num_heads", num_heads), ("kv_heads", kv_heads)):
                if value is not None:
                    raise ValueError(f"{name}: expected None without mixed, where all heads turn alike, got {value}")
            return
        if num_heads is None:
            raise ValueError("num_heads: expected the number of query heads with mixed, got None")
        self.num_heads = check_positive_int("num_heads", num_heads)
        self.kv_heads = check_positive_int("kv_heads", num_heads if kv_heads is None else kv_heads)
        if num_heads % self.kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of num_heads={num_heads}, got {kv_heads}")
        self.theta = nn.Parameter(torch.empty(2, self.kv_heads, self.rotary_dim // 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if not self.mixed:
            return
        size = rotary_frequencies(self.rotary_dim // 2, self.base, self.theta.device).to(self.theta.dtype)
        way = torch.rand(self.kv_heads, 1, device=self.theta.device) * (2.0 * math.pi)
        x = torch.cat([size * way.cos(), size * -way.sin()], dim=-1)
        y = torch.cat([size * way.sin(), size * way.cos()], dim=-1)
        with torch.no_grad():
            self.theta.copy_(torch.stack([x, y]))

    def frequencies(self, context: Context) -> tuple[Tensor, Tensor, Factor]:
        if not self.mixed:
            theta = rotary_frequencies(self.rotary_dim // 2, self.base, context.device)
            return theta, theta, 1.0
        kv_heads = self.kv_heads if context.kv_heads is None else context.kv_heads
        if kv_heads != self.kv_heads:
            raise ValueError(
                f"position: AxialRoPE was made for kv_heads={self.kv_heads}, got keys with {kv_heads} heads"
            )
        k_theta = self.theta.double()
        group = context.num_heads // kv_heads
        return (k_theta if group == 1 else k_theta.repeat_interleave(group, 1)), k_theta, 1.0

    def angles(self, positions: Tensor, theta: Tensor) -> Tensor:
        if positions.dim() == 3:
            row, column = positions
        else:
            row = positions.div(self.width, rounding_mode="floor")
            column = positions.remainder(self.width)
        if self.mixed:
            row, column = row[:, None, :, None], column[:, None, :, None]  # [B or 1, 1, T, 1]
            return column * theta[0, :, None] + row * theta[1, :, None]
        return torch.cat([row[..., None] * theta, column[..., None] * theta], dim=-1)

    @classmethod
    def examples(cls, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
        rotary_dim = head_dim // 4 * 4
        if not rotary_dim:
            return {}
        return {
            "AxialRoPE": cls(head_dim, width=8, rotary_dim=rotary_dim),
            "AxialRoPE mixed": cls(head_dim, width=8, rotary_dim=rotary_dim, mixed=True, num_heads=num_heads),
        }

    def extra_repr(self) -> str:
        heads = f", mixed=True, num_heads={self.num_heads}, kv_heads={self.kv_heads}" if self.mixed else ""
        return f"{self.head_dim}, width={self.width}, base={self.base}, layout={self.layout!r}{heads}"


class MRoPE(_AxesRoPE):
    """Multimodal: sections of the pairs turn with different axes (time, height, width) of one position per axis.

        rope = MRoPE(128, sections=(16, 24, 24))
        out = attention(q, k, v, rope.at(position_ids), causal=True)        # position_ids [3, B or 1, T]

    Without `at`, all axes share the token's own position, which is plain RoPE: right for text alone.

    Args:
        head_dim, base, layout, rotary_dim, scaling: as in `RoPE`. A dynamic rule goes by the largest position of any
            axis.
        sections: pairs per axis, rotary_dim / 2 in all.
        arrangement: "blocks" gives each axis a run of pairs (Qwen2-VL); "interleaved" gives pair c to axis c mod axes
            until that axis has all its pairs, and the rest to axis 0 (Qwen3-VL).
    """

    def __init__(
        self,
        head_dim: int,
        sections: Sequence[int],
        base: float = 10000.0,
        layout: str = "half",
        rotary_dim: int | None = None,
        arrangement: str = "blocks",
        scaling: Scaling | None = None,
    ) -> None:
        super().__init__(head_dim, base, layout, rotary_dim, scaling)
        self.sections = check_sequence("sections", sections, "pairs of each axis, e.g. (16, 24, 24)")
        for i, n in enumerate(self.sections):
            check_positive_int(f"sections[{i}]", n)
        if sum(self.sections) != self.rotary_dim // 2:
            raise ValueError(
                f"sections: expected numbers that sum to rotary_dim / 2 = {self.rotary_dim // 2}, got {self.sections}"
            )
        self.arrangement = check_choice("arrangement", arrangement, ARRANGEMENTS)
        self._axis_count = len(self.sections)
        self.axis_of_pair = self._axes()

    def sequence_lengths(self, context: Context) -> tuple[Tensor, Tensor]:
        if self._q_ids is None or self._k_ids is None:
            return super().sequence_lengths(context)
        q_last, k_last = (ids.amax(0) for ids in self.token_positions(context))
        return super().sequence_lengths(replace(context, q_positions=q_last, k_positions=k_last))

    def angles(self, positions: Tensor, theta: Tensor) -> Tensor:
        if positions.dim() == 2:
            return super().angles(positions, theta)
        return positions[list(self.axis_of_pair)].movedim(0, -1) * theta

    def _axes(self) -> tuple[int, ...]:
        if self.arrangement == "blocks":
            return tuple(axis for axis, count in enumerate(self.sections) for _ in range(count))
        axes = len(self.sections)
        owners = tuple(c % axes if c < self.sections[c % axes] * axes else 0 for c in range(self.rotary_dim // 2))
        counts = tuple(owners.count(axis) for axis in range(axes))
        if counts != self.sections:
            raise ValueError(
                f"sections: an interleaved arrangement needs the first to be the longest, got {self.sections}, "
                f"which it would turn into {counts}"
            )
        return owners

    @classmethod
    def examples(cls, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
        pairs = head_dim // 2
        if pairs < 3:
            return {}
        sections = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
        return {"MRoPE": cls(head_dim, sections, rotary_dim=2 * pairs)}

    def extra_repr(self) -> str:
        return (
            f"{self.head_dim}, sections={self.sections}, base={self.base}, arrangement={self.arrangement!r}, "
            f"scaling={self.scaling}"
        )
