"""Host side of HeadMix's backward pass: which kernels run for a call, and how their sums become gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from posattn.backends.common.fixed_point import in_ones, most_into_inner, units
from posattn.backends.common.operands import all_blocks, distances, k_max, power_of_two, q_max, sequences
from posattn.backends.common.reductions import (
    by_entry,
    by_sequence,
    in_documents,
    row_scale_gradient,
    sink_gradient,
    slope_gradient,
)
from posattn.backends.triton.arguments import Launch, nothing
from posattn.backends.triton.attention_backward import (
    grad_like,
    row_statistics,
    summed_over,
)
from posattn.backends.triton.attention_forward import rotated
from posattn.backends.triton.configs.headmix import backward_config
from posattn.backends.triton.headmix_forward import MixArguments, concat, mix_arguments, rotated_inputs
from posattn.kernels.common.arguments import OutputGradient
from posattn.kernels.headmix.backward_bias import Target, headmix_gradient_by_tile
from posattn.kernels.headmix.backward_kv import headmix_backward_kv
from posattn.kernels.headmix.backward_q import MlpGradients, RowGradients, headmix_backward_q
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
    rows = rows._replace(lse2=rows.lse2 - mix.b2.float()[:, None] / math.log(2.0))
    config = backward_config(arch, call)
    arguments = mix_arguments(call, mix, config, rotated_inputs(call, launch), rows.grad_out)

    grads: dict[str, Tensor] = {}
    if "sinks" in needs and call.sinks is not None:
        grads["sinks"] = sink_gradient(call.sinks, lse, in_documents(call, rows.delta))
    if "b2" in needs:
        grads["b2"] = _shift_gradient(call, lse, grad_lse, rows.delta)
    if needs & {"k", "v"}:
        grads.update(_key_gradients(call, arguments, rows, needs, launch))
    if needs - {"k", "v", "sinks", "b2"}:
        grads.update(_query_gradients(call, mix, arguments, rows, needs, launch))
    for prefix, bias in (("", call.plan.bias), ("inner.", mix.inner)):
        found = _bias_gradients(call, mix, bias, arguments, rows, prefix, needs, launch)
        grads.update({prefix + name: grad for name, grad in found.items()})
    if rotary is not None:
        for name, cos, sin in (("q", rotary.q_cos, rotary.q_sin), ("k", rotary.k_cos, rotary.k_sin)):
            if name in needs:
                grads[name] = rotated(launch, grads[name], cos, sin, rotary.interleaved, call.q.dtype, sign=-1)
    return {name: grads[name] for name in needs}


def _shift_gradient(call: Call, lse: Tensor, grad_lse: Tensor | None, delta: Tensor) -> Tensor:
    """[Hq], b2's: it shifts all logits of a row, which moves the log-sum-exp, and weight from the sink to keys."""
    grad = torch.zeros_like(delta)
    if grad_lse is not None:
        grad += in_documents(call, torch.where(lse.isneginf(), 0.0, grad_lse.float()))
    if call.sinks is not None:
        return grad.sum((0, 2)) - sink_gradient(call.sinks, lse, in_documents(call, delta))
    return grad.sum((0, 2))


