"""A Call as a flat list of tensors, a list of ints and one static string, and back.

A torch.library schema takes no dataclass, so the operators of ops.py carry a Call in this form. Operands that the call
does not use are not in the list: the static string, `spec`, names those that are. Integers that may be symbolic under
torch.compile (lengths, first distances) travel beside it, so that a new length is not a new graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from posattn.plan import (
    Bias,
    Call,
    Decay,
    Dense,
    Gated,
    HeadMix,
    Mask,
    Plan,
    Profile,
    RelativeKeys,
    Rotary,
    Slope,
    Table,
)
from posattn.positions import offset_bounds

_BIAS_GRADS = (
    "slope",
    "table",
    "psi",
    "row_scale",
    "segment_slope",
    "segment_intercept",
    "dense",
    "decay_q",
    "decay_k",
)

# The names that a backend's backward may be asked for.
_OWN_GRADS = ("q", "k", "v", "scale", "w1", "b1", "w2", "b2", "sinks", "gated", "q_rows", "k_rows", "u", "v_shift")
DIFFERENTIABLE = frozenset((*_OWN_GRADS, *_BIAS_GRADS, *(f"inner.{name}" for name in _BIAS_GRADS)))

MAX_K = 3  # where `ints` holds it
_NO_LIMIT = -1  # a window side of None, which `ints` cannot hold


@dataclass(frozen=True)
class Flat:
    """`operands` are the tensors beside q, k and v, named by `spec`; `ints` are described in `flatten`."""

    operands: list[Tensor]
    ints: list[int]
    spec: str


@dataclass(frozen=True)
class Layout:
    """A parsed spec."""

    backend: str
    form: str
    flags: frozenset[str]
    names: tuple[str, ...]


@lru_cache(maxsize=1024)
def parse(spec: str) -> Layout:
    backend, form, flags, names = spec.split("|")
    return Layout(backend, form, frozenset(flags.split(",")), tuple(names.split(",")) if names else ())


def flatten(call: Call, backend: str) -> Flat:
    """ints: window left, window right, max_q, max_k; the least and greatest offset, where one is given; then the firsts
    of each bias that is there, outer before inner: of its table, of its profile's distances, of its profile's rows;
    then that of relative keys."""
    mask, plan = call.mask, call.plan
    ints = [_NO_LIMIT if mask.left is None else mask.left, _NO_LIMIT if mask.right is None else mask.right]
    ints += [mask.max_q, mask.max_k]
    ints += offset_bounds(mask.offset, mask.offset_range) or ()
    names: list[str] = []
    operands: list[Tensor] = []
    flags: list[str] = []

    def put(name: str, operand: Tensor | None) -> None:
        if operand is not None:
            names.append(name)
            operands.append(operand)

    def put_bias(bias: Bias, prefix: str) -> None:
        if bias.slope is not None:
            put(prefix + "slope", bias.slope.slope)
            if bias.slope.signed:
                flags.append(prefix + "signed")
        if bias.table is not None:
            put(prefix + "table", bias.table.values)
            ints.append(bias.table.first)
        if bias.profile is not None:
            profile = bias.profile
            put(prefix + "psi", profile.psi)
            put(prefix + "row_scale", profile.row_scale)
            put(prefix + "knots", profile.knots)
            put(prefix + "segment_slope", profile.segment_slope)
            put(prefix + "segment_intercept", profile.segment_intercept)
            ints.extend((profile.first, profile.row_first))
        if bias.dense is not None:
            put(prefix + "dense", bias.dense.bias)
        if bias.decay is not None:
            put(prefix + "decay_q", bias.decay.q)
            put(prefix + "decay_k", bias.decay.k)

    if plan.rotary is not None:
        put("q_cos", plan.rotary.q_cos)
        put("q_sin", plan.rotary.q_sin)
        put("k_cos", plan.rotary.k_cos)
        put("k_sin", plan.rotary.k_sin)
        if plan.rotary.interleaved:
            flags.append("interleaved")
    put_bias(plan.bias, "")
    form = ""
    if plan.mix is not None:
        form = plan.mix.form
        if plan.mix.edge == "paper":
            flags.append("paper_edge")
        put("w1", plan.mix.w1)
        put("b1", plan.mix.b1)
        put("w2", plan.mix.w2)
        put("b2", plan.mix.b2)
        put_bias(plan.mix.inner, "inner.")
    if plan.gated is not None:
        put("gated", plan.gated.weight)
        if plan.gated.scaled:
            flags.append("gated_scaled")
    if plan.relative is not None:
        put("q_rows", plan.relative.q_rows)
        put("k_rows", plan.relative.k_rows)
        put("rows", plan.relative.rows)
        put("u", plan.relative.u)
        put("v_shift", plan.relative.v)
        ints.append(plan.relative.first)
    if mask.causal:
        flags.append("causal")
    if mask.offset is not None:
        flags.append("offset")
    if call.deterministic:
        flags.append("deterministic")
    if call.tokens_first:
        flags.append("tokens_first")
    put("boolean", mask.boolean)
    put("offset", mask.offset if isinstance(mask.offset, Tensor) else None)
    put("k_lengths", mask.k_lengths)
    put("k_starts", mask.k_starts)
    put("q_segments", mask.q_segments)
    put("k_segments", mask.k_segments)
    put("cu_seqlens_q", mask.cu_seqlens_q)
    put("cu_seqlens_k", mask.cu_seqlens_k)
    put("sinks", call.sinks)
    put("q_positions", call.q_positions)
    put("k_positions", call.k_positions)
    put("seed", call.seed)
    put("block_table", call.block_table)
    put("scale", call.scale_tensor)
    return Flat(operands, ints, f"{backend}|{form}|{','.join(flags)}|{','.join(names)}")


def unflatten(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: list[Tensor],
    ints: list[int],
    scale: float,
    softcap: float,
    dropout_p: float,
    spec: str,
) -> Call:
    layout = parse(spec)
    named = dict(zip(layout.names, operands))
    flags = layout.flags
    left, right, max_q, max_k, *others = ints
    rest = iter(others)
    offset_range = (next(rest), next(rest)) if "offset" in flags else None
    offset = named.get("offset") if offset_range is None or "offset" in named else offset_range[0]

    def take_bias(prefix: str) -> Bias:
        slope = named.get(prefix + "slope")
        table = named.get(prefix + "table")
        psi = named.get(prefix + "psi")
        dense = named.get(prefix + "dense")
        decay_q = named.get(prefix + "decay_q")
        return Bias(
            None if slope is None else Slope(slope, prefix + "signed" in flags),
            None if table is None else Table(table, next(rest)),
            None
            if psi is None
            else Profile(
                psi=psi,
                first=next(rest),
                row_scale=named[prefix + "row_scale"],
                row_first=next(rest),
                knots=named[prefix + "knots"],
                segment_slope=named[prefix + "segment_slope"],
                segment_intercept=named[prefix + "segment_intercept"],
            ),
            None if dense is None else Dense(dense),
            None if decay_q is None else Decay(decay_q, named[prefix + "decay_k"]),
        )

    rotary = None
    if "q_cos" in named:
        rotary = Rotary(named["q_cos"], named["q_sin"], named["k_cos"], named["k_sin"], "interleaved" in flags)
    bias = take_bias("")
    mix = None
    if layout.form:
        edge = "paper" if "paper_edge" in flags else "causal"
        weights = named["w1"], named["b1"], named["w2"], named["b2"]
        mix = HeadMix(*weights, layout.form, take_bias("inner."), edge)
    gated = Gated(named["gated"], "gated_scaled" in flags) if "gated" in named else None
    relative = None
    if "q_rows" in named or "k_rows" in named:
        shifts = named.get("u"), named.get("v_shift")
        relative = RelativeKeys(named.get("q_rows"), named.get("k_rows"), next(rest), named.get("rows"), *shifts)
    mask = Mask(
        causal="causal" in flags,
        offset=offset,
        left=None if left == _NO_LIMIT else left,
        right=None if right == _NO_LIMIT else right,
        boolean=named.get("boolean"),
        k_lengths=named.get("k_lengths"),
        k_starts=named.get("k_starts"),
        q_segments=named.get("q_segments"),
        k_segments=named.get("k_segments"),
        cu_seqlens_q=named.get("cu_seqlens_q"),
        cu_seqlens_k=named.get("cu_seqlens_k"),
        max_q=max_q,
        max_k=max_k,
        offset_range=offset_range if isinstance(offset, Tensor) else None,
    )
    scale_tensor = named.get("scale")
    return Call(
        q=q,
        k=k,
        v=v,
        plan=Plan(rotary, mix, bias, gated=gated, relative=relative),
        mask=mask,
        scale=scale if scale_tensor is None else float(scale_tensor),
        softcap=softcap,
        sinks=named.get("sinks"),
        q_positions=named.get("q_positions"),
        k_positions=named.get("k_positions"),
        dropout_p=dropout_p,
        seed=named.get("seed"),
        deterministic="deterministic" in flags,
        tokens_first="tokens_first" in flags,
        scale_tensor=scale_tensor,
        block_table=named.get("block_table"),
    )
