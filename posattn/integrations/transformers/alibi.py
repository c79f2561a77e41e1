"""BLOOM, MPT and Falcon, whose attention is their own: their projections and caches, and posattn's attention."""

from __future__ import annotations

import sys
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

import posattn
from posattn.integrations.transformers.attention import attention_forward
from posattn.integrations.transformers.masks import AttentionMask, rule_of


def convert_alibi(model: nn.Module) -> int:
    """Change what a model has of these layers, and count them."""
    count = 0
    for module in model.modules():
        change = _CHANGES.get(type(module).__name__)
        if change is not None:
            change(module)
            count += 1
        elif type(module).__name__ == "FalconModel":
            # It would add its ALiBi to the mask, [B, H, Tq, Tk]; the layers know it by themselves.
            module.use_alibi = False  # type: ignore[assignment]
    return count


def _bloom(layer: Any) -> None:
    layer.posattn_position = posattn.ALiBi(layer.num_heads)
    layer.forward = MethodType(bloom_forward, layer)


def _mpt(layer: Any) -> None:
    family = sys.modules[type(layer).__module__]
    # The family's own order of slopes; MptModel leaves alibi_bias_max at its default.
    slopes = -family.build_mpt_alibi_tensor(layer.n_heads, 2)[:, 0, 0]
    layer.posattn_position = posattn.ALiBi(layer.n_heads, slopes=slopes.tolist())
    layer.forward = MethodType(mpt_forward, layer)


def _falcon(layer: Any) -> None:
    layer.forward = MethodType(falcon_forward, layer)


_CHANGES = {
    "BloomAttention": _bloom,
    "MptAttention": _mpt,
    "FalconAttention": _falcon,
    "FalconFlashAttention2": _falcon,
}


def bloom_forward(
    self: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    query, key, value = self._reshape(self.query_key_value(hidden_states))
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    bias = position = None
    if _contiguous(attention_mask):
        position = self.posattn_position
    else:  # positions skip what a hole hides, so they are the model's, one number a key
        bias = alibi.view(hidden_states.shape[0], self.num_heads, 1, -1)
    out, _ = attention_forward(
        self,
        query,
        key,
        value,
        attention_mask,
        dropout=self.attention_dropout.p if self.training else 0.0,
        scaling=self.inv_norm_factor,
        is_causal=True,
        position_bias=bias,
        position=position,
    )
    out = self.dense(out.flatten(2))
    out = nn.functional.dropout(out, p=self.hidden_dropout, training=self.training)
    return residual + out, None


def mpt_forward(
    self: Any,
    hidden_states: Tensor,
    position_bias: Tensor | None,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    mixed = self.Wqkv(hidden_states)
    if self.clip_qkv:
        mixed = mixed.clamp(-self.clip_qkv, self.clip_qkv)
    query, key, value = (x.unflatten(2, (self.n_heads, self.head_dim)).transpose(1, 2) for x in mixed.chunk(3, dim=2))
    if cache is not None:
        key, value = cache.update(key, value, self.layer_idx)
    if isinstance(attention_mask, Tensor) and not isinstance(attention_mask, AttentionMask):
        attention_mask = ~attention_mask[..., : key.shape[2]]  # MptModel marks what is hidden
    out, _ = attention_forward(
        self,
        query,
        key,
        value,
        attention_mask,
        dropout=self.attn_dropout_p if self.training else 0.0,
        scaling=self.softmax_scale,
        is_causal=True,
        position=None if position_bias is None else self.posattn_position,
    )
    return self.out_proj(out.flatten(2)), None


def falcon_forward(
    self: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    family: Any = sys.modules[type(self).__module__]
    split = self._split_heads(self.query_key_value(hidden_states))
    query, key, value = (x.transpose(1, 2) for x in split)
    if not self.config.alibi and position_embeddings is not None:
        query, key = family.apply_rotary_pos_emb(query, key, *position_embeddings)
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    bias, dropout = None, 0.0
    if self.config.alibi:
        # Falcon's numbers, rounded to bfloat16 on the way: it was trained with them. One number a key and head.
        seen = _seen(attention_mask, key).long()
        numbers = family.build_alibi_tensor(seen, self.num_heads, query.dtype) * self.inv_norm_factor
        bias = numbers.view(key.shape[0], self.num_heads, 1, -1)
        dropout = self.attention_dropout.p if self.training else 0.0
    out, _ = attention_forward(
        self,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=self.inv_norm_factor,
        is_causal=True,
        position_bias=bias,
    )
    return self.dense(out.flatten(2)), None


def _contiguous(mask: Tensor | None) -> bool:
    """Whether the seen keys of each row lie together, so that tokens' distances are those of their indices."""
    if not isinstance(mask, AttentionMask):
        return mask is None
    rule = rule_of(mask)
    return rule is not None and rule.keys is None and rule.allowed is None


def _seen(mask: Tensor | None, key: Tensor) -> Tensor:
    """bool [B, Tk], what padding leaves of the keys."""
    rule = rule_of(mask) if isinstance(mask, AttentionMask) else None
    if rule is None or rule.k_len != key.shape[2]:
        return torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    return rule.seen_keys(key.device)
