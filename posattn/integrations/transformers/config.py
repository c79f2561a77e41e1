"""from_hf(config): the encoding that stands for a config's own positions."""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module
from typing import Any

from transformers import PreTrainedConfig

import posattn
from posattn.encodings import DynamicNTK, Linear, Llama3, LongRoPE, Proportional, Scaling, YaRN
from posattn.encodings.base import Encoding

# Families that turn pairs (2c, 2c + 1), beside those whose config says rope_interleave. What stands here is held to the
# families' own functions by tests/integrations/test_from_hf.py.
INTERLEAVED = frozenset(
    (
        "blt_global_transformer",
        "blt_local_decoder",
        "blt_local_encoder",
        "blt_patcher",
        "cohere",
        "cohere2",
        "cohere2_moe",
        "deepseek_v2",
        "deepseek_v4",
        "ernie4_5",
        "ernie4_5_moe",
        "glm",
        "glm4",
        "glm4v_text",
        "glm_image_text",
        "glm_ocr_text",
        "helium",
        "hy_v4_vl_text",
        "llama4_text",
        "moonshine",
        "moonshine_streaming",
        "openai_privacy_filter",
        "pe_audio_encoder",
        "pe_audio_video_encoder",
        "pe_video_encoder",
    )
)
# M-RoPE: the sections where a config names none, and how pairs fall to axes.
MROPE = {
    "cosmos3_edge_text": ((24, 20, 20), "interleaved"),
    "glm4v_moe_text": ((8, 12, 12), "blocks"),
    "glm4v_text": ((8, 12, 12), "blocks"),
    "glm_image_text": ((8, 12, 12), "blocks"),
    "glm_ocr_text": ((8, 12, 12), "blocks"),
    "hy_v4_vl_text": ((12, 10, 10), "interleaved"),
    "paddleocr_vl_text": ((16, 24, 24), "blocks"),
    "qwen2_5_omni_text": ((16, 24, 24), "blocks"),
    "qwen2_5_vl_text": ((16, 24, 24), "blocks"),
    "qwen2_vl_text": ((16, 24, 24), "blocks"),
    "qwen3_5_moe_text": ((11, 11, 10), "interleaved"),
    "qwen3_5_text": ((11, 11, 10), "interleaved"),
    "qwen3_omni_moe_text": ((24, 20, 20), "interleaved"),
    "qwen3_vl_moe_text": ((24, 20, 20), "interleaved"),
    "qwen3_vl_text": ((24, 20, 20), "interleaved"),
    "qwen4_exp_text": ((11, 11, 10), "interleaved"),
}
# Layers of these kinds have no positions.
NOPE = frozenset((("cohere2", "full_attention"), ("cohere2_moe", "full_attention")))
# Rotations that no encoding of posattn is.
OTHER = {
    "ernie4_5_vl_moe_text": "height and width share their pairs in turn, and time has the last ones",
    "hunyuan_vl_text": "its sections count dimensions of cosines that are laid out twice",
    "nanochat": "it turns against the usual direction",
}


def from_hf(config: PreTrainedConfig, layer_type: str | None = None) -> Encoding | None:
    """The encoding of posattn for a config of transformers; None where attention itself knows no positions.

    Args:
        config: a model's config; of a composite one, its text model's.
        layer_type: "full_attention" or another of the config's `layer_types`, where they differ.

    Returns:
        RoPE or MRoPE with its scaling, ALiBi, T5Bias (new weights; a T5 model's own stay in the model), or None.
        Frequencies that depend on the length go by each sequence's largest position in use.

    Raises:
        TypeError: not a config.
        ValueError: a layer_type that is missing or unknown, or a rule that posattn does not have.
    """
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(f"config: expected a PreTrainedConfig of transformers, got {type(config).__name__}")
    if getattr(config, "rope_parameters", None) is None:
        config = config.get_text_config()
    family = config.model_type
    additive = _additive(config)
    if additive is not None:
        return additive
    rope, config = _parameters(config, layer_type)
    if rope is None or (family, layer_type) in NOPE:
        return None
    if family in OTHER:
        raise ValueError(f"config: expected a rotation that posattn has, got that of {family}: {OTHER[family]}")
    rule = rope.get("rope_type") or "default"
    head_dim, rotary_dim = _dimensions(config, 1.0 if rule == "proportional" else rope.get("partial_rotary_factor"))
    layout = "interleaved" if family in INTERLEAVED or getattr(config, "rope_interleave", False) else "half"
    scaling = _scaling(config, rope, rule)
    base = float(rope["rope_theta"])
    usual, arrangement = MROPE.get(family, (None, "interleaved" if rope.get("mrope_interleaved") else "blocks"))
    sections = rope.get("mrope_section") or usual
    if sections:
        extra: dict[str, Any] = {} if scaling is None else {"scaling": scaling}
        return posattn.MRoPE(head_dim, sections, base, layout, rotary_dim, arrangement, **extra)
    return posattn.RoPE(head_dim, base, layout, rotary_dim, scaling)


