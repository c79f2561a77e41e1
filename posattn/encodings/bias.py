"""Bias: b[h](d) = values[h, d - first], a table of one's own over the distance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from posattn import plan
from posattn.encodings._checks import check_flag
from posattn.encodings._initial import copied, remembered, restore
from posattn.encodings.base import Context, Encoding
from posattn.errors import ArgumentTypeError, ArgumentValueError

_WIDE = (torch.float32, torch.float64)


class Bias(Encoding):
    """A table of numbers over the distance d = i - j, in O(N) memory: `values` [H, L], column 0 at d = first.

        penalty = -0.1 * torch.arange(2048.0)
        out = attention(q, k, v, Bias(penalty.expand(12, -1), first=0), causal=True)

    A distance outside the table takes the number at its nearer end. (`posattn.plan.Bias` is something else: the part of
    a plan that holds what is added to the logits, for those who write `build`.)

    Args:
        values: [H, L] of a floating dtype, or [1, L] for any number of heads; -inf forbids. An nn.Parameter is this
            encoding's parameter, shared with whoever else has it. Another tensor that requires grad is used as it
            stands, and its graph gets the gradient. Any other is copied into a buffer, which stays float32 (or float64)
            whatever narrower type the module gets.
        first: the distance of column 0; 1 - Tq for a table of all the distances of a call.
        learnable: copy into a parameter instead.
    """

    values: Tensor

    def __init__(self, values: Tensor, first: int, learnable: bool = False) -> None:
        super().__init__()
        if not isinstance(values, Tensor):
            raise ArgumentTypeError(f"values: expected a torch.Tensor, got {type(values).__name__}")
        if not values.is_floating_point():
            raise ArgumentTypeError(f"values: expected a floating dtype, got {values.dtype}")
        if values.dim() != 2 or not values.numel():
            hint = "; values[None] is one row for all heads" if values.dim() == 1 else ""
            raise ArgumentValueError(f"values: expected [heads, distances], got {list(values.shape)}{hint}")
        if isinstance(first, bool) or not isinstance(first, int):
            raise ArgumentTypeError(f"first: expected an int, got {type(first).__name__}")
        if check_flag("learnable", learnable) and values.requires_grad:
            raise ArgumentValueError(
                "learnable: expected False for values that require grad, got True, which copies them"
            )
        self.num_heads = values.shape[0] if values.shape[0] > 1 else None
        self.first = first
        self._computed = values.requires_grad and not isinstance(values, nn.Parameter)
        self._fixed = not (learnable or self._computed or isinstance(values, nn.Parameter))
        self._initial = None if self._computed else remembered(values)
        if isinstance(values, nn.Parameter):
            self.values = values
        elif learnable:
            self.values = nn.Parameter(copied(values))
        else:
            self.register_buffer("values", copied(_widened(values)) if self._fixed else values, persistent=self._fixed)

    def reset_parameters(self) -> None:
        """The values that the encoding was made with. ValueError if those were made on the meta device."""
        if not self._computed:
            restore("values", self.values, self._initial)

    def build(self, context: Context) -> plan.Plan:
        values = self.values.to(context.table_dtype(self.values))
        index = (context.distances() - self.first).clamp(0, values.shape[1] - 1)
        table = plan.Table(values[:, index], context.distance_range[0])
        return plan.Plan(bias=plan.Bias(table=table))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Bias:
        before = self.values
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._fixed and self.values.dtype not in _WIDE:
            self.values = before.to(self.values.device)
        return self

    @classmethod
    def examples(cls, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
        # On the CPU, so that reset_parameters knows them though the model is made on meta.
        count = 2 * max(tokens // 2, 1) + 1  # distances beyond it are clamped
        head = torch.arange(1.0, num_heads + 1, device="cpu")[:, None]
        values = torch.cos(torch.arange(float(count), device="cpu") / head)
        return {"Bias": cls(values, -(count // 2), learnable=True)}

    def extra_repr(self) -> str:
        return f"values {list(self.values.shape)}, first={self.first}"


def _widened(values: Tensor) -> Tensor:
    return values if values.dtype in _WIDE else values.float()
