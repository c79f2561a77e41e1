"""GPT-Neo, whose attention is its own: no scale, and every second layer sees a window alone."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn

import posattn
from posattn.integrations.transformers.attention import mask_options


def convert_gpt_neo(model: nn.Module) -> int:
    """Change what a model has of these layers, and count them."""
    layers = [m for m in model.modules() if type(m).__name__ in ("GPTNeoSelfAttention", "GPTNeoFlashAttention2")]
    for layer in layers:
        layer.forward = MethodType(forward, layer)
    return len(layers)


def forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    layer_past: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    query, key, value = (
        project(hidden_states).unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
        for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_id)
    options = mask_options(attention_mask, query, key, causal=True)
    options["causal"] = True  # the layer's own, whatever a mask adds
    if self.attention_type == "local":
        options["window"] = (self.config.window_size - 1, 0)
    dropout = self.attn_dropout.p if self.training else 0.0
    out = posattn.attention(query, key, value, scale=1.0, dropout_p=dropout, **options)
    return self.resid_dropout(self.out_proj(out.transpose(1, 2).flatten(2))), None
