"""Operands in the CUDA backward pass: their values by distance ahead of it, sums, and gradients from the sums."""

from __future__ import annotations

import torch
from torch import Tensor

from posattn.backends.common.operands import all_blocks, k_max
from posattn.backends.common.reductions import by_entry, by_sequence, slope_gradient
from posattn.backends.cuda import operands
from posattn.backends.cuda.backward_pass import Pass
from posattn.backends.cuda.constants import EACH_ONCE, SHARED
from posattn.backends.cuda.rows import row_scale


def by_distance(of: Pass) -> dict[str, Tensor]:
    """The table and psi at every distance that a tile can meet, so that the kernel copies them as they lie."""
    if of.call.q_positions is not None:
        return {}
    table, profile = of.call.plan.bias.table, of.call.plan.bias.profile
    found = {}
    if table is not None:
        found["table"] = operands.by_distance(table.values, table.first, of.first_distance, of.diagonals)
    if profile is not None:
        found["psi"] = operands.by_distance(profile.psi, profile.first, of.first_distance, of.diagonals)
    return found


def sums(of: Pass) -> dict[str, Tensor]:
    """Zeros for what attention_backward adds up over the operands, by member of BackwardParams."""
    call, bias, want = of.call, of.call.plan.bias, of.constants.want
    heads, slots = call.q.shape[1], of.slots
    explicit = of.constants.explicit
    shapes: dict[str, tuple[int, ...]] = {}
    if want.want_table and bias.table is not None:
        shapes["dtable"] = (slots, heads, bias.table.values.shape[1] if explicit else of.diagonals)
    if want.want_psi and bias.profile is not None:
        shapes["dpsi"] = (slots, heads, bias.profile.psi.shape[0] if explicit else of.diagonals)
    if want.want_lines and bias.profile is not None:
        shapes["drow_scale"] = (heads, of.rows)
        shapes["dsegments"] = (slots, heads, 2, bias.profile.knots.shape[0] + 1)
    if want.want_dense == SHARED and bias.dense is not None:
        shapes["ddense"] = tuple(bias.dense.bias.shape)
    dtype = torch.int64 if call.deterministic else torch.float32
    zeros = {name: torch.zeros(shape, dtype=dtype, device=of.q.device) for name, shape in shapes.items()}
    if want.want_slope:
        zeros["dslope"] = of.zeros(
            all_blocks(call, call.k.shape[2], k_max(call), of.config.block_n) * of.config.warps, heads
        )
    if want.want_dense == EACH_ONCE and bias.dense is not None:
        zeros["ddense"] = of.zeros(*bias.dense.bias.shape)
    return zeros


def gradients(of: Pass, sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The operands' gradients, from those sums."""
    call, bias = of.call, of.call.plan.bias
    explicit = call.q_positions is not None
    grads: dict[str, Tensor] = {}
    if "dslope" in sums and bias.slope is not None:
        grads["slope"] = slope_gradient(call, bias.slope, by_sequence(call, sums["dslope"]))
    if "dtable" in sums and bias.table is not None:
        grads["table"] = sums["dtable"].sum(0)
        if not explicit:
            length = bias.table.values.shape[1]
            grads["table"] = by_entry(grads["table"], of.first_distance, bias.table.first, length)
    profile = bias.profile
    if "dpsi" in sums and profile is not None:
        grads["psi"] = sums["dpsi"].sum((0, 1))
        if not explicit:
            grads["psi"] = by_entry(grads["psi"][None], of.first_distance, profile.first, profile.psi.shape[0])[0]
    if "dsegments" in sums and profile is not None:
        segments = sums["dsegments"].sum(0)
        grads["segment_intercept"], grads["segment_slope"] = segments[:, 0], segments[:, 1]
        grads["row_scale"] = row_scale(call, profile, sums["drow_scale"].sum(0), of.config.block_m)
    if "ddense" in sums:
        grads["dense"] = sums["ddense"]
    return grads
