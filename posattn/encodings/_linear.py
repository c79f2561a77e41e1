"""The weight and bias of a linear layer that an encoding reads, and never runs."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn


def weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Those that the layer multiplies with. A quantized layer (torch.ao.quantization.quantize_dynamic replaces every
    nn.Linear of a model) gives them by methods, and its weight rounded to integers and a scale."""
    given = cast(Any, layer)
    if not callable(given.weight):
        return given.weight, given.bias
    weight = given.weight()
    return weight.dequantize() if weight.is_quantized else weight, given.bias()
