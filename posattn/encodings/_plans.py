"""What is done to a plan as a whole, whatever its operands: a walk, a copy, a slice of its heads, a look for NaN."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from posattn.plan import Bias, Decay, Dense, Gated, HeadMix, Places, Plan, Profile, RelativeKeys, Rotary, Slope, Table

# The fields of each part of a plan.
_FIELDS: dict[type, tuple[str, ...]] = {
    kind: tuple(field.name for field in fields(kind))
    for kind in (Rotary, Slope, Table, Profile, Dense, Decay, Bias, HeadMix, Places, Gated, RelativeKeys, Plan)
}

# The one infinity that an operand may hold, by the name of its field: a bias that forbids, a knot that is not there.
_INFINITY = {"values": -math.inf, "bias": -math.inf, "knots": math.inf}


def named_operands(part: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a plan or of a part of it, by its path, such as "bias.table.values"."""
    for name in _FIELDS[type(part)]:
        value = getattr(part, name)
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif type(value) in _FIELDS:
            yield from named_operands(value, f"{prefix}{name}.")


def copied(plan: Plan) -> Plan:
    """The same plan in memory of its own, differentiable."""
    copy: Plan = pytree.tree_map(torch.clone, plan)
    return copy


def head_slice(plan: Plan, first: int, count: int) -> Plan:
    """The plan of heads first .. first + count - 1. Operands that all heads share stay; the slices are views."""
    if plan.mix is not None:
        raise ValueError(
            "position: expected an encoding whose heads stand alone, to take some of them, got one with a DAPE: its "
            "MLP needs the logits of all heads"
        )

    def of(operand: Tensor, dim: int) -> Tensor:
        return operand if operand.shape[dim] == 1 else operand.narrow(dim, first, count)

    slope, table, profile, dense = plan.bias.slope, plan.bias.table, plan.bias.profile, plan.bias.dense
    if slope is not None:
        slope = replace(slope, slope=of(slope.slope, -1))
    if table is not None:
        table = replace(table, values=of(table.values, 0))
    if profile is not None:
        a, c = of(profile.segment_slope, 0), of(profile.segment_intercept, 0)
        profile = replace(profile, segment_slope=a, segment_intercept=c)
    if dense is not None:
        dense = Dense(of(dense.bias, 1))
    decay = plan.bias.decay
    if decay is not None:
        decay = Decay(of(decay.q, 1), of(decay.k, 1))
    amplitude = None if plan.amplitude is None else of(plan.amplitude, 1)
    gated = None if plan.gated is None else replace(plan.gated, weight=of(plan.gated.weight, 0))
    relative = plan.relative
    if relative is not None:
        tensors = (relative.q_rows, relative.k_rows, relative.u, relative.v)
        q_rows, k_rows, u, v = (None if x is None else of(x, 0) for x in tensors)
        relative = replace(relative, q_rows=q_rows, k_rows=k_rows, u=u, v=v)
    rotary, bias = _rotary_slice(plan.rotary, first, count), Bias(slope, table, profile, dense, decay)
    return replace(plan, rotary=rotary, bias=bias, amplitude=amplitude, gated=gated, relative=relative)


def _rotary_slice(rotary: Rotary | None, first: int, count: int) -> Rotary | None:
    """Where heads differ, those of the queries and the keys' heads that they read."""
    if rotary is None or rotary.q_cos.dim() == 3 or rotary.q_cos.shape[1] == 1:
        return rotary
    group = max(rotary.q_cos.shape[1] // rotary.k_cos.shape[1], 1)
    k_first, k_end = first // group, (first + count - 1) // group + 1
    q_cos, q_sin = (x.narrow(1, first, count) for x in (rotary.q_cos, rotary.q_sin))
    k_cos, k_sin = (
        x if x.shape[1] == 1 else x.narrow(1, k_first, k_end - k_first) for x in (rotary.k_cos, rotary.k_sin)
    )
    return Rotary(q_cos, q_sin, k_cos, k_sin, rotary.interleaved)


def check_values(encoding: nn.Module, plan: Plan) -> None:
    """ValueError for a NaN in a parameter (it may not reach the plan of this call) or in the plan, or for an infinity
    that gives one there, where a look costs no wait.

    A sum is far cheaper than a comparison of every element, and finite only where all elements are. Rotation tables
    that were found finite are not looked at again: those of a plain call serve many (rope.py).
    """
    rotary = plan.rotary
    if rotary is not None and "_finite" in vars(rotary):
        plan = replace(plan, rotary=None, amplitude=None, places=None)
    named = encoding.named_parameters() if encoding._parameters or encoding._modules else ()
    with torch.no_grad():
        for name, parameter in named:
            if _readable(parameter) and math.isnan(parameter.sum().item()) and parameter.isnan().any():
                raise ValueError(f"{type(encoding).__name__}.{name}: expected finite values, got NaN")
        for name, operand in named_operands(plan):
            if _readable(operand) and not math.isfinite(operand.sum().item()):
                _check_operand(type(encoding).__name__, name, operand)
    if rotary is not None and not (rotary.q_cos.requires_grad or rotary.k_cos.requires_grad):
        object.__setattr__(rotary, "_finite", True)


def _check_operand(owner: str, name: str, operand: Tensor) -> None:
    allowed = _INFINITY.get(name.rpartition(".")[2])
    wrong = operand[~operand.isfinite()]
    if allowed is not None:
        wrong = wrong[wrong != allowed]
    if wrong.numel():
        got = "NaN" if wrong.isnan().any() else f"{wrong[0].item()}"
        raise ValueError(f"{owner}: expected a plan of finite values, got {got} in {name}")


def _readable(tensor: Tensor) -> bool:
    """True if a look at the values costs no wait for a device and they are real, not traced or batched ones."""
    return (
        tensor.is_cpu
        and type(tensor) in (Tensor, nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _flatten(part: object) -> tuple[list[Any], Any]:
    values = [(name, getattr(part, name)) for name in _FIELDS[type(part)]]
    inner = [(name, value) for name, value in values if isinstance(value, Tensor) or type(value) in _FIELDS]
    names = tuple(name for name, _ in inner)
    return [value for _, value in inner], (names, tuple(item for item in values if item[0] not in names))


def _register(kind: type) -> None:
    def unflatten(children: Iterable[Any], context: Any) -> object:
        names, rest = context
        return kind(**dict(zip(names, children)), **dict(rest))

    pytree.register_pytree_node(kind, _flatten, unflatten)


# So that torch sees the tensors in what a module returns: fully_shard hangs its backward pass on them.
for _kind in _FIELDS:
    _register(_kind)
