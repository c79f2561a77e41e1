"""Partial results over different keys, joined by their log-sum-exps, in float32."""

from __future__ import annotations

import torch
from torch import Tensor


class Rows:
    """out [B, H, T, Dv] and lse [B, H, T] of queries, over the keys that were added so far."""

    def __init__(self, out: Tensor, lse: Tensor) -> None:
        self.out, self.lse = out, lse

    @staticmethod
    def empty(q: Tensor, value_dim: int) -> Rows:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        out = torch.zeros(*q.shape[:3], value_dim, dtype=wide, device=q.device)
        return Rows(out, torch.full(q.shape[:3], -torch.inf, dtype=wide, device=q.device))

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Some rows over more keys. A row that sees none of them has lse = -inf and adds nothing."""
        before, total = self.lse[:, :, rows], torch.logaddexp(self.lse[:, :, rows], lse)
        kept, new = ((x - total).exp().nan_to_num(0.0)[..., None] for x in (before, lse))
        self.out[:, :, rows] = self.out[:, :, rows] * kept + out * new
        self.lse[:, :, rows] = total

    def add_sinks(self, sinks: Tensor) -> None:
        """A logit a head in every row's denominator, without a value."""
        total = torch.logaddexp(self.lse, sinks.to(self.lse)[:, None])
        self.out *= (self.lse - total).exp()[..., None]
        self.lse = total


def sink_gradient(out: Tensor, lse: Tensor, sinks: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """[H] float32: a sink's weight in each row, times what the row's loss gains by it."""
    weight = (sinks.to(lse)[:, None] - lse).exp()
    gain = -(grad_out.to(lse) * out.to(lse)).sum(-1)
    if grad_lse is not None:
        gain = gain + grad_lse
    return (weight * gain).sum((0, 2))
