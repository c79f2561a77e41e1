"""Host side of HeadMix's backward pass: which kernels run for a call, and how their sums become gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from posattn.backends.common.fixed_point import in_ones, most_into_inner, units
from posattn.backends.common.operands import all_blocks, k_max, power_of_two, q_max, sequences
from posattn.backends.common.reductions import by_entry, by_sequence, row_scale_gradient, sink_gradient, slope_gradient
from posattn.backends.triton.arguments import Arguments, Launch
from posattn.backends.triton.attention_backward import (
    grad_like,
    row_statistics,
    summed_over,
)
from posattn.backends.triton.attention_forward import turned
from posattn.backends.triton.configs.headmix import backward_tile
from posattn.backends.triton.configs.launch_config import Tile
from posattn.backends.triton.headmix_forward import concat, input_arguments, mix_arguments
from posattn.kernels.headmix.backward_bias import mixed_gradient_by_tile
from posattn.kernels.headmix.backward_kv import mixed_backward_kv
from posattn.kernels.headmix.backward_q import mixed_backward_q
from posattn.plan import Bias, Call, HeadMix


def backward(
    call: Call,
    mix: HeadMix,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    needs: frozenset[str],
    launch: Launch,
    arch: str,
) -> dict[str, Tensor]:
    """The gradients named in `needs`."""
    rotary = call.plan.rotary
    rows = row_statistics(launch, out, lse, grad_out, grad_lse)
    # The kernels' logits leave b2 out.
    rows["Lse2"] = rows["Lse2"] - mix.b2.float()[:, None] / math.log(2.0)
    inputs = {**input_arguments(call, launch), **rows, "num_sequences": sequences(call)}
    tile = backward_tile(arch, call)
    arguments = mix_arguments(call, mix, tile, inputs)

    grads: dict[str, Tensor] = {}
    if "sinks" in needs and call.sinks is not None:
        grads["sinks"] = sink_gradient(call.sinks, lse, rows["Delta"])
    if "b2" in needs:
        grads["b2"] = _shift_gradient(call, lse, grad_lse, rows["Delta"])
    if needs & {"k", "v"}:
        grads.update(_key_gradients(call, arguments, needs, launch, tile))
    if needs - {"k", "v", "sinks", "b2"}:
        grads.update(_query_gradients(call, mix, arguments, needs, launch, tile))
    for prefix, bias in (("", call.plan.bias), ("inner.", mix.inner)):
        found = _bias_gradients(call, mix, bias, arguments, prefix, needs, launch, tile)
        grads.update({prefix + name: grad for name, grad in found.items()})
    if rotary is not None:
        for name, cos, sin in (("q", rotary.q_cos, rotary.q_sin), ("k", rotary.k_cos, rotary.k_sin)):
            if name in needs:
                grads[name] = turned(launch, grads[name], cos, sin, rotary.interleaved, call.q.dtype, sign=-1)
    return {name: grads[name] for name in needs}


def _shift_gradient(call: Call, lse: Tensor, grad_lse: Tensor | None, delta: Tensor) -> Tensor:
    """[Hq], b2's: it shifts all logits of a row, which moves the log-sum-exp, and weight from the sink to keys."""
    grad = torch.zeros_like(delta)
    if grad_lse is not None:
        grad += torch.where(lse.isneginf(), 0.0, grad_lse.float())
    if call.sinks is not None:
        return grad.sum((0, 2)) - sink_gradient(call.sinks, lse, delta)
    return grad.sum((0, 2))


