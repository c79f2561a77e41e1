"""Host side of the plain family's backward pass: which kernels run for a call, and how their sums become gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from posattn.backends.common.fixed_point import in_ones, units
from posattn.backends.common.operands import all_blocks, k_max, linear, power_of_two, q_max, sequences
from posattn.backends.common.reductions import LINES, by_entry, row_scale_gradient, sink_gradient, slope_gradient
from posattn.backends.triton.arguments import Arguments, Launch, common_arguments, slope_arguments, strides, unit_stride
from posattn.backends.triton.attention_forward import turned
from posattn.backends.triton.configs.backward import bias_tile, main_tile
from posattn.backends.triton.configs.launch_config import Tile
from posattn.kernels.attention.backward import attention_backward
from posattn.kernels.attention.backward_bias import gradient_by_tile
from posattn.kernels.attention.bwd_preprocess import prepare
from posattn.kernels.attention.profile_gradient import parts, parts_size
from posattn.kernels.common.diagonals import bands_size
from posattn.plan import Call, Slope

_BY_DISTANCE = frozenset(("table", "psi"))
_QUERIES, _KEYS = 2, 3


def row_statistics(
    launch: Launch,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    slope: Slope | None = None,
    tile: int = 1,
) -> dict[str, Any]:
    """The arguments GradOut, Lse2 and Delta of the backward kernels; Lse2 with a row's share of a linear bias of
    `slope`, counted from the first of `tile` rows."""
    out, grad_out = unit_stride(out), unit_stride(grad_out)
    batch, heads, tokens, dim = out.shape
    delta = torch.empty(lse.shape, dtype=torch.float32, device=out.device)
    lse2 = torch.empty_like(delta)
    block = 32
    values: dict[str, Any] = {
        "Out": out,
        "GradOut": grad_out,
        "Lse": lse.contiguous(),
        "GradLse": None if grad_lse is None else grad_lse.float().contiguous(),
        "Delta": delta,
        "Lse2": lse2,
        **slope_arguments(slope),
        "tokens": tokens,
        "num_heads": heads,
        **dict(zip(("stride_ob", "stride_oh", "stride_om"), out.stride())),
        **dict(zip(("stride_gb", "stride_gh", "stride_gm"), grad_out.stride())),
    }
    constants = {"DV": dim, "BLOCK_DV": power_of_two(dim), "BLOCK_M": block, "TILE": tile}
    grid = (-(-tokens // block) * batch * heads,)
    Arguments(values, constants).launch_with(launch, prepare, grid, num_warps=4, num_stages=1)
    return {key: values[key] for key in ("GradOut", "Lse2", "Delta", "stride_gb", "stride_gh", "stride_gm")}


def backward(
    call: Call,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    needs: frozenset[str],
    launch: Launch,
    arch: str,
) -> dict[str, Tensor]:
    """The gradients named in `needs`, of a call without HeadMix."""
    rotary = call.plan.rotary
    q, k, v = unit_stride(call.q), unit_stride(call.k), unit_stride(call.v)
    if rotary is not None:
        q = turned(launch, q, rotary.q_cos, rotary.q_sin, rotary.interleaved, q.dtype)
        k = turned(launch, k, rotary.k_cos, rotary.k_sin, rotary.interleaved, k.dtype)
    shared: dict[str, Any] = {"Q": q, "K": k, "V": v, **strides("q", q), **strides("k", k), **strides("v", v)}
    explicit = call.q_positions is not None
    by_tile = needs & ({"dense", *_BY_DISTANCE} if explicit else {"dense"})
    main = main_tile(arch, call)
    slope = call.plan.bias.slope
    # One tile for all rows: packed documents start anywhere, and gradient_by_tile has tiles of its own.
    shares = slope is not None and linear(call, call.plan.bias) and call.mask.cu_seqlens_q is None and not by_tile
    shared.update(row_statistics(launch, out, lse, grad_out, grad_lse, slope if shares else None, main.block_m))

    grads: dict[str, Tensor] = {}
    if "sinks" in needs and call.sinks is not None:
        grads["sinks"] = sink_gradient(call.sinks, lse, shared["Delta"])
    if needs - by_tile - {"sinks"}:
        grads.update(_gradients(call, shared, needs, launch, main, shares))
    if by_tile:
        grads.update(_bias_gradients(call, shared, by_tile, launch, bias_tile(arch, call)))
    if rotary is not None:
        for name, cos, sin in (("q", rotary.q_cos, rotary.q_sin), ("k", rotary.k_cos, rotary.k_sin)):
            if name in needs:
                grads[name] = turned(launch, grads[name], cos, sin, rotary.interleaved, call.q.dtype, sign=-1)
    return {name: grads[name] for name in needs}


def grad_like(call: Call, x: Tensor) -> Tensor:
    """Where a gradient of q or k goes; float32 if it is still to be turned back, so that it is rounded once.

    Zeroed where tokens may belong to no sequence, which no program writes."""
    partial = call.mask.cu_seqlens_q is not None or call.mask.k_lengths is not None
    create = torch.zeros if partial else torch.empty
    dtype = x.dtype if call.plan.rotary is None else torch.float32
    return create(x.shape, dtype=dtype, device=x.device)


def _rows(call: Call, tile: Tile) -> int:
    """Rows of DQ a head: whole tiles, but for packed documents, which start anywhere."""
    tokens = call.q.shape[2]
    return tokens if call.mask.cu_seqlens_q is not None else -(-tokens // tile.block_m) * tile.block_m


def _query_gradient(call: Call, dq: Tensor, tile: Tile) -> Tensor:
    """The gradient of the queries from what attention_backward left in DQ [B, H, rows, BLOCK_D].

    With rotary still to be turned back it stays float32, so that it is rounded once."""
    batch, heads, _, width = dq.shape
    tokens, dim = call.q.shape[2:]
    out = torch.empty(dq.shape, dtype=call.q.dtype if call.plan.rotary is None else torch.float32, device=dq.device)
    if call.mask.cu_seqlens_q is None:
        # turns.fragments: tiles, blocks of 16 x 8, threads [8, 4], rows 8 apart, columns; the rows are queries or, of a
        # tile that is not spread, dimensions.
        rows, columns = (tile.block_m, width) if tile.spread else (width, tile.block_m)
        dq = dq.view(batch, heads, -1, rows // 16, columns // 8, 8, 4, 2, 2)
        dq = dq.permute(0, 1, 2, *((3, 7, 5, 4, 6, 8) if tile.spread else (4, 6, 8, 3, 7, 5)))
    torch.mul(dq, -call.scale, out=out.view(dq.shape))
    return out[:, :, :tokens, :dim].contiguous()


def _gradients(
    call: Call, shared: dict[str, Any], needs: frozenset[str], launch: Launch, tile: Tile, shares: bool
) -> dict[str, Tensor]:
    """Those of q, k and v, of slopes and profiles' lines and, over implicit distances, of tables and psi.

    shares: Lse2 has each row's share of a linear bias."""
    q, k, v, bias = call.q, call.k, call.v, call.plan.bias
    batch, heads, q_tokens, dim = q.shape
    kv_heads = k.shape[1]
    blocks = -(-k_max(call) // tile.block_n)
    count = sequences(call)
    key_blocks = all_blocks(call, k.shape[2], k_max(call), tile.block_n) // batch

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=q.device)

    # As wide as what the tile is for: each element of dq must belong to one warp.
    block_d = power_of_two(max(dim, v.shape[3]))
    dq = zeros(batch, heads, _rows(call, tile), block_d)
    dk, dv = grad_like(call, k), torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    dslope = zeros(batch, heads, key_blocks) if "slope" in needs else None
    profile = bias.profile
    lines = bool(needs & LINES)
    drow_scale, row_units, row_parts = None, None, None
    width = 0 if profile is None else profile.knots.shape[0] + 1
    dsegments = zeros(batch, heads, key_blocks, 2, width) if lines else None
    if lines and profile is not None:
        drow_scale = zeros(batch, q_tokens, dtype=torch.int64)
        row_units = units(call, shared, profile.segment_slope.abs().max() * profile.psi.abs().max())
        per_program = parts_size(tile.block_n, tile.block_m, tile.num_warps)
        row_parts = torch.empty((batch * kv_heads * key_blocks, per_program), dtype=torch.float32, device=q.device)

    # Sums by distance, of tables and psi padded as bias_arguments pads them.
    beyond = tile.block_m + tile.block_n
    by_distance: dict[str, Any] = dict.fromkeys(("DTable", "TableUnits", "TableBands", "DPsi", "PsiUnits", "PsiBands"))

    def sum_by_distance(name: str, entries: Sequence[int], steepest: Tensor | float, dtype: torch.dtype) -> None:
        *rows, length = entries
        bands = (batch * kv_heads * key_blocks, bands_size(tile.block_n, tile.block_m))
        by_distance["D" + name] = zeros(*rows, length + 2 * beyond, dtype=torch.int64)
        by_distance[name + "Units"] = units(call, shared, steepest)
        by_distance[name + "Bands"] = torch.empty(bands, dtype=dtype, device=q.device)

    implicit = call.q_positions is None
    # The kernel's IN_BF16: the gradient of a logit is made in bfloat16, and so are sums of two.
    in_halves = q.dtype == torch.bfloat16 and call.dropout_p == 0.0 and call.softcap == 0.0
    if implicit and "table" in needs and bias.table is not None:
        sum_by_distance("Table", bias.table.values.shape, 1.0, torch.bfloat16 if in_halves else torch.float32)
    if implicit and "psi" in needs and profile is not None:
        steepest = profile.segment_slope.abs().max() * profile.row_scale.abs().max()
        sum_by_distance("Psi", profile.psi.shape, steepest, torch.float32)
    values = {
        **shared,
        "DQ": dq,
        "DK": dk,
        "DV_": dv,
        "DSlope": dslope,
        **by_distance,
        "DRowScale": drow_scale,
        "RowUnits": row_units,
        "RowParts": row_parts,
        "DSegments": dsegments,
        "Ticket": zeros(1, dtype=torch.int32),
        "Progress": zeros(batch, kv_heads, key_blocks, dtype=torch.int32),
        "num_sequences": count,
    }
    warps = parts(tile.block_n, tile.num_warps)
    choices = {
        "HOIST": tile.hoist,
        "HIDE": tile.hide,
        "WHOLE": warps == tile.num_warps,
        "SHARES": shares,
        "SPREAD": tile.spread,
        "PARTS": warps,
    }
    arguments = common_arguments(call, tile.block_m, tile.block_n)
    arguments = arguments.with_(values, {**choices, "BLOCK_D": block_d})
    arguments.launch_with(
        launch, attention_backward, (blocks * count * kv_heads,), tile.num_warps, tile.num_stages, tile.registers
    )

    grads = {"q": _query_gradient(call, dq, tile), "k": dk, "v": dv}
    if dslope is not None and bias.slope is not None:
        grads["slope"] = slope_gradient(call, bias.slope, dslope.sum(2))
    if by_distance["DTable"] is not None and bias.table is not None:
        sums = in_ones(by_distance["DTable"], by_distance["TableUnits"])
        grads["table"] = by_entry(sums, bias.table.first - beyond, bias.table.first, bias.table.values.shape[1])
    if by_distance["DPsi"] is not None and profile is not None:
        sums = in_ones(by_distance["DPsi"], by_distance["PsiUnits"])
        grads["psi"] = by_entry(sums[None], profile.first - beyond, profile.first, profile.psi.shape[0])[0]
    if dsegments is not None and drow_scale is not None and row_units is not None and profile is not None:
        segments = dsegments.sum((0, 2))
        grads["segment_intercept"], grads["segment_slope"] = segments[:, 0], segments[:, 1]
        grads["row_scale"] = row_scale_gradient(call, profile, in_ones(drow_scale, row_units))
    return grads


