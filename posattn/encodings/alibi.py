"""ALiBi: b[h](d) = -m_h * |d| (Press 2021, "Train Short, Test Long", arXiv 2108.12409)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from posattn.encodings._checks import check_flag, check_float32, check_positive_int
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

    Fixed slopes are computed: they stay float32 whatever narrower type the module gets, and no state_dict holds them.

    Args:
        num_heads: number of query heads H.
        learnable: make `slopes` [H] a parameter; otherwise it is a buffer.
        signed: -m * d instead of -m * |d|: a key after its query gains what one before it loses.
        slopes: [H] numbers to use (or to start from) instead of the paper's, or [B, H] for the B sequences of a batch
            (flash-attn's alibi_slopes); a sequence or a tensor, whose numbers are taken.
    """

    slopes: Tensor

    def __init__(
        self,
        num_heads: int,
        learnable: bool = False,
        signed: bool = False,
        slopes: Sequence[float] | Sequence[Sequence[float]] | Tensor | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = check_positive_int("num_heads", num_heads)
        self.learnable = check_flag("learnable", learnable)
        self.signed = check_flag("signed", signed)
        self.initial_slopes = _numbers(alibi_slopes(num_heads) if slopes is None else slopes, num_heads)
        by_sequence = isinstance(self.initial_slopes[0], tuple)
        shape = (len(self.initial_slopes), num_heads) if by_sequence else (num_heads,)
        if learnable:
            self.slopes = nn.Parameter(torch.empty(shape))
        else:
            self.register_buffer("slopes", torch.empty(shape, dtype=torch.float32), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The slopes that the encoding was made with."""
        with torch.no_grad():
            self.slopes.copy_(torch.tensor(self.initial_slopes, dtype=torch.float32, device=self.slopes.device))

    def build(self, context: Context) -> Plan:
        slopes = self.slopes
        if not self.learnable and slopes.is_meta and context.device.type != "meta":
            # load_state_dict(assign=True) on a module that was made on meta gives it all but what no state_dict holds.
            slopes = self.slopes = torch.tensor(self.initial_slopes, dtype=torch.float32, device=context.device)
        return Plan(bias=Bias(slope=Slope(slopes.to(context.table_dtype(slopes)), self.signed)))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ALiBi:
        before = self.slopes
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self.slopes
        if not self.learnable and before.is_meta and not after.is_meta:
            self.reset_parameters()
        if not self.learnable and after.dtype not in (torch.float32, torch.float64):
            self.slopes = before.to(after.device)
        return self

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        if not self.learnable:
            # Fixed slopes used to be saved, perhaps as bfloat16; others than those of this encoding are a mistake.
            saved = state_dict.pop(f"{prefix}slopes", None)
            if saved is not None and not _same_to_rounding(saved, self.initial_slopes):
                raise ValueError(
                    f"{prefix}slopes: expected {list(self.initial_slopes)}, which ALiBi was made with, got {saved}"
                )
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)

    @classmethod
    def examples(cls, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
        return {
            "ALiBi": cls(num_heads),
            "ALiBi learnable": cls(num_heads, learnable=True),
            "ALiBi signed": cls(num_heads, learnable=True, signed=True),
        }

    def extra_repr(self) -> str:
        return f"{self.num_heads}, learnable={self.learnable}, signed={self.signed}"


def _numbers(
    slopes: Sequence[float] | Sequence[Sequence[float]] | Tensor, num_heads: int
) -> tuple[float, ...] | tuple[tuple[float, ...], ...]:
    """The slopes as plain numbers, [H] or [B, H]."""
    if isinstance(slopes, Tensor) and slopes.requires_grad:
        raise TypeError("slopes: expected numbers to copy, got a tensor that requires grad, which gets none")
    given: object = slopes.tolist() if hasattr(slopes, "tolist") else slopes  # a tensor or an array
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise TypeError(f"slopes: expected {num_heads} numbers, one per head, got {type(slopes).__name__}")
    rows = list(given)
    if rows and all(isinstance(row, Iterable) for row in rows):
        return tuple(_row(f"slopes[{b}]", row, num_heads) for b, row in enumerate(rows))
    return _row("slopes", rows, num_heads)


def _row(name: str, slopes: Iterable[float], num_heads: int) -> tuple[float, ...]:
    row = tuple(check_float32(f"{name}[{h}]", m) for h, m in enumerate(slopes))
    if len(row) != num_heads:
        raise ValueError(f"{name}: expected {num_heads} numbers, one per head, got {len(row)}")
    return row


def _same_to_rounding(saved: Tensor, slopes: Sequence[float] | Sequence[Sequence[float]]) -> bool:
    if type(saved) not in (Tensor, nn.Parameter) or saved.is_meta:
        return True  # nothing to look at
    expected = torch.tensor(slopes, dtype=torch.float64, device="cpu")
    return saved.shape == expected.shape and torch.allclose(saved.double().cpu(), expected, rtol=1e-2, atol=1e-6)
