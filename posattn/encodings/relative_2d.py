"""2-D relative bias: b[h](i, j) = weight[(y_i - y_j + height - 1) * (2 width - 1) + x_i - x_j + width - 1, h]
(Liu 2021, "Swin Transformer", arXiv 2103.14030)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posattn.encodings._checks import check_positive_int
from posattn.encodings.base import Context, Encoding
from posattn.plan import Bias, Dense, Plan


class RelativeTable2D(Encoding):
    """A learned number per head and offset within a window; `weight` [(2 height - 1) * (2 width - 1), H], as in Swin.

    Position p is the cell (p // width, p % width). It depends on two offsets, so it lowers to a dense bias: meant for
    windows of a few hundred cells.

    Args:
        num_heads: number of query heads H.
        window: (height, width) in cells; a call takes at most height * width tokens.
    """

    def __init__(self, num_heads: int, window: tuple[int, int]) -> None:
        super().__init__()
        self.num_heads = check_positive_int("num_heads", num_heads)
        if len(window) != 2:
            raise ValueError(f"window: expected (height, width), got {window}")
        self.height = check_positive_int("window[0]", window[0])
        self.width = check_positive_int("window[1]", window[1])
        self.weight = nn.Parameter(torch.empty((2 * self.height - 1) * (2 * self.width - 1), num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)

    def build(self, context: Context) -> Plan:
        cells = self.height * self.width
        q_first, q_last, k_first, k_last = self._bounds(context)
        if min(q_first, k_first) < 0 or max(q_last, k_last) >= cells:
            raise ValueError(
                f"position: RelativeTable2D with a window of {self.height} x {self.width} expects positions in "
                f"[0, {cells}), got {min(q_first, k_first)} .. {max(q_last, k_last)}"
            )
        q_positions, k_positions = (p.clamp(0, cells - 1) for p in context.token_positions())
        down = _differences(q_positions // self.width, k_positions // self.width) + self.height - 1
        right = _differences(q_positions % self.width, k_positions % self.width) + self.width - 1
        weight = self.weight.to(context.table_dtype(self.weight))
        # Not weight[...], whose gradient is summed in an order that depends on threads.
        bias = F.embedding(down * (2 * self.width - 1) + right, weight)
        return Plan(bias=Bias(dense=Dense(bias.permute(0, 3, 1, 2))))

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
        return {"RelativeTable2D": cls(num_heads, (-(-tokens // 8), 8))}

    def extra_repr(self) -> str:
        return f"{self.num_heads}, ({self.height}, {self.width})"


def _differences(q: Tensor, k: Tensor) -> Tensor:
    return q[:, :, None] - k[:, None, :]
