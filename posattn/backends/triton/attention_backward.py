"""Host side of the plain family's backward pass: which kernels run for a call, and how their sums become gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from posattn.backends.common.fixed_point import in_ones, units
from posattn.backends.common.operands import all_blocks, k_max, linear, power_of_two, q_max, sequences, slopes
from posattn.backends.common.reductions import (
    LINES,
    by_entry,
    in_documents,
    row_scale_gradient,
    sink_gradient,
    slope_gradient,
)
from posattn.backends.triton.arguments import (
    Launch,
    attention_arguments,
    inputs,
    nothing,
    output_gradient,
    strides,
    unit_stride,
)
from posattn.backends.triton.attention_forward import rotated
from posattn.backends.triton.configs.backward import by_tile_config, main_config
from posattn.backends.triton.configs.launch_config import LaunchConfig
from posattn.backends.triton.reach import queries_in_reach
from posattn.kernels.attention.backward import DistanceSums, Gradients, Order, ProfileSums, attention_backward
from posattn.kernels.attention.backward_bias import DenseGradient, EntrySums, gradient_by_tile
from posattn.kernels.attention.bwd_preprocess import prepare
from posattn.kernels.attention.profile_gradient import parts, parts_size
from posattn.kernels.common.arguments import Inputs, OutputGradient
from posattn.kernels.common.config import BackwardConfig
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
) -> OutputGradient:
    """What backward kernels need of the rows; lse2 with a row's share of a linear bias of `slope`, counted from the
    first of `tile` rows."""
    out, grad_out = unit_stride(out), unit_stride(grad_out)
    batch, heads, tokens, dim = out.shape
    delta = torch.empty(lse.shape, dtype=torch.float32, device=out.device)
    lse2 = torch.empty_like(delta)
    block = 32
    grad_lse = None if grad_lse is None else grad_lse.float().contiguous()
    args = (
        *(out, grad_out, lse.contiguous(), grad_lse, delta, lse2, strides(out), strides(grad_out)),
        *(*slopes(slope), heads, tokens),
    )
    constexprs = {"DV": dim, "BLOCK_DV": power_of_two(dim), "BLOCK_M": block, "TILE": tile}
    launch(prepare, (-(-tokens // block) * batch * heads,), args, constexprs, 4, 1, None)
    return output_gradient(grad_out, lse2, delta)


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
        q = rotated(launch, q, rotary.q_cos, rotary.q_sin, rotary.interleaved, q.dtype)
        k = rotated(launch, k, rotary.k_cos, rotary.k_sin, rotary.interleaved, k.dtype)
    explicit = call.q_positions is not None
    by_tile = needs & ({"dense", *_BY_DISTANCE} if explicit else {"dense"})
    main = main_config(arch, call)
    slope = call.plan.bias.slope
    # One tile for all rows: packed documents start anywhere, and gradient_by_tile has tiles of its own.
    shares = slope is not None and linear(call, call.plan.bias) and call.mask.cu_seqlens_q is None and not by_tile
    upstream = row_statistics(launch, out, lse, grad_out, grad_lse, slope if shares else None, main.block_m)
    given = inputs(q, k, v)

    grads: dict[str, Tensor] = {}
    if "sinks" in needs and call.sinks is not None:
        grads["sinks"] = sink_gradient(call.sinks, lse, in_documents(call, upstream.delta))
    if needs - by_tile - {"sinks"}:
        grads.update(_gradients(call, given, upstream, needs, launch, main, shares))
    if by_tile:
        grads.update(_bias_gradients(call, given, upstream, by_tile, launch, by_tile_config(arch, call)))
    if rotary is not None:
        for name, cos, sin in (("q", rotary.q_cos, rotary.q_sin), ("k", rotary.k_cos, rotary.k_sin)):
            if name in needs:
                grads[name] = rotated(launch, grads[name], cos, sin, rotary.interleaved, call.q.dtype, sign=-1)
    return {name: grads[name] for name in needs}


def grad_like(call: Call, x: Tensor) -> Tensor:
    """Where a gradient of q or k goes; float32 if it is still to be rotated back, so that it is rounded once.

    Zeroed where tokens may belong to no sequence, which no program writes."""
    mask = call.mask
    partial = any(x is not None for x in (mask.cu_seqlens_q, mask.k_lengths, mask.k_starts))
    create = torch.zeros if partial else torch.empty
    dtype = x.dtype if call.plan.rotary is None else torch.float32
    return create(x.shape, dtype=dtype, device=x.device)


def _rows(call: Call, config: LaunchConfig) -> int:
    """Rows of DQ a head: whole tiles, but for packed documents, which start anywhere."""
    tokens = call.q.shape[2]
    return tokens if call.mask.cu_seqlens_q is not None else -(-tokens // config.block_m) * config.block_m


def _query_gradient(call: Call, dq: Tensor, config: LaunchConfig) -> Tensor:
    """The gradient of the queries from what attention_backward left in DQ [B, H, rows, BLOCK_D].

    With rotary still to be undone it stays float32, so that it is rounded once."""
    batch, heads, _, width = dq.shape
    tokens, dim = call.q.shape[2:]
    out = torch.empty(dq.shape, dtype=call.q.dtype if call.plan.rotary is None else torch.float32, device=dq.device)
    if call.mask.cu_seqlens_q is None:
        # mma_layout.fragments: tiles, blocks of 16 x 8, threads [8, 4], rows 8 apart, columns; the rows are queries or,
        # of a tile that is not spread, dimensions.
        rows, columns = (config.block_m, width) if config.spread else (width, config.block_m)
        dq = dq.view(batch, heads, -1, rows // 16, columns // 8, 8, 4, 2, 2)
        dq = dq.permute(0, 1, 2, *((3, 7, 5, 4, 6, 8) if config.spread else (4, 6, 8, 3, 7, 5)))
    torch.mul(dq, -call.scale, out=out.view(dq.shape))
    return out[:, :, :tokens, :dim].contiguous()


def _gradients(
    call: Call,
    given: Inputs,
    upstream: OutputGradient,
    needs: frozenset[str],
    launch: Launch,
    config: LaunchConfig,
    shares: bool,
) -> dict[str, Tensor]:
    """Those of q, k and v, of slopes and profiles' lines and, over implicit distances, of tables and psi.

    shares: lse2 has each row's share of a linear bias."""
    q, k, v, bias = call.q, call.k, call.v, call.plan.bias
    batch, heads, q_tokens, dim = q.shape
    kv_heads = k.shape[1]
    blocks = -(-k_max(call) // config.block_n)
    count = sequences(call)
    key_blocks = all_blocks(call, k.shape[2], k_max(call), config.block_n) // batch

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=q.device)

    def own(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory of `size` numbers for each program."""
        return torch.empty((batch * kv_heads * key_blocks, size), dtype=dtype, device=q.device)

    # As wide as what the configuration is for: each element of dq must belong to one warp.
    block_d = power_of_two(max(dim, v.shape[3]))
    dk, dv = grad_like(call, k), torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    to = Gradients(
        DQ=zeros(batch, heads, _rows(call, config), block_d),
        DK=dk,
        DV=dv,
        Slope=zeros(batch, heads, key_blocks) if "slope" in needs else None,
    )
    profile = bias.profile
    of_profile = nothing(ProfileSums)
    if needs & LINES and profile is not None:
        of_profile = ProfileSums(
            Segments=zeros(batch, heads, key_blocks, 2, profile.knots.shape[0] + 1),
            RowScale=zeros(batch, q_tokens, dtype=torch.int64),
            units=units(
                call, upstream.grad_out, upstream.delta, profile.segment_slope.abs().max() * profile.psi.abs().max()
            ),
            Parts=own(parts_size(config.block_n, config.block_m, config.num_warps)),
        )

    # Sums by distance, of tables and psi padded as bias_operands pads them.
    beyond = config.block_m + config.block_n

    def sums(entries: Sequence[int], steepest: Tensor | float, dtype: torch.dtype) -> DistanceSums:
        *rows, length = entries
        return DistanceSums(
            Sums=zeros(*rows, length + 2 * beyond, dtype=torch.int64),
            units=units(call, upstream.grad_out, upstream.delta, steepest),
            Bands=own(bands_size(config.block_n, config.block_m), dtype),
        )

    implicit = call.q_positions is None
    of_table = of_psi = nothing(DistanceSums)
    if implicit and "table" in needs and bias.table is not None:
        # The kernel's IN_BF16: the gradient of a logit is made in bfloat16, and so are sums of two.
        in_halves = q.dtype == torch.bfloat16 and call.dropout_p == 0.0 and call.softcap == 0.0
        of_table = sums(bias.table.values.shape, 1.0, torch.bfloat16 if in_halves else torch.float32)
    if implicit and "psi" in needs and profile is not None:
        of_psi = sums(
            profile.psi.shape, profile.segment_slope.abs().max() * profile.row_scale.abs().max(), torch.float32
        )
    warps = parts(config.block_n, config.num_warps)
    arguments = attention_arguments(call, config.block_m, config.block_n)
    reach = queries_in_reach(call, launch, given.q, given.k, config.block_m, config.block_n, arguments)
    arguments.reaching(reach).launch(
        launch,
        attention_backward,
        (blocks * count * kv_heads,),
        config,
        {
            "CONFIG": replace(arguments.config, block_dim=block_d),
            "BACKWARD": BackwardConfig(
                hoist=config.hoist,
                hide=config.hide,
                whole=warps == config.num_warps,
                shares=shares,
                spread=config.spread,
                parts=warps,
            ),
        },
        inputs=given,
        upstream=upstream,
        to=to,
        of_table=of_table,
        of_psi=of_psi,
        of_profile=of_profile,
        order=Order(zeros(1, dtype=torch.int32), zeros(batch, kv_heads, key_blocks, dtype=torch.int32)),
        num_sequences=count,
        k_max=k_max(call),
    )

    grads = {"q": _query_gradient(call, to.DQ, config), "k": dk, "v": dv}
    if to.Slope is not None and bias.slope is not None:
        grads["slope"] = slope_gradient(call, bias.slope, to.Slope.sum(2))
    if of_table.Sums is not None and bias.table is not None:
        found = in_ones(of_table.Sums, of_table.units)
        grads["table"] = by_entry(found, bias.table.first - beyond, bias.table.first, bias.table.values.shape[1])
    if of_psi.Sums is not None and profile is not None:
        found = in_ones(of_psi.Sums, of_psi.units)
        grads["psi"] = by_entry(found[None], profile.first - beyond, profile.first, profile.psi.shape[0])[0]
    if of_profile.Segments is not None and profile is not None:
        segments = of_profile.Segments.sum((0, 2))
        grads["segment_intercept"], grads["segment_slope"] = segments[:, 0], segments[:, 1]
        grads["row_scale"] = row_scale_gradient(call, profile, in_ones(of_profile.RowScale, of_profile.units))
    return grads


def summed_over(dense: Tensor, q_tokens: int, k_tokens: int) -> int | None:
    """The dimension of [B, H, Tq, Tk] over which kernels add up the gradient of a bias that broadcasts over it."""
    if dense.shape[_QUERIES] < q_tokens:
        return _QUERIES
    return _KEYS if dense.shape[_KEYS] < k_tokens else None


def _bias_gradients(
    call: Call, given: Inputs, upstream: OutputGradient, needs: frozenset[str], launch: Launch, config: LaunchConfig
) -> dict[str, Tensor]:
    q, k, bias = call.q, call.k, call.plan.bias
    heads, q_tokens, k_tokens = q.shape[1], q.shape[2], k.shape[2]
    device = q.device
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
    of_dense = DenseGradient(
        Dense=target if summed is None else None,
        Sums=None if summed is None else target,
        units=None if summed is None else units(call, upstream.grad_out, upstream.delta),
        stride_batch=0 if target is None else target.stride(0),
        stride_head=0 if target is None else target.stride(1),
        heads=out_heads,
        batches_each=sequences(call) // out_batches,
        heads_each=heads // out_heads,
    )
    arguments = attention_arguments(call, config.block_m, config.block_n)
    operands = arguments.operands
    of_table = of_psi = nothing(EntrySums)
    if scatter and "table" in needs and bias.table is not None:
        sums = torch.zeros(bias.table.values.shape, dtype=torch.int64, device=device)
        of_table = EntrySums(sums, units(call, upstream.grad_out, upstream.delta))
        # The table is read through the same stride as its gradient is written.
        operands = operands._replace(table=operands.table.contiguous(), table_head=sums.stride(0))
    if scatter and "psi" in needs and bias.profile is not None:
        steepest = bias.profile.segment_slope.abs().max() * bias.profile.row_scale.abs().max()
        sums = torch.zeros(bias.profile.psi.shape, dtype=torch.int64, device=device)
        of_psi = EntrySums(sums, units(call, upstream.grad_out, upstream.delta, steepest))
    tiles = -(-q_max(call) // config.block_m) * -(-k_max(call) // config.block_n)
    arguments.launch(
        launch,
        gradient_by_tile,
        (tiles * out_heads * out_batches,),
        config,
        {"OVER_QUERIES": summed == _QUERIES},
        inputs=given,
        upstream=upstream,
        of_dense=of_dense,
        of_table=of_table,
        of_psi=of_psi,
        q_max=q_max(call),
        k_max=k_max(call),
        operands=operands,
    )
    if target is not None and dense is not None:
        total = target if summed is None else in_ones(target, of_dense.units)
        grads["dense"] = total.sum_to_size(dense.shape)
    if of_table.Sums is not None:
        grads["table"] = in_ones(of_table.Sums, of_table.units)
    if of_psi.Sums is not None:
        grads["psi"] = in_ones(of_psi.Sums, of_psi.units)
    return grads
