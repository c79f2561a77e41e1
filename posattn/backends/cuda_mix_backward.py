"""Host side of the CUDA backward pass of calls that mix heads (DAPE): one launch, and the gradients that come of it."""

from __future__ import annotations

import torch
from torch import Tensor

from posattn.backends import cuda_gradients as gradients
from posattn.backends import cuda_mix
from posattn.backends import cuda_operands as operands
from posattn.backends.cuda_forward import run, turned
from posattn.backends.cuda_mix import MixTile
from posattn.backends.cuda_operands import Members
from posattn.kernels.operands import k_max, sequences
from posattn.kernels.sums import by_entry, slope_gradient
from posattn.plan import Bias, Call, HeadMix

_LOG2E = 1.4426950408889634
_KEYS, _QUERIES = 16, 24  # of a tile: rows and columns, for logits are held transposed
_MLP_WARPS = 4
_OTHER_REGISTERS = 36  # of a thread, beside dK and dV of its head
_LINES = frozenset(("row_scale", "profile_slope", "profile_intercept"))


def shared_bytes(call: Call, mix: HeadMix) -> int:
    """Dynamic shared memory of headmix_backward; it asserts that this is enough."""
    heads, inputs = call.q.shape[1], cuda_mix.inputs(call, mix)
    dim, dim_v = cuda_mix.dims(call)
    kept = heads * _KEYS * 2 * (2 * dim + dim_v)
    planes = (cuda_mix.planes(call, mix) + heads) * (2 * _KEYS * _QUERIES + 16)
    mixed = -(-max(inputs, heads) // 8) * 8 * (2 * _KEYS * _QUERIES + 16)
    return kept + planes + mixed


def unsupported(call: Call, mix: HeadMix, arch: str) -> str | None:
    """Why the backward kernel cannot run `call`; None if it can."""
    heads, width = call.q.shape[1], mix.w1.shape[0]
    warps = heads + _MLP_WARPS
    registers = 65536 // (32 * warps) if warps <= 32 else 0
    if sum(cuda_mix.dims(call)) // 2 + _OTHER_REGISTERS > registers:
        dims = f"{heads} heads of dimension {max(call.q.shape[3], call.v.shape[3])}"
        return f"its backward kernel keeps dK and dV of all heads in registers, and {dims} do not fit"
    pairs, eights = -(-width // 16), -(-cuda_mix.inputs(call, mix) // 8) + -(-heads // 8)
    if 8 * pairs * eights > registers:
        return f"its backward kernel keeps the MLP and its gradient in registers, and {width} hidden units do not fit"
    if shared_bytes(call, mix) > cuda_mix.shared_limit(arch):
        return f"its backward kernel needs {shared_bytes(call, mix)} bytes of shared memory"
    if call.deterministic:
        return "its backward kernel sums the queries' gradient by atomics, whose order is not deterministic"
    return None


def _padded_rows(call: Call) -> int:
    """Rows of all sequences, each beginning at a multiple of a tile's queries."""
    tokens: int = call.q.shape[2]
    count: int = sequences(call)
    packed = call.mask.cu_seqlens_q is not None
    return (tokens // _QUERIES + count if packed else -(-tokens // _QUERIES) * count) * _QUERIES


def _queries(call: Call, accumulated: Tensor, dim: int) -> Tensor:
    """dQ [B, H, Tq, dim] float32 from sums in the order of the fragments, [H, rows / 8, 8 dim].

    A fragment [16 dimensions, 8 queries] has its rows g and g + 8 at neighbouring dimensions 2 m and 2 m + 1 of lane
    g's run of 8 (4 in the last 32 of an odd dim), its columns at queries 2 t and 2 t + 1.
    """
    heads, wide = call.q.shape[1], dim // 64
    by_step = accumulated.view(heads, -1, dim // 16, 2, 2, 8, 4)
    parts = []
    if wide:
        x = by_step[:, :, : 4 * wide].unflatten(2, (wide, 4))  # [H, T / 8, block, m, dimension, query, g, t]
        parts.append(x.permute(0, 1, 7, 5, 2, 6, 3, 4).flatten(1, 3).flatten(2))
    if dim % 64:
        x = by_step[:, :, 4 * wide :]  # [H, T / 8, m, dimension, query, g, t]
        parts.append(x.permute(0, 1, 6, 4, 5, 2, 3).flatten(1, 3).flatten(2))
    rows = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
    at = gradients.padded_rows(call, _QUERIES)
    return torch.where((at >= 0)[..., None], rows[:, at.clamp(min=0)], 0.0).movedim(0, 1)


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
    dim, dim_v = cuda_mix.dims(call)
    q, k = (cuda_mix.rows(x) for x in cuda_mix.turned_pair(call))
    v, grad = cuda_mix.rows(call.v), cuda_mix.rows(grad_out)
    tile = MixTile(heads, _KEYS, 1, _QUERIES)
    values, constants = cuda_mix.common(call, mix, tile)

    delta = (out.float() * grad_out.float()).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.float()
    # The kernel's logits are without b2, which is constant along a row.
    lse2 = torch.where(lse.isinf(), torch.inf, (lse - mix.b2.float()[:, None]) * _LOG2E)
    blocks = -(-k_max(call) // _KEYS)
    slots, inputs = blocks * sequences(call), cuda_mix.inputs(call, mix)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=device)

    results = {
        "dq": zeros(heads, _padded_rows(call) * dim),
        "dk": zeros(*q.shape[:2], k.shape[2], dim),
        "dv": zeros(*q.shape[:2], k.shape[2], dim_v),
        "dw1": zeros(slots * _MLP_WARPS, width, inputs),
        "db1": zeros(slots * _MLP_WARPS, width),
        "dw2": zeros(slots * _MLP_WARPS, heads, width),
        "db2": zeros(slots, heads),
    }
    inner = _bias_sums(call, mix.inner, "inner.", needs, slots, values["inner"])
    outer = _bias_sums(call, call.plan.bias, "", needs, slots, values["outer"])
    values.update({"q": q, "k": k, "v": v, "grad_out": grad, "lse2": lse2, "delta": delta, **results})
    values.update({f"{n}_strides": operands.strides(x) for n, x in zip(("q", "k", "v", "grad_out"), (q, k, v, grad))})
    values.update({"dinner": _with_strides(inner), "douter": _with_strides(outer), "rows": _padded_rows(call)})
    values["shape"] = {**values["shape"], "k_blocks": blocks}
    shared, warps = shared_bytes(call, mix), heads + _MLP_WARPS
    constants.update({"MLP_WARPS": _MLP_WARPS, "WARPS": warps, "THREADS": 32 * warps})
    constants.update({"SHARED_BYTES": shared, "WANT_INNER": bool(inner)})
    run(
        "mix_backward.cu", "headmix_backward", "MixBackwardParams", constants, values, (slots,), 32 * warps, shared,
        device,
    )  # fmt: skip

    grads = {name: results[f"d{name}"].sum(0) for name in ("w1", "b1", "w2", "b2")}
    rotary = call.plan.rotary
    by_key = {"k": results["dk"][..., : call.k.shape[3]], "v": results["dv"][..., : call.v.shape[3]]}
    grads.update({name: x.unflatten(1, (-1, group)).sum(2).to(call.q.dtype) for name, x in by_key.items()})
    grads["q"] = (_queries(call, results["dq"], dim) * call.scale)[..., : call.q.shape[3]].to(call.q.dtype)
    if rotary is not None:
        grads["q"] = turned(operands.in_chunks(grads["q"]), rotary.q_cos, -rotary.q_sin, rotary)
        grads["k"] = turned(operands.in_chunks(grads["k"]), rotary.k_cos, -rotary.k_sin, rotary)
        grads = {**grads, "q": grads["q"][..., : call.q.shape[3]], "k": grads["k"][..., : call.k.shape[3]]}
    if call.sinks is not None and "sinks" in needs:
        # A sink is a logit without a value; rows that see nothing but it have their log-sum-exp from it.
        weight = torch.exp(call.sinks.float()[:, None] - lse)
        grads["sinks"] = -(torch.where(lse.isinf(), 0.0, weight) * delta).sum((0, 2))
    grads.update(_bias_gradients(call, mix.inner, "inner.", inner, values["inner"]))
    grads.update(_bias_gradients(call, call.plan.bias, "", outer, values["outer"]))
    return {name: grads[name].contiguous() for name in needs}


def _bias_sums(call: Call, bias: Bias, prefix: str, needs: frozenset[str], slots: int, operand: Members) -> Members:
    """BiasGradParams: zeroed sums for what is wanted of a bias, for the entries that the kernel's `operand` has."""
    wanted = {name.removeprefix(prefix) for name in needs if name.startswith("inner.") == bool(prefix)}
    heads = call.q.shape[1]
    sums: Members = {}

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=call.q.device)

    if "slope" in wanted:
        sums["slope"] = zeros(slots, heads)
    if "table" in wanted and bias.table is not None:
        sums["table"] = zeros(*operand["table"].shape)
    if bias.profile is not None and "psi" in wanted:
        sums["psi"] = zeros(*operand["psi"].shape)
    if bias.profile is not None and wanted & _LINES:
        sums["row_scale"] = zeros(_padded_rows(call))
        sums["segments"] = zeros(heads, 2, bias.profile.knots.shape[0] + 1)
    if "dense" in wanted and bias.dense is not None:
        sums["dense"] = zeros(*bias.dense.bias.shape[:2], call.q.shape[2], call.k.shape[2])
    return sums


def _with_strides(sums: Members) -> Members:
    if "dense" not in sums:
        return sums
    dense: Tensor = sums["dense"]
    steps = (0 if size == 1 else step for size, step in zip(dense.shape, dense.stride()))
    return {**sums, "dense_strides": dict(zip(("batch", "head", "query", "key"), steps))}


def _bias_gradients(call: Call, bias: Bias, prefix: str, sums: Members, operand: Members) -> dict[str, Tensor]:
    grads: dict[str, Tensor] = {}
    if "slope" in sums and bias.slope is not None:
        by_sequence = sums["slope"].view(sequences(call), -1, call.q.shape[1]).sum(1)
        grads["slope"] = slope_gradient(call, bias.slope, by_sequence)
    if "table" in sums and bias.table is not None:
        length = bias.table.values.shape[1]
        grads["table"] = by_entry(sums["table"], operand["table_first"], bias.table.first, length)
    if "psi" in sums and bias.profile is not None:
        length = bias.profile.psi.shape[0]
        grads["psi"] = by_entry(sums["psi"][None], operand["psi_first"], bias.profile.first, length)[0]
    if "segments" in sums and bias.profile is not None:
        grads["profile_intercept"], grads["profile_slope"] = sums["segments"].unbind(1)
        grads["row_scale"] = gradients.row_scale(call, bias.profile, sums["row_scale"], _QUERIES)
    if "dense" in sums and bias.dense is not None:
        grads["dense"] = sums["dense"].sum_to_size(bias.dense.bias.shape)
    return {prefix + name: grad for name, grad in grads.items()}
