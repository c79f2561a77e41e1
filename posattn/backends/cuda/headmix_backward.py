"""Host side of the CUDA backward pass of calls that mix heads (DAPE): one launch, and the gradients that come of it."""

from __future__ import annotations

import torch
from torch import Tensor

from posattn.backends.common.fixed_point import bias_units, in_ones, most_into_inner
from posattn.backends.common.operands import all_blocks, distances, k_max, sequences
from posattn.backends.common.reductions import LINES, by_entry, by_sequence, sink_gradient, slope_gradient
from posattn.backends.cuda import headmix_forward, headmix_rows, launch, operands
from posattn.backends.cuda import rows as gradients
from posattn.backends.cuda.configs.headmix import backward_config, backward_shared_bytes, dims, inputs
from posattn.backends.cuda.constants import HeadMixBackwardConstants
from posattn.backends.cuda.operands import LOG2E, Members
from posattn.backends.cuda.rotary import rotated_pair
from posattn.plan import Bias, Call, HeadMix

_QUERIES = headmix_rows.ROWS  # of a tile


def _has_table_alone(call: Call, mix: HeadMix) -> bool:
    """Whether the inner bias has a table, and nothing that is looked up otherwise than by distance."""
    inner = mix.inner
    return inner.table is not None and inner.profile is None and inner.dense is None and call.q_positions is None


def _by_distance(call: Call, mix: HeadMix) -> Members:
    """The inner table, if it is alone, at every distance that a tile can meet."""
    least, greatest = distances(call)
    first = least - 1 - backward_config(call).block_m
    count = greatest + 1 + _QUERIES + 8 - first
    members: Members = {"diagonals": count, "first_distance": first}
    table = mix.inner.table
    if table is not None and _has_table_alone(call, mix):
        members["by_distance"] = operands.by_distance(table.values, table.first, first, count)
    return members


