"""Encodings whose parameters are replaced by tensors that follow from them: with gradients summed over ranks, or whole
where a rank has a part."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from posattn.distributed.gathered import SumGradients
from posattn.distributed.group import Group
from posattn.encodings.base import Context, Encoding
from posattn.errors import ArgumentValueError
from posattn.plan import Plan
from posattn.validation import is_dtensor


class LocalParameters(Encoding):
    """An encoding with `local` tensors, by name, for its parameters."""

    def __init__(self, inner: Encoding, local: dict[str, Tensor]) -> None:
        super().__init__()
        self.inner, self.local = inner, local
        self.num_heads, self.needs_positions = inner.num_heads, inner.needs_positions
        self.has_bias, self.sole_operands = inner.has_bias, inner.sole_operands
        self.fractional, self.fused = inner.fractional, inner.fused

    def build(self, context: Context) -> Plan:
        found: Plan = functional_call(self.inner, self.local, (context,))
        return found


def summed(position: Encoding, group: Group) -> Encoding:
    """`position` with gradients of its parameters that are summed over the group."""
    named = {name: parameter for name, parameter in position.named_parameters() if parameter.requires_grad}
    if not named or not torch.is_grad_enabled():
        return position
    tensors: tuple[Tensor, ...] = SumGradients.apply(group, *named.values())  # type: ignore[no-untyped-call]
    return LocalParameters(position, dict(zip(named, tensors)))


def differentiated(position: Encoding | None) -> list[Tensor]:
    """The tensors that the gradients of a plan are for."""
    if position is None:
        return []
    local = [module.local for module in position.modules() if isinstance(module, LocalParameters)]
    found = list(local[0].values()) if local else list(position.parameters())
    return [tensor for tensor in found if tensor.requires_grad]


def check_whole(position: Encoding | None) -> None:
    """ValueError for parameters that are DTensors, beside q, k and v that are none."""
    if position is None or any(isinstance(module, LocalParameters) for module in position.modules()):
        return
    for name, parameter in position.named_parameters():
        if is_dtensor(parameter):
            raise ArgumentValueError(
                f"position: expected parameters that are whole on this rank, got a DTensor in {name}: give q, k and v "
                "as DTensors of its mesh, or, where fully_shard made it, apply that to the model and not to the "
                "encoding"
            )
