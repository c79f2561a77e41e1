"""The launches of the CUDA backward pass, and their scratch."""

from __future__ import annotations

import torch
from torch import Tensor

from posattn.backends.common.fixed_point import bias_units, in_ones
from posattn.backends.common.operands import sequences
from posattn.backends.common.reductions import sink_gradient
from posattn.backends.cuda import backward_operands as summed
from posattn.backends.cuda import launch, operands
from posattn.backends.cuda.backward_pass import Pass, prepared
from posattn.backends.cuda.constants import BackwardConstants, BackwardSm90Constants, TilesConstants
from posattn.backends.cuda.operands import LOG2E, Members
from posattn.plan import Call


def backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients named in `needs`, of a call without HeadMix; those of parameters in float32."""
    of = prepared(call, grad_out, needs)
    rows = _row_statistics(of, out, lse, grad_lse)
    lse2, minus_delta = rows["lse2"], rows["minus_delta"]
    grads: dict[str, Tensor] = {}
    if call.sinks is not None and "sinks" in needs:
        # Padded rows and rows that see nothing have lse2 = +inf.
        grads["sinks"] = sink_gradient(call.sinks, lse2[None] / LOG2E, -minus_delta[None])
    accumulated, sums, grads_of_keys = _main(of, rows)
    if "q" in needs:
        grads["q"] = _rows_of_queries(of, accumulated)
    grads.update(grads_of_keys)
    grads.update(summed.gradients(of, sums))
    return {name: grads[name] for name in needs}


def _row_statistics(of: Pass, out: Tensor, lse: Tensor, grad_lse: Tensor | None) -> dict[str, Tensor]:
    """What backward_rows writes: lse2 and minus_delta [H, rows], row_scale [rows]."""
    out = operands.in_chunks(out)
    shape = (of.call.q.shape[1], of.rows)
    results = {
        "lse2": torch.full(shape, float("inf"), dtype=torch.float32, device=out.device),
        "minus_delta": of.zeros(*shape),
    }
    if of.constants.bias.operands.has_profile:
        results["row_scale"] = of.zeros(of.rows)
    values = {
        "out": out,
        "grad_out": of.grad_out,
        "lse": lse.contiguous(),
        "grad_lse": None if grad_lse is None else grad_lse.float().contiguous(),
        "positions": of.values["positions"],
        "bias": of.values["bias"],
        **results,
        "out_strides": operands.strides(out),
        "grad_out_strides": operands.strides(of.grad_out),
    }
    lanes = max(4, 1 << (of.constants.element.dim_v // 8 - 1).bit_length())
    blocks = -(-of.padded_queries // (32 * of.config.warps // lanes))
    of.run_rows("backward/rows.cu", "backward_rows", "BackwardRowsParams", of.rows_constants(), values, blocks)
    return results


def _rows_of_queries(of: Pass, accumulated: Tensor) -> Tensor:
    """dQ in rows, from accumulators in the order of fragments."""
    call, rotary = of.call, of.call.plan.rotary
    dq = operands.written_by_queries(call, tuple(of.q.shape), of.q.dtype)
    values = {
        "accumulated": accumulated,
        "dq": dq,
        "dq_strides": operands.strides(dq),
        "angles": operands.angles(rotary.q_cos, rotary.q_sin) if rotary is not None else {},
        "scale": call.scale,
    }
    warps = of.padded_queries // 8 * (of.padded_dim // 32)  # each stores eight rows of 32 dimensions
    blocks = -(-warps // of.config.warps)
    of.run_rows("backward/rows.cu", "backward_queries", "BackwardQueriesParams", of.rows_constants(), values, blocks)
    return dq[..., : call.q.shape[3]].contiguous()


def _query_tiles(of: Pass) -> Members:
    """q and grad_out of BackwardParams as the tiles that backward/sm90/backward.cu copies."""
    shape = (of.call.q.shape[1], of.rows * of.padded_dim)
    tiles = {name: torch.empty(shape, dtype=of.q.dtype, device=of.q.device) for name in ("q_tiles", "grad_tiles")}
    values = {name: of.values[name] for name in ("q", "grad_out", "q_strides", "grad_out_strides")}
    own, warps = of.constants, of.constants.warps
    constants = TilesConstants(own.element, own.mask.sequence, warps.padded, warps.block_m, warps.block_n, warps.warps)
    blocks = of.padded_queries // of.config.block_m
    source = "backward/sm90/tiles.cu"
    of.run_rows(source, "backward_tiles", "BackwardTilesParams", constants, {**values, **tiles}, blocks)
    return {"q": tiles["q_tiles"], "grad_out": tiles["grad_tiles"]}


def _with_slope(of: Pass, lse2: Tensor) -> Tensor:
    """lse2 [H, rows] less a linear slope times the row's number in its block (LSE_HAS_SLOPE)."""
    slope, count = of.call.plan.bias.slope, sequences(of.call)
    if slope is None or not of.constants.bias.linear or of.call.q_positions is not None:
        return lse2
    number = torch.arange(of.config.block_m, device=lse2.device) * LOG2E
    by_head = slope.slope.float().reshape(-1, lse2.shape[0]).T  # [H, 1 or B]
    sequence = 1 if of.call.mask.cu_seqlens_q is not None else count
    blocks = lse2.view(lse2.shape[0], sequence, -1, of.config.block_m)
    return (blocks + by_head[:, :, None, None] * number).view_as(lse2)


