"""For which calls kernels look for what is out of reach (far keys that weigh less than rounding), and what they need to
know of a bias that falls with the distance. The argument is in docs/design/triton.md.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from posattn.backends.common.operands import k_max, q_max, sequences, slopes
from posattn.plan import Bias, Call, Plan

# Entries of a table that one of its bounds covers, and keys that one of their norms does.
CELL = 64
# Below these a pass over the keys and its launches cost more than it saves: at 2048 keys ALiBi's 12 heads keep 60% of
# the tiles. Tables take some ten launches more.
LEAST_KEYS = 2048
LEAST_KEYS_TABLE = 4096
# Norms take half of what decoding reads. Below so many bytes of keys and values a launch takes longer than the rest.
LEAST_BYTES_DECODING = 64 << 20


# What a bias and a plan may have. Whatever else they come to hold adds to logits what the bound does not know.
BOUNDED = frozenset(("slope", "table"))
_HARMLESS = frozenset(("rotary", "bias", "amplitude", "places"))


def more_than(parts: Bias | Plan, known: frozenset[str]) -> bool:
    """Whether they hold anything beside what is `known`."""
    return any(getattr(parts, part.name) is not None for part in fields(parts) if part.name not in known)


def stretch(cos: Tensor, sin: Tensor) -> Tensor:
    """By how much turning by these may lengthen a row; 1 for dimensions that do not turn."""
    return (cos.square() + sin.square()).amax().sqrt().clamp(min=1.0)


@dataclass(frozen=True)
class FallingOperands:
    """Slopes [H] or [B, H] and the stride of their batch; a table [H, entries] from distance `first` to `last`, and of
    each of its `cells` the highest value from its beginning on, and up to its end, [H, cells]. None for what is not
    there."""

    slope: Tensor | None
    slope_batch: int
    table: Tensor | None
    table_head: int
    first: int
    last: int
    behind: Tensor | None
    before: Tensor | None
    cells: int


def worthwhile(call: Call, few_rows: int) -> bool:
    """Whether the kernels look for what is out of reach of `call`: its only bias is one of the distance alone, no mask
    may hide the near keys unseen, and it is long enough. Up to `few_rows` queries are decoding."""
    bias, mask = call.plan.bias, call.mask
    if (bias.slope is None and bias.table is None) or more_than(bias, BOUNDED) or more_than(call.plan, _HARMLESS):
        return False
    if call.q_positions is not None or mask.boolean is not None:
        return False
    keys = k_max(call)
    if keys < (LEAST_KEYS if bias.table is None else LEAST_KEYS_TABLE):
        return False
    if q_max(call) > few_rows:
        return True
    read = sequences(call) * call.k.shape[1] * keys * (call.k.shape[3] + call.v.shape[3])
    return read * call.k.element_size() >= LEAST_BYTES_DECODING


def falling_operands(call: Call) -> FallingOperands:
    """What the bias of a `worthwhile` call has to say of its distances."""
    slope, slope_batch = slopes(call.plan.bias.slope)
    table = call.plan.bias.table
    if table is None:
        return FallingOperands(slope, slope_batch, None, 0, 0, 0, None, None, 0)
    values = table.values.float().contiguous()
    entries = values.shape[1]
    padded = torch.cat([values, values[:, -1:].expand(-1, -entries % CELL)], dim=1)
    highest = padded.unflatten(1, (-1, CELL)).amax(2)
    return FallingOperands(
        slope=slope,
        slope_batch=slope_batch,
        table=values,
        table_head=entries,
        first=table.first,
        last=table.first + entries - 1,
        behind=highest.flip(1).cummax(1).values.flip(1).contiguous(),
        before=highest.cummax(1).values.contiguous(),
        cells=highest.shape[1],
    )