def backward(
    call: Call,
    mix: HeadMix,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    """The gradients named in `needs`, those of parameters in float32."""
    device, heads, width = call.q.device, call.q.shape[1], mix.w1.shape[0]
    group = heads // call.k.shape[1]
    dim, dim_v = dims(call)
    q, k = (headmix_forward.rows(x) for x in rotated_pair(call, call.q, call.k))
    v, grad = headmix_forward.rows(call.v), headmix_forward.rows(grad_out)
    config, shared = backward_config(call), backward_shared_bytes(call, mix)
    values, common = headmix_forward.common(call, mix, config, shared)

    delta = (out.float() * grad_out.float()).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.float()
    # The kernel's logits are without b2, which is constant along a row.
    minus_lse2 = torch.where(lse.isinf(), -torch.inf, (mix.b2.float()[:, None] - lse) * LOG2E)
    slots = all_blocks(call, k.shape[2], k_max(call), config.block_m)
    rows = headmix_rows.padded_count(call)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=device)

    results = {
        "dq": zeros(heads, rows * dim),
        "dk": zeros(*q.shape[:2], k.shape[2], dim),
        "dv": zeros(*q.shape[:2], k.shape[2], dim_v),
        "dw1": zeros(slots * config.mlp_warps, width, inputs(call, mix)),
        "db1": zeros(slots * config.mlp_warps, width),
        "dw2": zeros(slots * config.mlp_warps, heads, width),
    }
    values.update(_by_distance(call, mix))
    diagonals = values["diagonals"] if _has_table_alone(call, mix) else None
    inner = _bias_sums(call, mix.inner, "inner.", needs, slots, values["inner"], diagonals)
    outer = _bias_sums(call, call.plan.bias, "", needs, slots, values["outer"])
    if call.deterministic:
        inner["units"] = bias_units(call, mix.inner, grad_out, delta, most_into_inner(mix, heads))
        outer["units"] = bias_units(call, call.plan.bias, grad_out, delta)
        results["dq_semaphore"] = torch.zeros(1 + heads * rows // _QUERIES, dtype=torch.int32, device=device)
    values.update({"k": k, "v": v, "k_strides": operands.strides(k), "v_strides": operands.strides(v), **results})
    values["tiles"] = headmix_rows.tiles(call, q, grad, minus_lse2, -delta)
    values.update({"dinner": _with_strides(inner), "douter": _with_strides(outer), "rows": rows})
    blocks = -(-k_max(call) // config.block_m)
    values["shape"] = {**values["shape"], "k_blocks": blocks}
    by_lane = int(launch.architecture(device)[3:]) >= 90  # it has additions of four numbers
    constants = HeadMixBackwardConstants(
        common, ordered=call.deterministic, vector_adds=by_lane, want_inner=bool(inner.keys() - {"units"})
    )
    launch.run(
        "headmix/backward.cu", "headmix_backward", "HeadMixBackwardParams", constants, values,
        (blocks * sequences(call),), 32 * config.warps, shared, device,
    )  # fmt: skip

    grads = {name: results[f"d{name}"].sum(0) for name in ("w1", "b1", "w2")}
    by_key = {"k": results["dk"][..., : call.k.shape[3]], "v": results["dv"][..., : call.v.shape[3]]}
    grads.update({name: x.unflatten(1, (-1, group)).sum(2).to(call.q.dtype) for name, x in by_key.items()})
    dq = headmix_rows.queries_gradient(call, results["dq"], dim, by_lane) * call.scale
    grads["q"] = dq[..., : call.q.shape[3]].to(call.q.dtype)
    dq, dk = rotated_pair(call, grads["q"], grads["k"], back=True)
    grads.update(q=dq[..., : call.q.shape[3]], k=dk[..., : call.k.shape[3]])
    sees = ~lse.isinf() & (gradients.padded_rows(call, _QUERIES) >= 0)[:, None]
    # b2 shifts all logits of a row alike, so it moves the log-sum-exp, and weight between the keys and a sink.
    grads["b2"] = zeros(heads) if grad_lse is None else torch.where(sees, grad_lse.float(), 0.0).sum((0, 2))
    if call.sinks is not None:
        # Rows that see nothing but the sink have their log-sum-exp from it.
        grads["sinks"] = sink_gradient(call.sinks, lse, torch.where(sees, delta, 0.0))
        grads["b2"] = grads["b2"] - grads["sinks"]
    first = values["inner"]["table_first"] if diagonals is None else values["first_distance"]
    grads.update(_bias_gradients(call, mix.inner, "inner.", inner, first, values["inner"]["psi_first"]))
    outer_first = values["outer"]["table_first"], values["outer"]["psi_first"]
    grads.update(_bias_gradients(call, call.plan.bias, "", outer, *outer_first))
    return {name: grads[name].contiguous() for name in needs}


def _bias_sums(
    call: Call,
    bias: Bias,
    prefix: str,
    needs: frozenset[str],
    slots: int,
    operand: Members,
    diagonals: int | None = None,
) -> Members:
    """BiasGradParams: zeroed sums for what is wanted of a bias, for the entries that the kernel's `operand` has; of a
    table by distance if `diagonals` are given."""
    wanted = {name.removeprefix(prefix) for name in needs if name.startswith("inner.") == bool(prefix)}
    heads = call.q.shape[1]
    sums: Members = {}
    dtype = torch.int64 if call.deterministic else torch.float32

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=call.q.device)

    if "slope" in wanted:
        sums["slope"] = torch.zeros((slots, heads), device=call.q.device)
    if "table" in wanted and bias.table is not None:
        sums["table"] = zeros(*operand["table"].shape) if diagonals is None else zeros(heads, diagonals)
    if bias.profile is not None and "psi" in wanted:
        sums["psi"] = zeros(*operand["psi"].shape)
    if bias.profile is not None and wanted & LINES:
        sums["row_scale"] = zeros(headmix_rows.padded_count(call))
        sums["segments"] = zeros(heads, 2, bias.profile.knots.shape[0] + 1)
    if "dense" in wanted and bias.dense is not None:
        sums["dense"] = zeros(*bias.dense.bias.shape)
    return sums


def _with_strides(sums: Members) -> Members:
    if "dense" not in sums:
        return sums
    return {**sums, "dense_strides": operands.pair_strides(sums["dense"])}


def _bias_gradients(
    call: Call, bias: Bias, prefix: str, sums: Members, table_first: int, psi_first: int
) -> dict[str, Tensor]:
    """From sums; *_first: the distances of the first ones."""
    grads: dict[str, Tensor] = {}
    if "units" in sums:
        whole = {name: in_ones(x, sums["units"]) for name, x in sums.items() if x.dtype == torch.int64}
        sums = {**sums, **whole}
    if "slope" in sums and bias.slope is not None:
        grads["slope"] = slope_gradient(call, bias.slope, by_sequence(call, sums["slope"]))
    if "table" in sums and bias.table is not None:
        length = bias.table.values.shape[1]
        grads["table"] = by_entry(sums["table"], table_first, bias.table.first, length)
    if "psi" in sums and bias.profile is not None:
        length = bias.profile.psi.shape[0]
        grads["psi"] = by_entry(sums["psi"][None], psi_first, bias.profile.first, length)[0]
    if "segments" in sums and bias.profile is not None:
        grads["segment_intercept"], grads["segment_slope"] = sums["segments"].unbind(1)
        grads["row_scale"] = gradients.row_scale(call, bias.profile, sums["row_scale"], _QUERIES)
    if "dense" in sums:
        grads["dense"] = sums["dense"]
    return {prefix + name: grad for name, grad in grads.items()}