def _additive(config: Any) -> Encoding | None:
    """ALiBi or T5's bias, of the families that have it."""
    family = config.model_type
    if family == "bloom":
        return posattn.ALiBi(config.n_head)
    if family == "falcon" and config.alibi:
        return posattn.ALiBi(config.num_attention_heads)
    if family == "mpt" and config.attn_config.alibi:
        name = "transformers.models.mpt.modeling_mpt"
        own = sys.modules.get(name) or import_module(name)
        slopes = -own.build_mpt_alibi_tensor(config.n_heads, 2)[:, 0, 0]  # MptModel leaves alibi_bias_max at 8
        return posattn.ALiBi(config.n_heads, slopes=slopes.tolist())
    if getattr(config, "relative_attention_num_buckets", None) and hasattr(config, "relative_attention_max_distance"):
        return posattn.T5Bias(
            config.num_heads,
            config.relative_attention_num_buckets,
            config.relative_attention_max_distance,
            bidirectional=not config.is_decoder,
        )
    return None


def _parameters(config: Any, layer_type: str | None) -> tuple[dict[str, Any] | None, Any]:
    """rope_parameters of a kind of layer, and the config of that kind."""
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return None, config
    kinds = [name for name, value in rope.items() if isinstance(value, dict)]
    if not kinds:
        return rope, config
    if layer_type is None and len(kinds) == 1:
        layer_type = kinds[0]
    if layer_type not in kinds:
        raise ValueError(f"layer_type: expected one of {kinds}, whose positions differ, got {layer_type!r}")
    with suppress(AttributeError, KeyError, TypeError, ValueError):  # every layer is alike but for its positions
        config = config.per_layer_config[layer_type]
    return rope[layer_type], config


def _dimensions(config: Any, partial: float | None) -> tuple[int, int]:
    """Of a head, or of its part that has positions (multi-head latent attention), and of what turns."""
    latent = getattr(config, "qk_rope_head_dim", None)
    if latent:
        return latent, latent
    head_dim = getattr(config, "head_dim", None)
    if not head_dim:
        if not (getattr(config, "hidden_size", None) and getattr(config, "num_attention_heads", None)):
            raise ValueError(
                f"config: expected a head_dim, or a hidden_size and heads, got none in {config.model_type}"
            )
        head_dim = config.hidden_size // config.num_attention_heads
    return int(head_dim), int(head_dim * (1.0 if partial is None else partial))


def _scaling(config: Any, rope: dict[str, Any], rule: str) -> Scaling | None:
    original: Any = rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
    factor: Any = rope.get("factor")
    if factor is None and original:
        factor = config.max_position_embeddings / original
    if rule in ("default", "mrope"):
        return None
    if rule == "linear":
        return Linear(factor)
    if rule == "dynamic":
        return DynamicNTK(factor, config.max_position_embeddings)
    if rule == "yarn":
        return YaRN(
            factor,
            original,
            beta_fast=rope.get("beta_fast") or 32,
            beta_slow=rope.get("beta_slow") or 1,
            mscale=rope.get("mscale"),
            mscale_all_dim=rope.get("mscale_all_dim"),
            attention_factor=rope.get("attention_factor"),
            truncate=rope.get("truncate", True),
        )
    if rule == "llama3":
        return Llama3(factor, original, rope["low_freq_factor"], rope["high_freq_factor"])
    if rule == "longrope":
        return LongRoPE(rope["short_factor"], rope["long_factor"], original, factor, rope.get("attention_factor"))
    if rule == "proportional":
        return Proportional(rope.get("partial_rotary_factor") or 1.0, rope.get("factor") or 1.0)
    raise ValueError(f"config: expected a rope_type that posattn has, got {rule!r}")