def summed_over(dense: Tensor, q_tokens: int, k_tokens: int) -> int | None:
    """The dimension of [B, H, Tq, Tk] over which kernels add up the gradient of a bias that broadcasts over it."""
    if dense.shape[_QUERIES] < q_tokens:
        return _QUERIES
    return _KEYS if dense.shape[_KEYS] < k_tokens else None


def _bias_gradients(
    call: Call, shared: dict[str, Any], needs: frozenset[str], launch: Launch, tile: Tile
) -> dict[str, Tensor]:
    q, k, bias = call.q, call.k, call.plan.bias
    heads, q_tokens, k_tokens = q.shape[1], q.shape[2], k.shape[2]
    device = q.device
    arguments = common_arguments(call, tile.block_m, tile.block_n)
    arguments = arguments.with_({**shared, "num_sequences": sequences(call)}, {})
    grads: dict[str, Tensor] = {}
    scatter = bool(needs & _BY_DISTANCE)
    dense = bias.dense.bias if bias.dense is not None and "dense" in needs else None
    out_batches = sequences(call) if scatter or dense is None else dense.shape[0]
    out_heads = heads if scatter or dense is None else dense.shape[1]
    if call.mask.cu_seqlens_q is not None:
        out_batches = sequences(call)
    target, summed = None, None
    if dense is not None:
        packed = call.mask.cu_seqlens_q is not None
        summed = summed_over(dense, q_tokens, k_tokens)
        shape = [1 if packed else out_batches, out_heads, q_tokens, k_tokens]
        if summed is not None:
            shape[summed] = 1
        create = torch.zeros if packed or summed is not None else torch.empty
        dtype = torch.float32 if summed is None else torch.int64
        target = create(shape, dtype=dtype, device=device)
    values: dict[str, Any] = {
        "DDense": target if summed is None else None,
        "DSums": None if summed is None else target,
        "SumUnits": None if summed is None else units(call, shared),
        "stride_gdb": 0 if target is None else target.stride(0),
        "stride_gdh": 0 if target is None else target.stride(1),
        "out_heads": out_heads,
        "batches_each": sequences(call) // out_batches,
        "heads_each": heads // out_heads,
        **dict.fromkeys(("DTable", "DPsi", "TableUnits", "PsiUnits")),
    }
    if scatter and "table" in needs and bias.table is not None:
        values["DTable"] = torch.zeros(bias.table.values.shape, dtype=torch.int64, device=device)
        values["TableUnits"] = units(call, shared)
    if scatter and "psi" in needs and bias.profile is not None:
        values["DPsi"] = torch.zeros(bias.profile.psi.shape, dtype=torch.int64, device=device)
        steepest = bias.profile.segment_slope.abs().max() * bias.profile.row_scale.abs().max()
        values["PsiUnits"] = units(call, shared, steepest)
    if values["DTable"] is not None:
        # The table is read through the same stride as its gradient is written.
        values["Table"] = arguments.values["Table"].contiguous()
        values["stride_table_h"] = values["DTable"].stride(0)
    tiles = -(-q_max(call) // tile.block_m) * -(-k_max(call) // tile.block_n)
    arguments.with_(values, {"OVER_QUERIES": summed == _QUERIES}).launch_with(
        launch, gradient_by_tile, (tiles * out_heads * out_batches,), tile.num_warps, tile.num_stages, tile.registers
    )
    if target is not None and dense is not None:
        total = target if summed is None else in_ones(target, values["SumUnits"])
        grads["dense"] = total.sum_to_size(dense.shape)
    if values["DTable"] is not None:
        grads["table"] = in_ones(values["DTable"], values["TableUnits"])
    if values["DPsi"] is not None:
        grads["psi"] = in_ones(values["DPsi"], values["PsiUnits"])
    return grads