def _query_gradients(
    call: Call, mix: HeadMix, arguments: Arguments, needs: frozenset[str], launch: Launch, tile: Tile
) -> dict[str, Tensor]:
    q = call.q
    heads, width = q.shape[1], mix.w1.shape[0]
    heads_padded, width_padded = power_of_two(heads), power_of_two(width)
    blocks = -(-q_max(call) // tile.block_m)
    programs = blocks * sequences(call)
    count = all_blocks(call, q.shape[2], q_max(call), tile.block_m)

    def slots(*shape: int) -> Tensor:
        return torch.zeros((count, *shape), dtype=torch.float32, device=q.device)

    weights = bool(needs & {"w1", "b1", "w2"})
    by_unit = slots(width_padded) if weights and arguments.values["B1"] is not None else None
    sums: dict[str, Any] = {
        "DW1X": slots(heads_padded, width_padded) if weights else None,
        "DW1B": slots(heads_padded, width_padded) if weights and concat(mix) else None,
        "DB1": by_unit,
        "DW2": slots(heads_padded, width_padded) if weights else None,
    }
    values: dict[str, Any] = {"DQ": grad_like(call, q)}
    for prefix, name, bias in (("", "D", call.plan.bias), ("inner.", "DInner", mix.inner)):
        wanted = {prefix + key for key in ("row_scale", "segment_slope", "segment_intercept")}
        profile = bias.profile if needs & wanted else None
        values[f"{name}Slope"] = slots(heads_padded) if prefix + "slope" in needs else None
        values[f"{name}RowScale"] = values[f"{name}Segments"] = None
        if profile is not None:
            values[f"{name}RowScale"] = q.new_zeros((q.shape[0], q.shape[2]), dtype=torch.float32)
            values[f"{name}Segments"] = slots(2, heads_padded, profile.knots.shape[0] + 1)
    # Output rows or the MLP's sums, not both: together they do not fit in registers.
    for part in (values, sums) if weights else (values,):
        given = {**dict.fromkeys((*values, *sums)), **part}
        arguments.with_(given, {}).launch_with(
            launch, mixed_backward_q, (programs,), tile.num_warps, tile.num_stages, tile.registers
        )

    grads = {"q": values["DQ"]}
    if weights:
        w1 = sums["DW1X"].sum(0)[:heads, :width].T
        if concat(mix):
            w1b = sums["DW1B"].sum(0)
            w1 = torch.cat([w1, w1b[:heads, :width].T], dim=1)
        grads["w1"], grads["w2"] = w1, sums["DW2"].sum(0)[:heads, :width]
        # The spare head that carries b1 (mix_arguments) has its gradient too.
        grads["b1"] = w1b[heads, :width] if by_unit is None else by_unit.sum(0)[:width]
    for prefix, name, bias in (("", "D", call.plan.bias), ("inner.", "DInner", mix.inner)):
        slope, segments = values[f"{name}Slope"], values[f"{name}Segments"]
        if slope is not None and bias.slope is not None:
            grads[prefix + "slope"] = slope_gradient(call, bias.slope, by_sequence(call, slope)[:, :heads])
        if segments is not None and bias.profile is not None:
            lines = segments.sum(0)[:, :heads]
            grads[prefix + "segment_intercept"], grads[prefix + "segment_slope"] = lines[0], lines[1]
            grads[prefix + "row_scale"] = row_scale_gradient(call, bias.profile, values[f"{name}RowScale"])
    return grads


def _key_gradients(
    call: Call, arguments: Arguments, needs: frozenset[str], launch: Launch, tile: Tile
) -> dict[str, Tensor]:
    """By query head, then summed over the heads that share a key-value head."""
    k, v = call.k, call.v
    batch, heads = call.q.shape[:2]
    group = heads // k.shape[1]
    programs = -(-k_max(call) // tile.block_n) * sequences(call)
    exact = group > 1 or call.plan.rotary is not None
    grads: dict[str, Tensor] = {}
    for name, x, dtype in (
        ("k", k, torch.float32 if exact else k.dtype),
        ("v", v, torch.float32 if group > 1 else v.dtype),
    ):
        if name not in needs:
            continue
        grad = x.new_zeros((batch, heads, *x.shape[2:]), dtype=dtype)
        values = {"DK": grad if name == "k" else None, "DV_": grad if name == "v" else None}
        arguments.with_(values, {}).launch_with(
            launch, mixed_backward_kv, (programs,), tile.num_warps, tile.num_stages, tile.registers
        )
        if group > 1:
            grad = grad.unflatten(1, (-1, group)).sum(2)
        grads[name] = grad if name == "k" and call.plan.rotary is not None else grad.to(x.dtype)
    return grads


def _band_range(call: Call, block: int) -> tuple[int, int]:
    """(distance at the corner of the first band, number of bands) so that the bands hold every implicit distance."""
    first_corner = -(q_max(call) - 1) - (block - 1)
    return first_corner, -(-(k_max(call) + block - 1 - first_corner) // block)


def _fold_bands(bands: Tensor, block: int) -> Tensor:
    """[H, bands, 2 * block] of overlapping bands to [H, (bands + 1) * block] sums; entry 0 is one block below the
    first corner."""
    heads, count, _ = bands.shape
    total = bands.new_zeros((heads, count + 1, block))
    total[:, :-1] += bands[:, :, :block]
    total[:, 1:] += bands[:, :, block:]
    return total.view(heads, -1)


def _bias_gradients(
    call: Call,
    mix: HeadMix,
    bias: Bias,
    arguments: Arguments,
    prefix: str,
    needs: frozenset[str],
    launch: Launch,
    tile: Tile,
) -> dict[str, Tensor]:
    q, k = call.q, call.k
    heads, q_tokens, k_tokens = q.shape[1], q.shape[2], k.shape[2]
    explicit = call.q_positions is not None
    packed = call.mask.cu_seqlens_q is not None
    table = bias.table if prefix + "table" in needs else None
    profile = bias.profile if prefix + "psi" in needs else None
    dense = bias.dense.bias if bias.dense is not None and prefix + "dense" in needs else None
    nothing: dict[str, Any] = dict.fromkeys(("DTable", "DPsi", "DDense", "TableUnits", "PsiUnits", "DenseUnits"))
    nothing.update(dict.fromkeys(("stride_gdb", "stride_gdh", "stride_gt", "first_corner", "batches_each"), 0))
    constants = {"OF_INNER": bool(prefix), "SHARED_HEADS": False, "SUMMED": 0}
    grads: dict[str, Tensor] = {}
    if (table is not None or profile is not None) and not explicit:
        block = tile.block_n
        first_corner, bands = _band_range(call, block)
        by_head = (
            torch.empty((heads, bands, 2 * block), dtype=torch.float32, device=q.device) if table is not None else None
        )
        psi = torch.empty((1, bands, 2 * block), dtype=torch.float32, device=q.device) if profile is not None else None
        values = {
            **nothing,
            "DTable": by_head,
            "DPsi": psi,
            "stride_gt": bands * 2 * block,
            "first_corner": first_corner,
        }
        arguments.with_(values, {**constants, "ALONG_DIAGONAL": True}).launch_with(
            launch, mixed_gradient_by_tile, (bands,), tile.num_warps, tile.num_stages, tile.registers
        )
        start = first_corner - block
        if table is not None and by_head is not None:
            grads["table"] = by_entry(_fold_bands(by_head, block), start, table.first, table.values.shape[1])
        if profile is not None and psi is not None:
            grads["psi"] = by_entry(_fold_bands(psi, block), start, profile.first, profile.psi.shape[0])[0]
    scatter = explicit and (table is not None or profile is not None)
    if scatter or dense is not None:
        out_batches = sequences(call) if scatter or packed or dense is None else dense.shape[0]
        target, summed = None, None
        if dense is not None:
            summed = summed_over(dense, q_tokens, k_tokens)
            shape = [1 if packed else out_batches, dense.shape[1], q_tokens, k_tokens]
            if summed is not None:
                shape[summed] = 1
            target = torch.zeros(shape, dtype=torch.float32 if summed is None else torch.int64, device=q.device)
            constants.update(SHARED_HEADS=dense.shape[1] == 1, SUMMED=summed or 0)
        values = {
            **nothing,
            "DDense": target,
            "stride_gdb": 0 if target is None else target.stride(0),
            "stride_gdh": 0 if target is None else target.stride(1),
            "stride_gt": 0 if table is None else table.values.shape[1],
            "batches_each": sequences(call) // out_batches,
        }
        most = most_into_inner(mix, heads) if prefix else 1.0
        if summed is not None:
            values["DenseUnits"] = units(call, arguments.values, most)
        if scatter and table is not None:
            values["DTable"] = torch.zeros(table.values.shape, dtype=torch.int64, device=q.device)
            values["TableUnits"] = units(call, arguments.values, most)
        if scatter and profile is not None:
            values["DPsi"] = torch.zeros(profile.psi.shape, dtype=torch.int64, device=q.device)
            steepest = profile.segment_slope.abs().max() * profile.row_scale.abs().max()
            values["PsiUnits"] = units(call, arguments.values, most * steepest)
        tiles = -(-q_max(call) // tile.block_m) * -(-k_max(call) // tile.block_n)
        arguments.with_(values, {**constants, "ALONG_DIAGONAL": False}).launch_with(
            launch, mixed_gradient_by_tile, (tiles * out_batches,), tile.num_warps, tile.num_stages, tile.registers
        )
        if target is not None and dense is not None:
            total = target if summed is None else in_ones(target, values["DenseUnits"])
            grads["dense"] = total.sum_to_size(dense.shape)
        for name, sums, unit in (("table", "DTable", "TableUnits"), ("psi", "DPsi", "PsiUnits")):
            if values[sums] is not None:
                grads[name] = in_ones(values[sums], values[unit])
    return grads