def _main(of: Pass, rows: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Runs attention_backward: dQ's accumulators, the sums of operands, and the gradients of k and v."""
    call, config, bias = of.call, of.config, of.call.plan.bias
    heads = call.q.shape[1]
    count, device = sequences(call), of.q.device
    accumulated = of.zeros(heads, of.rows * of.padded_dim)
    # Keys of no sequence are written by nobody.
    mask = call.mask
    partial = any(x is not None for x in (mask.cu_seqlens_k, mask.k_lengths, mask.k_starts))
    create = torch.zeros if partial else torch.empty
    dk, dv = (create(x.shape, dtype=x.dtype, device=device) for x in (of.k, of.v))
    sums, units = summed.sums(of), None
    dense = sums.get("ddense")
    dq_semaphore = None
    if call.deterministic:
        if bias:
            units = bias_units(call, bias, of.grad_out, rows["minus_delta"])
        dq_semaphore = torch.zeros(1 + heads * of.rows // config.block_m, dtype=torch.int32, device=device)
    values = {
        **of.values,
        **sums,
        **rows,
        **summed.by_distance(of),
        "dq": accumulated,
        "dk": dk,
        "dv": dv,
        "dq_semaphore": dq_semaphore,
        "dk_strides": operands.strides(dk),
        "dv_strides": operands.strides(dv),
        "ddense_strides": operands.pair_strides(dense),
        "units": units,
        "rows": of.rows,
        "slots": of.slots,
        "diagonals": of.diagonals,
        "first_distance": of.first_distance,
    }
    common = of.constants
    constants: BackwardConstants | BackwardSm90Constants = common
    source = f"backward/{'sm90/' if config.sm90 else ''}backward.cu"
    if config.sm90:
        values.update(_query_tiles(of), lse2=_with_slope(of, rows["lse2"]))
    else:
        constants = BackwardConstants(common, config.grad_stages)
    grid, threads = (of.key_blocks * call.k.shape[1] * count,), 32 * config.warps
    launch.run(
        source, "attention_backward", "BackwardParams", constants, values, grid, threads, common.shared_bytes, device
    )
    keys = {"k": dk[..., : call.k.shape[3]].contiguous(), "v": dv[..., : call.v.shape[3]].contiguous()}
    if units is not None:
        sums = {name: x if x.is_floating_point() else in_ones(x, units) for name, x in sums.items()}
    return accumulated, sums, {name: grad for name, grad in keys.items() if name in of.needs}
