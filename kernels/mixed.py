"""Host side of the HeadMix family, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posattn.plan import Bias, Call, HeadMix

from .attention import turned
from .configs_mix import both_key_gradients, mix_tile
from .gradients import (
    band_range,
    clamped,
    fold_bands,
    grad_like,
    row_scale_gradient,
    row_statistics,
    sink_gradient,
    slope_gradient,
)
from .mix_backward_bias import mixed_gradient_by_tile
from .mix_backward_kv import mixed_backward_kv
from .mix_backward_q import mixed_backward_q
from .mix_forward import mixed_forward
from .operands import (
    Arguments,
    Launch,
    bias_arguments,
    common_arguments,
    k_max,
    padded,
    q_max,
    sequences,
    strides,
    unit_stride,
)
from .tiles import Tile


def _inner_name(name: str) -> str:
    return f"Inner{name}" if name[0].isupper() else f"inner_{name}"


def _padded_weight(weight: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """weight.T zero-padded to [rows, columns], as the kernels multiply by it from the right."""
    out = weight.new_zeros((rows, columns), dtype=dtype)
    out[: weight.shape[1], : weight.shape[0]] = weight.T
    return out


def _concat(mix: HeadMix) -> bool:
    return bool(mix.inner) and mix.form != "add"


def mix_arguments(call: Call, mix: HeadMix, tile: Tile) -> Arguments:
    """common_arguments, the inner bias's beside them, and the MLP's weights."""
    arguments = common_arguments(call, tile.block_m, tile.block_n)
    inner = bias_arguments(call, mix.inner, tile.block_m, tile.block_n)
    heads, width = call.q.shape[1], mix.w1.shape[0]
    heads_padded, width_padded = padded(heads), padded(width)
    dtype = call.q.dtype
    b1 = torch.zeros(width_padded, dtype=torch.float32, device=call.q.device)
    b2 = torch.zeros(heads_padded, dtype=torch.float32, device=call.q.device)
    b1[:width], b2[:heads] = mix.b1, mix.b2
    values: dict[str, Any] = {_inner_name(name): value for name, value in inner.values.items()}
    values.update(
        W1X=_padded_weight(mix.w1[:, :heads], heads_padded, width_padded, dtype),
        W1B=_padded_weight(mix.w1[:, heads:], heads_padded, width_padded, dtype) if _concat(mix) else None,
        B1=b1,
        W2=_padded_weight(mix.w2, width_padded, heads_padded, dtype),
        B2=b2,
    )
    constants = {
        "HEADS": heads_padded,
        "WIDTH": width_padded,
        "CONCAT": _concat(mix),
        "RESIDUAL": mix.form != "concat",
        "OUTER": bool(call.plan.bias),
        "INNER": bool(mix.inner),
        **{f"INNER_{name}": inner.constants[name] for name in ("SIGNED", "CLAMP", "KNOTS")},
    }
    return arguments.with_(values, constants)


def _turned_inputs(call: Call, launch: Launch) -> dict[str, Any]:
    q, k, v = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v)
    rotary = call.plan.rotary
    if rotary is not None:
        q = turned(launch, q, rotary.q_cos, rotary.q_sin, rotary.interleaved, q.dtype)
        k = turned(launch, k, rotary.k_cos, rotary.k_sin, rotary.interleaved, k.dtype)
    return {"Q": q, "K": k, "V": v, **strides("q", q), **strides("k", k), **strides("v", v)}


def forward(call: Call, mix: HeadMix, launch: Launch, arch: str) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in q.dtype and the log-sum-exp [B, Hq, Tq] float32."""
    q, v = call.q, call.v
    tile = mix_tile(arch, call)
    create = torch.empty if call.mask.cu_seqlens_q is None else torch.zeros
    out = create((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    lse = create(q.shape[:3], dtype=torch.float32, device=q.device)
    values = {
        **_turned_inputs(call, launch),
        "Out": out,
        "Lse": lse,
        **dict(zip(("stride_ob", "stride_oh", "stride_om"), out.stride())),
    }
    programs = -(-q_max(call) // tile.block_m) * sequences(call)
    mix_arguments(call, mix, tile).with_(values, {}).launch_with(
        launch, mixed_forward, (programs,), tile.num_warps, tile.num_stages
    )
    return out, lse


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
    shared = {**_turned_inputs(call, launch), **row_statistics(launch, out, lse, grad_out, grad_lse)}
    tile = mix_tile(arch, call)
    arguments = mix_arguments(call, mix, tile).with_({**shared, "num_sequences": sequences(call)}, {})

    grads: dict[str, Tensor] = {}
    if "sinks" in needs and call.sinks is not None:
        grads["sinks"] = sink_gradient(call.sinks, lse, shared["Delta"])
    if needs & {"k", "v"}:
        grads.update(_key_gradients(call, arguments, launch, tile, arch))
    if needs - {"k", "v", "sinks"}:
        grads.update(_query_gradients(call, mix, arguments, needs, launch, tile))
    for prefix, bias in (("", call.plan.bias), ("inner.", mix.inner)):
        found = _bias_gradients(call, bias, arguments, prefix, needs, launch, tile)
        grads.update({prefix + name: grad for name, grad in found.items()})
    if rotary is not None:
        for name, cos, sin in (("q", rotary.q_cos, rotary.q_sin), ("k", rotary.k_cos, rotary.k_sin)):
            if name in needs:
                grads[name] = turned(launch, grads[name], cos, sin, rotary.interleaved, call.q.dtype, sign=-1)
    return {name: grads[name] for name in needs}


def _query_gradients(
    call: Call, mix: HeadMix, arguments: Arguments, needs: frozenset[str], launch: Launch, tile: Tile
) -> dict[str, Tensor]:
    q = call.q
    heads, width = q.shape[1], mix.w1.shape[0]
    heads_padded, width_padded = padded(heads), padded(width)
    blocks = -(-q_max(call) // tile.block_m)
    programs = blocks * sequences(call)

    def slots(*shape: int) -> Tensor:
        return torch.zeros((programs, *shape), dtype=torch.float32, device=q.device)

    weights = bool(needs & {"w1", "b1", "w2", "b2"})
    values: dict[str, Any] = {
        "DQ": grad_like(call, q),
        "DW1X": slots(heads_padded, width_padded) if weights else None,
        "DW1B": slots(heads_padded, width_padded) if weights and _concat(mix) else None,
        "DB1": slots(width_padded) if weights else None,
        "DW2": slots(width_padded, heads_padded) if weights else None,
        "DB2": slots(heads_padded) if weights else None,
    }
    for prefix, name, bias in (("", "D", call.plan.bias), ("inner.", "DInner", mix.inner)):
        lines = {prefix + key for key in ("row_scale", "profile_slope", "profile_intercept")}
        profile = bias.profile if needs & lines else None
        values[f"{name}Slope"] = slots(heads_padded) if prefix + "slope" in needs else None
        values[f"{name}RowScale"] = values[f"{name}Segments"] = None
        if profile is not None:
            values[f"{name}RowScale"] = q.new_zeros((q.shape[0], q.shape[2]), dtype=torch.float32)
            values[f"{name}Segments"] = slots(2, heads_padded, profile.knots.shape[0] + 1)
    arguments.with_(values, {}).launch_with(launch, mixed_backward_q, (programs,), tile.num_warps, tile.num_stages)

    grads = {"q": values["DQ"]}
    if weights:
        w1 = values["DW1X"].sum(0)[:heads, :width].T
        if values["DW1B"] is not None:
            w1 = torch.cat([w1, values["DW1B"].sum(0)[:heads, :width].T], dim=1)
        grads["w1"], grads["w2"] = w1, values["DW2"].sum(0)[:width, :heads].T
        grads["b1"], grads["b2"] = values["DB1"].sum(0)[:width], values["DB2"].sum(0)[:heads]
    for prefix, name, bias in (("", "D", call.plan.bias), ("inner.", "DInner", mix.inner)):
        slope, segments = values[f"{name}Slope"], values[f"{name}Segments"]
        if slope is not None and bias.slope is not None:
            by_sequence = slope.view(-1, blocks, heads_padded).sum(1)[:, :heads]
            grads[prefix + "slope"] = slope_gradient(call, bias.slope, by_sequence)
        if segments is not None and bias.profile is not None:
            sums = segments.sum(0)[:, :heads]
            grads[prefix + "profile_intercept"], grads[prefix + "profile_slope"] = sums[0], sums[1]
            grads[prefix + "row_scale"] = row_scale_gradient(call, bias.profile, values[f"{name}RowScale"])
    return grads


def _key_gradients(call: Call, arguments: Arguments, launch: Launch, tile: Tile, arch: str) -> dict[str, Tensor]:
    """By query head, then summed over the heads that share a key-value head."""
    k, v = call.k, call.v
    batch, heads = call.q.shape[:2]
    group = heads // k.shape[1]
    programs = -(-k_max(call) // tile.block_n) * sequences(call)
    exact = group > 1 or call.plan.rotary is not None
    targets = {
        "DK": k.new_zeros((batch, heads, *k.shape[2:]), dtype=torch.float32 if exact else k.dtype),
        "DV_": v.new_zeros((batch, heads, *v.shape[2:]), dtype=torch.float32 if group > 1 else v.dtype),
    }
    for wanted in (("DK", "DV_"),) if both_key_gradients(arch, call) else (("DK",), ("DV_",)):
        values = {name: target if name in wanted else None for name, target in targets.items()}
        arguments.with_(values, {}).launch_with(launch, mixed_backward_kv, (programs,), tile.num_warps, tile.num_stages)
    grads = {"k": targets["DK"], "v": targets["DV_"]}
    if group > 1:
        grads = {name: grad.unflatten(1, (-1, group)).sum(2) for name, grad in grads.items()}
        grads["v"] = grads["v"].to(v.dtype)
        if call.plan.rotary is None:
            grads["k"] = grads["k"].to(k.dtype)
    return grads


def _bias_gradients(
    call: Call, bias: Bias, arguments: Arguments, prefix: str, needs: frozenset[str], launch: Launch, tile: Tile
) -> dict[str, Tensor]:
    q, k = call.q, call.k
    heads, q_tokens, k_tokens = q.shape[1], q.shape[2], k.shape[2]
    explicit = call.q_positions is not None
    packed = call.mask.cu_seqlens_q is not None
    table = bias.table if prefix + "table" in needs else None
    profile = bias.profile if prefix + "psi" in needs else None
    dense = bias.dense.bias if bias.dense is not None and prefix + "dense" in needs else None
    floats = {"dtype": torch.float32, "device": q.device}
    nothing = dict.fromkeys(("DTable", "DPsi", "DDense"))
    nothing.update(dict.fromkeys(("stride_gdb", "stride_gdh", "stride_gt", "first_corner", "batches_each"), 0))
    constants = {"OF_INNER": bool(prefix), "SHARED_HEADS": False}
    grads: dict[str, Tensor] = {}
    if (table is not None or profile is not None) and not explicit:
        block = tile.block_n
        first_corner, bands = band_range(call, block)
        by_head = torch.empty((heads, bands, 2 * block), **floats) if table is not None else None
        psi = torch.empty((1, bands, 2 * block), **floats) if profile is not None else None
        values = {
            **nothing,
            "DTable": by_head,
            "DPsi": psi,
            "stride_gt": bands * 2 * block,
            "first_corner": first_corner,
        }
        arguments.with_(values, {**constants, "ALONG_DIAGONAL": True}).launch_with(
            launch, mixed_gradient_by_tile, (bands,), tile.num_warps, tile.num_stages
        )
        start = first_corner - block
        if table is not None and by_head is not None:
            grads["table"] = clamped(fold_bands(by_head, block), start, table.first, table.values.shape[1])
        if profile is not None and psi is not None:
            grads["psi"] = clamped(fold_bands(psi, block), start, profile.first, profile.psi.shape[0])[0]
    scatter = explicit and (table is not None or profile is not None)
    if scatter or dense is not None:
        out_batches = sequences(call) if scatter or packed or dense is None else dense.shape[0]
        target = None
        if dense is not None:
            shape = (1 if packed else out_batches, dense.shape[1], q_tokens, k_tokens)
            target = torch.zeros(shape, **floats)
            constants["SHARED_HEADS"] = dense.shape[1] == 1
        values = {
            **nothing,
            "DTable": torch.zeros(table.values.shape, **floats) if scatter and table is not None else None,
            "DPsi": torch.zeros(profile.psi.shape, **floats) if scatter and profile is not None else None,
            "DDense": target,
            "stride_gdb": 0 if target is None else target.stride(0),
            "stride_gdh": 0 if target is None else target.stride(1),
            "stride_gt": 0 if table is None else table.values.shape[1],
            "batches_each": sequences(call) // out_batches,
        }
        tiles = -(-q_max(call) // tile.block_m) * -(-k_max(call) // tile.block_n)
        arguments.with_(values, {**constants, "ALONG_DIAGONAL": False}).launch_with(
            launch, mixed_gradient_by_tile, (tiles * out_batches,), tile.num_warps, tile.num_stages
        )
        if target is not None and dense is not None:
            grads["dense"] = target.sum_to_size(dense.shape)
        scattered = {"table": values["DTable"], "psi": values["DPsi"]}
        grads.update({name: grad for name, grad in scattered.items() if grad is not None})
    return grads