def _query_gradients(
    call: Call, mix: HeadMix, arguments: MixArguments, upstream: OutputGradient, needs: frozenset[str], launch: Launch
) -> dict[str, Tensor]:
    q, block_m = call.q, arguments.config.block_m
    heads, width = q.shape[1], mix.w1.shape[0]
    heads_padded, width_padded = power_of_two(heads), power_of_two(width)
    programs = -(-q_max(call) // block_m) * sequences(call)
    count = all_blocks(call, q.shape[2], q_max(call), block_m)

    def slots(*shape: int) -> Tensor:
        return torch.zeros((count, *shape), dtype=torch.float32, device=q.device)

    weights = bool(needs & {"w1", "b1", "w2"})
    of_mlp = nothing(MlpGradients)
    if weights:
        of_mlp = MlpGradients(
            W1X=slots(heads_padded, width_padded),
            W1B=slots(heads_padded, width_padded) if concat(mix) else None,
            B1=slots(width_padded) if arguments.weights.b1 is not None else None,
            W2=slots(heads_padded, width_padded),
        )

    def of_bias(prefix: str, bias: Bias) -> RowGradients:
        wanted = {prefix + key for key in ("row_scale", "segment_slope", "segment_intercept")}
        profile = bias.profile if needs & wanted else None
        return RowGradients(
            Slope=slots(heads_padded) if prefix + "slope" in needs else None,
            RowScale=None if profile is None else q.new_zeros((q.shape[0], q.shape[2]), dtype=torch.float32),
            Segments=None if profile is None else slots(2, heads_padded, profile.knots.shape[0] + 1),
        )

    dq, of_outer, of_inner = grad_like(call, q), of_bias("", call.plan.bias), of_bias("inner.", mix.inner)
    absent = nothing(MlpGradients), nothing(RowGradients)
    # Output rows or the MLP's sums, not both: together they do not fit in registers.
    by_query = (dq, absent[0], of_outer, of_inner)
    by_weight = (None, of_mlp, absent[1], absent[1])
    for part in (by_query, by_weight) if weights else (by_query,):
        wanted = dict(zip(("DQ", "of_mlp", "of_outer", "of_inner"), part))
        arguments.launch(launch, headmix_backward_q, (programs,), upstream=upstream, q_max=q_max(call), **wanted)

    grads = {"q": dq}
    if weights:
        w1 = of_mlp.W1X.sum(0)[:heads, :width].T
        if concat(mix):
            w1b = of_mlp.W1B.sum(0)
            w1 = torch.cat([w1, w1b[:heads, :width].T], dim=1)
        grads["w1"], grads["w2"] = w1, of_mlp.W2.sum(0)[:heads, :width]
        # The spare head that carries b1 (mix_arguments) has its gradient too.
        grads["b1"] = w1b[heads, :width] if of_mlp.B1 is None else of_mlp.B1.sum(0)[:width]
    for prefix, found, bias in (("", of_outer, call.plan.bias), ("inner.", of_inner, mix.inner)):
        if found.Slope is not None and bias.slope is not None:
            grads[prefix + "slope"] = slope_gradient(call, bias.slope, by_sequence(call, found.Slope)[:, :heads])
        if found.Segments is not None and bias.profile is not None:
            lines = found.Segments.sum(0)[:, :heads]
            grads[prefix + "segment_intercept"], grads[prefix + "segment_slope"] = lines[0], lines[1]
            grads[prefix + "row_scale"] = row_scale_gradient(call, bias.profile, found.RowScale)
    return grads


def _key_gradients(
    call: Call, arguments: MixArguments, upstream: OutputGradient, needs: frozenset[str], launch: Launch
) -> dict[str, Tensor]:
    """By query head, then summed over the heads that share a key-value head."""
    k, v = call.k, call.v
    batch, heads = call.q.shape[:2]
    group = heads // k.shape[1]
    programs = -(-k_max(call) // arguments.config.block_n) * sequences(call)
    exact = group > 1 or call.plan.rotary is not None
    grads: dict[str, Tensor] = {}
    for name, x, dtype in (
        ("k", k, torch.float32 if exact else k.dtype),
        ("v", v, torch.float32 if group > 1 else v.dtype),
    ):
        if name not in needs:
            continue
        grad = x.new_zeros((batch, heads, *x.shape[2:]), dtype=dtype)
        arguments.launch(
            launch,
            headmix_backward_kv,
            (programs,),
            upstream=upstream,
            k_max=k_max(call),
            DK=grad if name == "k" else None,
            DV=grad if name == "v" else None,
        )
        if group > 1:
            grad = grad.unflatten(1, (-1, group)).sum(2)
        grads[name] = grad if name == "k" and call.plan.rotary is not None else grad.to(x.dtype)
    return grads


def _band_range(call: Call, block: int) -> tuple[int, int]:
    """(distance at the corner of the first band, number of bands) so that the bands hold every implicit distance."""
    least, greatest = distances(call)
    first_corner = least - (block - 1)
    return first_corner, -(-(greatest + block - first_corner) // block)


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
    arguments: MixArguments,
    upstream: OutputGradient,
    prefix: str,
    needs: frozenset[str],
    launch: Launch,
) -> dict[str, Tensor]:
    q, k = call.q, call.k
    heads, q_tokens, k_tokens = q.shape[1], q.shape[2], k.shape[2]
    explicit = call.q_positions is not None
    packed = call.mask.cu_seqlens_q is not None
    table = bias.table if prefix + "table" in needs else None
    profile = bias.profile if prefix + "psi" in needs else None
    dense = bias.dense.bias if bias.dense is not None and prefix + "dense" in needs else None
    common: dict[str, Any] = {
        "upstream": upstream,
        "num_sequences": sequences(call),
        "q_max": q_max(call),
        "k_max": k_max(call),
    }
    constexprs = {"OF_INNER": bool(prefix), "SHARED_HEADS": False, "SUMMED": 0}
    empty = nothing(Target)._replace(table_head=0, dense_batch=0, dense_head=0)
    grads: dict[str, Tensor] = {}
    if (table is not None or profile is not None) and not explicit:
        block = arguments.config.block_n
        first_corner, bands = _band_range(call, block)
        by_head = (
            torch.empty((heads, bands, 2 * block), dtype=torch.float32, device=q.device) if table is not None else None
        )
        psi = torch.empty((1, bands, 2 * block), dtype=torch.float32, device=q.device) if profile is not None else None
        arguments.launch(
            launch,
            headmix_gradient_by_tile,
            (bands,),
            {**constexprs, "ALONG_DIAGONAL": True},
            **common,
            to=empty._replace(Table=by_head, Psi=psi, table_head=bands * 2 * block),
            first_corner=first_corner,
            batches_each=0,
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
            constexprs.update(SHARED_HEADS=dense.shape[1] == 1, SUMMED=summed or 0)
        most = most_into_inner(mix, heads) if prefix else 1.0

        def units_for(factor: Tensor | float) -> Tensor:
            return units(call, upstream.grad_out, upstream.delta, factor)

        def zeros(like: Tensor) -> Tensor:
            return torch.zeros(like.shape, dtype=torch.int64, device=q.device)

        to = empty._replace(
            Dense=target,
            dense_units=None if summed is None else units_for(most),
            dense_batch=0 if target is None else target.stride(0),
            dense_head=0 if target is None else target.stride(1),
            table_head=0 if table is None else table.values.shape[1],
        )
        if scatter and table is not None:
            to = to._replace(Table=zeros(table.values), table_units=units_for(most))
        if scatter and profile is not None:
            steepest = profile.segment_slope.abs().max() * profile.row_scale.abs().max()
            to = to._replace(Psi=zeros(profile.psi), psi_units=units_for(most * steepest))
        tiles = -(-q_max(call) // arguments.config.block_m) * -(-k_max(call) // arguments.config.block_n)
        arguments.launch(
            launch,
            headmix_gradient_by_tile,
            (tiles * out_batches,),
            {**constexprs, "ALONG_DIAGONAL": False},
            **common,
            to=to,
            first_corner=0,
            batches_each=sequences(call) // out_batches,
        )
        if target is not None and dense is not None:
            total = target if summed is None else in_ones(target, to.dense_units)
            grads["dense"] = total.sum_to_size(dense.shape)
        for name, sums, unit in (("table", to.Table, to.table_units), ("psi", to.Psi, to.psi_units)):
            if sums is not None:
                grads[name] = in_ones(sums, unit)
    return grads
