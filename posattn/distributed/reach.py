"""Which keys of another shard a falling bias puts out of reach of a span of queries, by a bound from norms.

Row i's largest logit is at least its own token's, -s |q_i| |k_i| + b(0), and no key of a span is above s |q_i| max|k| +
the highest b over the span's distances. Where these are further apart than rounding for every row and head, all the
keys that are left out weigh less than 2^-40 of the row together, gradients included: whatever the values are, since the
largest key has its say. csrc/cpu/reach.h does the same within a shard.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from posattn.backends.common.reach import BOUNDED, more_than, stretch
from posattn.distributed.blocks import Settings
from posattn.distributed.group import Group
from posattn.distributed.layout import Span
from posattn.encodings.base import Context, Encoding
from posattn.plan import Plan, Rotary

NATS = 40.0 * math.log(2.0)
# An amplitude or places make a plan absolute, which has no reach (blocks.probe).
_HARMLESS = frozenset(("rotary", "bias"))
NORM_SLACK = 1.01  # what rounding turned queries and keys may add to a norm


def falls(plan: Plan) -> bool:
    """Whether a plan's bias is one of the distance alone, so that there may be keys out of reach."""
    return (plan.bias.slope is not None or plan.bias.table is not None) and not (
        more_than(plan, _HARMLESS) or more_than(plan.bias, BOUNDED)
    )


class Reach:
    """The bound for one call: norms of this rank's queries, and of the keys of every rank."""

    def __init__(
        self, group: Group, position: Encoding, settings: Settings, q: Tensor, k: Tensor, spans: Sequence[Span]
    ) -> None:
        self.position, self.settings, self.q, self.kv_heads = position, settings, q, k.shape[1]
        own = torch.stack([_norms(k[:, :, span.here]) for span in spans])  # [spans, B, Hkv]
        everyone = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(everyone, own, group=group)
        per_head = q.shape[1] // k.shape[1]
        self.of_keys = [part.repeat_interleave(per_head, 2) for part in everyone]  # by rank: [spans, B, Hq]
        self.of_own = dict(zip(spans, own.repeat_interleave(per_head, 2)))
        self.of_queries = {span: _norms(q[:, :, span.here]) for span in spans}
        tokens = q.shape[2] * group.size()
        self.least = NATS + math.log(tokens)
        self.scale = abs(q.shape[3] ** -0.5 if settings.scale is None else settings.scale)
        with torch.no_grad():
            self.near = self._plan(Span(0, 1, 0), Span(0, 1, 0))

    @torch.no_grad()
    def is_out(self, queries: Span, keys: Span, norms: Tensor) -> Tensor:
        """A bool of no dimensions: whether no row of `queries` reaches any of `keys`, whose largest norms are [B, Hq].

        Every comparison with NaN is False: such pairs are computed.
        """
        # What is turned has other norms only where a rotation scales: the tables of this pair say by how much.
        plan = self._plan(queries, keys)
        gap = _bias(self.near, 0, 0) - _bias(plan, queries.first - keys.end + 1, queries.end - 1 - keys.first)
        of_queries = self.of_queries[queries]
        far = self._product(of_queries * norms * _stretch(plan.rotary))
        own = self._product(of_queries * self.of_own[queries] * _stretch(self.near.rotary))
        return (gap >= far + own + self.least).all()

    def _product(self, norms: Tensor) -> Tensor:
        product = norms * (self.scale * NORM_SLACK**2)
        cap = self.settings.softcap
        return product.clamp(max=cap) if cap else product

    def _plan(self, queries: Span, keys: Span) -> Plan:
        context = Context(
            q_len=queries.length,
            k_len=keys.length,
            num_heads=self.q.shape[1],
            head_dim=self.q.shape[3],
            device=self.q.device,
            dtype=self.q.dtype,
            causal=self.settings.causal,
            offset=queries.first - keys.first,
            kv_heads=self.kv_heads,
        )
        return self.position.lower(context)


def _norms(x: Tensor) -> Tensor:
    """The largest norm of a row, [B, H] float32, of [B, H, T, D]; NaN or infinity if one is."""
    return torch.linalg.vector_norm(x.detach(), dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)).amax(-1)


def _bias(plan: Plan, first: int, last: int) -> Tensor:
    """The highest bias of each head ([H] or [B, H]) at distances first .. last, or a bound above it."""
    slope, table = plan.bias.slope, plan.bias.table
    parts = []
    if slope is not None:
        # Linear on each side of 0, so highest at an end or at 0.
        distances = [first, last, *([0] if first < 0 < last else [])]
        parts.append(torch.stack([-slope.slope * (d if slope.signed else abs(d)) for d in distances]).amax(0))
    if table is not None:
        entries = table.values.shape[1]
        start, end = (min(max(d - table.first, 0), entries - 1) for d in (first, last))
        parts.append(table.values[:, start : end + 1].amax(1))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _stretch(rotary: Rotary | None) -> float | Tensor:
    """By how much a rotation may lengthen a query times a key."""
    if rotary is None:
        return 1.0
    return stretch(rotary.q_cos, rotary.q_sin) * stretch(rotary.k_cos, rotary.k_sin)
