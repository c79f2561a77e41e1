"""2-D relative bias: b[h](i, j) = weight[(y_i - y_j + height - 1) * (2 width - 1) + x_i - x_j + width - 1, h]
(Liu 2021, "Swin Transformer", arXiv 2103.14030), and the same in three dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from posattn.encodings._checks import check_flag, check_positive_int, check_sequence
from posattn.encodings.base import Context, Encoding
from posattn.plan import Bias, Places, Plan, Table

_NAMES = {2: "(height, width)", 3: "(depth, height, width)"}


class RelativeTable2D(Encoding):
    """A learned number per head and offset within a window; `weight` [(2 height - 1) * (2 width - 1), H], as in Swin.

    Position p is the cell (p // width, p % width). The differences of the numbers y * (2 width - 1) + x name every
    offset, so it lowers to a table, O(N), over these in place of positions. In a sum with another bias of the
    distance it becomes a dense one.

    Args:
        num_heads: number of query heads H.
        window: (height, width) in cells; a call takes at most height * width tokens.
        class_token: position 0 is a token without a cell, and cell c is at position c + 1. `weight` has three rows
            more, as BEiT's: of this query and any key, of any query and this key, and of this token and itself.
    """

    _axes = 2

    def __init__(self, num_heads: int, window: Sequence[int], class_token: bool = False) -> None:
        super().__init__()
        self.num_heads = check_positive_int("num_heads", num_heads)
        self.window = check_sequence("window", window, _NAMES[self._axes])
        if len(self.window) != self._axes:
            raise ValueError(f"window: expected {_NAMES[self._axes]}, got {window}")
        for i, n in enumerate(self.window):
            check_positive_int(f"window[{i}]", n)
        self.class_token = check_flag("class_token", class_token)
        # How far a step along each axis moves the number of a cell.
        self._steps = [1]
        for length in reversed(self.window[1:]):
            self._steps.insert(0, self._steps[0] * (2 * length - 1))
        self._last = sum((n - 1) * step for n, step in zip(self.window, self._steps))  # the greatest number
        self.weight = nn.Parameter(torch.empty(2 * self._last + 1 + 3 * class_token, num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)

    @property
    def tokens(self) -> int:
        """How many a call may have at most."""
        cells = 1
        for length in self.window:
            cells *= length
        return cells + self.class_token

    def build(self, context: Context) -> Plan:
        q_first, q_last, k_first, k_last = self._bounds(context)
        if min(q_first, k_first) < 0 or max(q_last, k_last) >= self.tokens:
            raise ValueError(
                f"position: {type(self).__name__} with a window of {' x '.join(map(str, self.window))} expects "
                f"positions in [0, {self.tokens}), got {min(q_first, k_first)} .. {max(q_last, k_last)}"
            )
        q_positions, k_positions = (p.clamp(0, self.tokens - 1) for p in context.token_positions())
        q, k = self._numbers(q_positions), self._numbers(k_positions)
        weight = self.weight.to(context.table_dtype(self.weight)).T
        if self.class_token:
            # As a query it sits so far above all cells, and as a key so far below, that its differences are nobody's.
            q = torch.where(q_positions == 0, 3 * self._last + 2, q)
            k = torch.where(k_positions == 0, -self._last - 1, k)
            cells = weight.shape[1] - 3
            of_class, to_class, itself = weight[:, cells:].split(1, dim=1)
            others = (x.expand(-1, self._last + 1) for x in (to_class, of_class))
            weight = torch.cat([weight[:, :cells], *others, itself], dim=1)
        return Plan(bias=Bias(table=Table(weight.contiguous(), -self._last)), places=Places(q, k))

    def _numbers(self, positions: Tensor) -> Tensor:
        """The number of each token's cell."""
        rest = positions - int(self.class_token)
        number = torch.zeros_like(rest)
        for length, step in zip(reversed(self.window), reversed(self._steps)):
            number = number + rest.remainder(length) * step
            rest = rest.div(length, rounding_mode="floor")
        return number

    @staticmethod
    def _bounds(context: Context) -> tuple[int, int, int, int]:
        """First and last position of queries and of keys. Segments cost a look at the device, as positions do."""
        if context.explicit:
            return context.position_bounds
        if context.offset is not None:
            q_first, q_last, k_first, k_last = context.position_bounds
            return max(q_first, 0) if context.k_starts is not None else q_first, q_last, k_first, k_last
        if context.q_segments is None:
            return context.k_len - context.q_len, context.k_len - 1, 0, context.k_len - 1
        # Queries before their document's keys see nothing, nor do tokens of no document.
        q_last, k_last = (int(positions.amax()) if positions.numel() else 0 for positions in context.token_positions())
        return 0, q_last, 0, k_last

    @classmethod
    def examples(cls, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
        rows = -(-tokens // 8)
        return {
            "RelativeTable2D": cls(num_heads, (rows, 8)),
            "RelativeTable2D class": cls(num_heads, (rows, 8), class_token=True),
        }

    def extra_repr(self) -> str:
        return f"{self.num_heads}, {self.window}, class_token={self.class_token}"


class RelativeTable3D(RelativeTable2D):
    """`RelativeTable2D` over frames too, as in Video Swin (Liu 2021, arXiv 2106.13230); `weight` [(2 depth - 1) *
    (2 height - 1) * (2 width - 1), H].

    Position p is the cell (p // (height * width), p // width % height, p % width).

    Args:
        num_heads: number of query heads H.
        window: (depth, height, width) in cells.
        class_token: as in `RelativeTable2D`.
    """

    _axes = 3

    @classmethod
    def examples(cls, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
        return {"RelativeTable3D": cls(num_heads, (-(-tokens // 12), 3, 4))}
