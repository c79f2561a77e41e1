"""What every encoding is: a module that lowers to a plan, and that adds to others with `+`.

To add an encoding, subclass `Encoding`, set `num_heads`, and write `build(context)`, which turns parameters into plan
operands with differentiable PyTorch. Name it in `posattn/encodings/__init__.py` and the tests and benches find it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from posattn import reference
from posattn.plan import Bias, Dense, Mask, Plan, Slope, Table
from posattn.positions import token_indices

MAX_TABLE_ENTRIES = 2**27


@dataclass(frozen=True)
class Context:
    """What a lowering may know of a call: its sizes and positions, never the values of q, k and v.

    q_len and k_len are the longest sequence's; q_tokens and k_tokens the length of the q and k tensors, which differ
    from them for packed documents alone. Positions are None (implicit) or int64 [B or 1, tokens]. head_dim None means
    that it does not matter.
    """

    q_len: int
    k_len: int
    num_heads: int
    head_dim: int | None
    device: torch.device
    dtype: torch.dtype
    q_positions: Tensor | None = None
    k_positions: Tensor | None = None
    batch: int = 1
    q_tokens: int | None = None
    k_tokens: int | None = None
    k_lengths: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None

    @staticmethod
    def of(
        q: Tensor, k: Tensor, mask: Mask, q_positions: Tensor | None = None, k_positions: Tensor | None = None
    ) -> Context:
        """The context of a checked call, q [B, Hq, Tq, D] and k [B, Hkv, Tk, D]."""
        return Context(
            q_len=mask.max_q or q.shape[2],
            k_len=mask.max_k or k.shape[2],
            num_heads=q.shape[1],
            head_dim=q.shape[3],
            device=q.device,
            dtype=q.dtype,
            q_positions=q_positions,
            k_positions=k_positions,
            batch=q.shape[0],
            q_tokens=q.shape[2],
            k_tokens=k.shape[2],
            k_lengths=mask.k_lengths,
            cu_seqlens_q=mask.cu_seqlens_q,
            cu_seqlens_k=mask.cu_seqlens_k,
        )

    @property
    def explicit(self) -> bool:
        return self.q_positions is not None and self.k_positions is not None

    def token_positions(self) -> tuple[Tensor, Tensor]:
        """The position of every query and key, int64 [B or 1, tokens] each; the same tensor where they agree."""
        if self.q_positions is not None and self.k_positions is not None:
            return self.q_positions, self.k_positions
        q_tokens = self.q_len if self.q_tokens is None else self.q_tokens
        k_tokens = self.k_len if self.k_tokens is None else self.k_tokens
        q_index, k_index, offset = token_indices(
            q_tokens, k_tokens, self.device, self.k_lengths, self.cu_seqlens_q, self.cu_seqlens_k
        )
        plain = self.k_lengths is None and self.cu_seqlens_q is None
        return (k_index if plain and q_tokens == k_tokens else q_index + offset), k_index

    @property
    def position_bounds(self) -> tuple[int, int, int, int]:
        """First and last query position, first and last key position. Explicit positions cost one device sync.

        For implicit ones the bounds hold for sequences of any length up to k_len.
        """
        if self.explicit:
            return self._explicit_bounds
        return 1 - self.q_len, self.k_len - 1, 0, self.k_len - 1

    @cached_property
    def _explicit_bounds(self) -> tuple[int, int, int, int]:
        assert self.q_positions is not None
        assert self.k_positions is not None
        if self.q_positions.numel() == 0 or self.k_positions.numel() == 0:
            return 0, 0, 0, 0
        bounds = [*self.q_positions.aminmax(), *self.k_positions.aminmax()]
        q_first, q_last, k_first, k_last = torch.stack(bounds).tolist()
        return q_first, q_last, k_first, k_last

    @property
    def distance_range(self) -> tuple[int, int]:
        """First distance and number of distances that a table has to cover."""
        if not self.explicit:
            return 1 - self.q_len, max(self.q_len + self.k_len - 1, 1)
        q_first, q_last, k_first, k_last = self.position_bounds
        return q_first - k_last, _check_range("distances", (q_last - q_first) + (k_last - k_first) + 1, self.num_heads)

    @property
    def query_range(self) -> tuple[int, int]:
        """First query position and number of query positions that a row scale has to cover."""
        if not self.explicit:
            return self.distance_range
        q_first, q_last, _, _ = self.position_bounds
        return q_first, _check_range("query positions", q_last - q_first + 1, 1)

    def distances(self) -> Tensor:
        """The distances that a table has to cover, int64 [L], ascending by one."""
        first, count = self.distance_range
        return torch.arange(first, first + count, device=self.device)

    def table_dtype(self, *parameters: Tensor) -> torch.dtype:
        """float64 if q or a parameter is float64, else float32, whatever narrower type they have."""
        wide = any(t.dtype == torch.float64 for t in parameters) or self.dtype == torch.float64
        return torch.float64 if wide else torch.float32


class Encoding(nn.Module):
    """A positional encoding for attention. `lower` gives its plan; `bias` shows an additive one; `+` composes."""

    num_heads: int | None = None
    """Query heads that it was made for; None if any number will do."""
    has_bias: bool = True
    """Whether the plan adds a bias to the logits; a rotary encoding's does not."""
    needs_positions: bool = False
    """Whether it makes sense only with explicit positions."""

    def build(self, context: Context) -> Plan:
        """The plan of this encoding, by differentiable PyTorch. Subclasses write this; callers use `lower`."""
        raise NotImplementedError(f"{type(self).__name__} must define build(context)")

    def lower(self, context: Context) -> Plan:
        """The plan for one call. ValueError if the head count is wrong or a parameter holds NaN (looked at on CPU)."""
        if self.num_heads is not None and self.num_heads != context.num_heads:
            raise ValueError(
                f"position: {type(self).__name__} was made for num_heads={self.num_heads}, "
                f"got queries with {context.num_heads} heads"
            )
        if not torch.compiler.is_compiling():
            for name, parameter in self.named_parameters():
                _check_not_nan(f"{type(self).__name__}.{name}", parameter)
        return self.build(context)

    def bias(
        self, q_len: int, k_len: int, *, q_positions: Tensor | None = None, k_positions: Tensor | None = None
    ) -> Tensor:
        """The dense additive bias [H, q_len, k_len], for looking at; query i sits at position i + k_len - q_len.

        Explicit positions are integers [q_len] and [k_len]. TypeError for an encoding that is no additive bias:
        a rotary one, or one that depends on the logits.
        """
        if (q_positions is None) != (k_positions is None):
            raise ValueError("q_positions, k_positions: expected both or neither, got one")
        tensors = [*self.parameters(), *self.buffers()]
        context = Context(
            q_len=q_len,
            k_len=k_len,
            num_heads=self.num_heads or 1,
            head_dim=None,
            device=tensors[0].device if tensors else torch.device("cpu"),
            dtype=torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32,
            q_positions=None if q_positions is None else q_positions.long()[None],
            k_positions=None if k_positions is None else k_positions.long()[None],
        )
        plan = self.lower(context)
        if plan.mix is not None:
            raise TypeError(
                f"{type(self).__name__} depends on the logits and has no fixed bias; "
                "take .bias of its inner encoding, or pass real logits through posattn.reference"
            )
        if plan.rotary is not None:
            raise TypeError(
                f"{type(self).__name__} turns q and k and is not an additive bias; turn them with RoPE.rotate(x), "
                "and take .bias of the additive part alone"
            )
        return reference.dense_bias(plan.bias, *context.token_positions()).expand(1, context.num_heads, -1, -1)[0]

    @classmethod
    def examples(cls, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
        """An instance of each form, by name, for up to `tokens` queries and keys: what tests and benches run."""
        raise NotImplementedError(f"{cls.__name__} must define examples(num_heads, head_dim, tokens)")

    def __add__(self, other: Encoding) -> Encoding:
        if not isinstance(other, Encoding):
            return NotImplemented
        return Sum(self, other)


class Sum(Encoding):
    """The composition of encodings: biases add, at most one part turns q and k, and at most one mixes the heads.

    The bias of a part beside a head-mixing one (DAPE) is added after the mix.
    """

    parts: nn.ModuleList

    def __init__(self, *parts: Encoding) -> None:
        super().__init__()
        flat: list[Encoding] = []
        for part in parts:
            flat.extend(cast(list[Encoding], part.parts) if isinstance(part, Sum) else [part])
        heads = {p.num_heads for p in flat} - {None}
        if len(heads) > 1:
            raise ValueError(f"+: expected encodings with equal num_heads, got {sorted(h for h in heads if h)}")
        self.parts = nn.ModuleList(flat)
        self.num_heads = heads.pop() if heads else None
        self.has_bias = any(p.has_bias for p in flat)
        self.needs_positions = any(p.needs_positions for p in flat)

    def build(self, context: Context) -> Plan:
        plan = Plan(bias=Bias())
        for part in self.parts:
            plan = add_plans(plan, cast(Encoding, part).lower(context), context)
        return plan


def add_plans(a: Plan, b: Plan, context: Context) -> Plan:
    """The plan of a sum of encodings. ValueError for two rotary or two head-mixing parts, or two profiles."""
    if a.rotary is not None and b.rotary is not None:
        raise ValueError("+: expected at most one rotary encoding, got two; q and k can be turned only once")
    if a.mix is not None and b.mix is not None:
        raise ValueError("+: expected at most one DAPE, got two; the heads can be mixed only once")
    return Plan(rotary=a.rotary or b.rotary, mix=a.mix or b.mix, bias=_add_biases(a.bias, b.bias, context))


def _add_biases(a: Bias, b: Bias, context: Context) -> Bias:
    if a.profile is not None and b.profile is not None:
        raise ValueError("+: expected at most one FIRE, got two; a plan holds a single profile")
    slope, table, dense = a.slope or b.slope, a.table or b.table, a.dense or b.dense
    if a.table is not None and b.table is not None:
        table = Table(a.table.values + b.table.values, a.table.first)
    if a.dense is not None and b.dense is not None:
        dense = Dense(a.dense.bias + b.dense.bias)
    if a.slope is not None and b.slope is not None:
        if a.slope.signed == b.slope.signed:
            slope = Slope(a.slope.slope + b.slope.slope, a.slope.signed)
        else:
            # One operand cannot be both signed and symmetric, so the second slope becomes a table.
            extra = _slope_table(b.slope, context)
            slope, table = a.slope, extra if table is None else Table(table.values + extra.values, table.first)
    return Bias(slope, table, a.profile or b.profile, dense)


def _slope_table(slope: Slope, context: Context) -> Table:
    distance = context.distances()
    values = -slope.slope[:, None] * (distance if slope.signed else distance.abs())
    return Table(values, context.distance_range[0])


def _check_range(what: str, count: int, heads: int) -> int:
    if count * heads > MAX_TABLE_ENTRIES:
        raise ValueError(
            f"q_positions, k_positions: expected at most {MAX_TABLE_ENTRIES} table entries (heads x {what}), "
            f"got {heads} x {count}; are the positions what you meant?"
        )
    return count


def _check_not_nan(name: str, parameter: Tensor) -> None:
    """A look at the values where it costs no device sync and the values are real, not traced or batched ones."""
    if parameter.device.type != "cpu":
        return
    if type(parameter) not in (Tensor, nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(parameter):
        return
    if parameter.isnan().any():
        raise ValueError(f"{name}: expected finite values, got NaN")
