"""T5's attention with its bias as a table over the distance: O(N), from the module's own weight."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

# Families whose attention hands `compute_bias(query_length, key_length, ...)` to the interface as `position_bias`.
LAYERS = frozenset(
    (
        "T5Attention",
        "MT5Attention",
        "UMT5Attention",
        "LongT5Attention",
        "Pop2PianoAttention",
        "Pix2StructTextAttention",
        "SwitchTransformersAttention",
    )
)
_CROSS = ("EncDecAttention", "encoder_decoder_attention")


def convert_t5(model: nn.Module) -> int:
    """Change what a model has of these layers, and count them."""
    count = 0
    for module in model.modules():
        for name, child in module.named_children():
            layer: Any = child
            if type(layer).__name__ not in LAYERS:
                continue
            count += 1
            if name in _CROSS:
                layer._posattn_bias = "none"
                layer.forward = MethodType(cross_forward, layer)
                layer.compute_bias = MethodType(no_bias, layer)
            else:
                layer._posattn_bias = "table"
                layer.compute_bias = MethodType(table_bias, layer)
    return count


def table_bias(self: Any, query_length: int, key_length: int, device: Any = None, past_seen_tokens: Any = 0) -> Tensor:
    """The bias at the distances 1 - query_length .. key_length - 1 (query minus key), [1, H, 1, their number].

    Where the queries sit among the keys (past_seen_tokens) is the mask's to say.
    """
    weight = self.relative_attention_bias.weight
    distance = torch.arange(1 - query_length, key_length, device=weight.device if device is None else device)
    if type(self).__name__ == "UMT5Attention":
        bucket = self._relative_position_bucket(-distance)
    else:
        bucket = self._relative_position_bucket(
            -distance,
            bidirectional=not self.is_decoder,
            num_buckets=self.relative_attention_num_buckets,
            max_distance=self.relative_attention_max_distance,
        )
    return self.relative_attention_bias(bucket).t()[None, :, None]


def cross_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Attention to the encoder has no bias, and needs no zeros [1, H, Tq, Tk] to say so."""
    forward = type(self).forward
    if type(self).__name__ != "UMT5Attention":
        if kwargs.get("position_bias") is None:
            kwargs["position_bias"] = no_bias(self)
        return forward(self, hidden_states, *args, **kwargs)
    # UMT5's layers take none from outside, and ask `compute_bias` only if they have a bias.
    self.has_relative_attention_bias = True
    try:
        return forward(self, hidden_states, *args, **kwargs)
    finally:
        self.has_relative_attention_bias = False


def no_bias(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    """A bias that `attention_forward` drops, by the layer's `_posattn_bias`."""
    weight = self.q.weight
    return torch.zeros(1, 1, 1, 1, dtype=weight.dtype, device=weight.device)
