"""Tensors that an encoding is given by its caller: their copies, and what reset_parameters gives them back."""

from __future__ import annotations

import torch
from torch import Tensor

from posattn.errors import ArgumentValueError


def copied(values: Tensor) -> Tensor:
    """A copy without a graph, on the device of values; on meta while models are made there."""
    meta = torch.get_default_device().type == "meta"
    return values.detach().to("meta") if meta else values.detach().clone()


def remembered(values: Tensor) -> Tensor | None:
    """The numbers to go back to, on the CPU; None for a tensor on meta, which has none."""
    return None if values.is_meta else values.detach().to("cpu", copy=True)


def restore(name: str, tensor: Tensor, initial: Tensor | None) -> None:
    """What was remembered, into tensor. ValueError if that is None."""
    if initial is None:
        raise ArgumentValueError(
            f"{name}: expected numbers to reset to, got a tensor that was made on the meta device, which has none; "
            'make it with device="cpu", or load a state_dict instead'
        )
    with torch.no_grad():
        tensor.copy_(initial)
