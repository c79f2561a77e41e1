"""Strides as kernels of every backend take them, and the order in memory that results have."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from posattn.plan import Call


def steps(x: Tensor) -> list[int]:
    """From one element to the next along each dimension; 0 along one of size 1, which so serves every index."""
    return [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride())]


def rows_like(call: Call, width: int, create: Callable[[tuple[int, int, int, int]], Tensor]) -> Tensor:
    """A tensor [B, H, Tq, width] in the order in memory that the call asks for; `create` makes it from a shape."""
    return rows(call.q, width, call.tokens_first, create)


def rows(q: Tensor, width: int, tokens_first: bool, create: Callable[[tuple[int, int, int, int]], Tensor]) -> Tensor:
    """A tensor [B, H, Tq, width] for q, in memory as [B, Tq, H, width] if tokens_first."""
    batch, heads, tokens, _ = q.shape
    if tokens_first:
        return create((batch, tokens, heads, width)).transpose(1, 2)
    return create((batch, heads, tokens, width))


def narrowed_rows(call: Call, rows: Tensor, width: int) -> Tensor:
    """Rows that `rows_like` made, without the columns past `width`."""
    return rows if rows.shape[3] == width else rows_like(call, width, rows.new_empty).copy_(rows[..., :width])
