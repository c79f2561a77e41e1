"""A config of any family, made small: every number that says how much there is of something becomes a handful."""

from __future__ import annotations

import inspect
import re
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from posattn.integrations.transformers.config import MROPE

# The first pattern that a field's whole name matches gives its value. Heads divide widths, widths are multiples of 32.
SIZES: tuple[tuple[str, int, str], ...] = (
    (r"vocab_size|.*_vocab_size(_.*)?|vocab_size_.*", 120, "vocabulary"),
    (r"(num_)?(key_value|kv)_heads|.*num_key_value_heads|num_kv_heads|n_kv_heads", 2, "key heads"),
    (r".*(attention_heads|num_heads|n_heads?|num_q_heads|nhead)", 4, "heads"),
    (r"head_dim|.*_head_dim|d_kv|kv_channels|attention_head_size|global_head_dim|head_size|rotary_dim", 8, "head"),
    (r"(q|kv|o)_lora_rank", 16, "rank"),
    (r"max_position_embeddings|n_positions|max_.*positions?|max_seq_len|max_sequence_length", 64, "positions"),
    (r"sliding_window|attention_chunk_size|window_size|local_attention", 6, "window"),
    (
        r"num_experts_per_tok|moe_topk|moe_k|num_experts_per_token|top_k_experts|num_selected_experts|moe_top_k",
        2,
        "top",
    ),
    (r"n_group|topk_group|num_groups", 1, "groups"),
    (r"num_(local_)?experts|n_routed_experts|.*num_experts|num_expert", 4, "experts"),
    (r"(num|n)_shared_experts?|moe_num_shared_experts|first_k_dense_replace", 1, "shared"),
    (r"num_hidden_layers|n_layers?|.*_layers|num_layers|depth|num_blocks|num_.*layers", 2, "layers"),
    (r".*(intermediate|ffn|feedforward|feed_forward|inner|ff).*(size|dim|length)?|d_ff|n_inner|mlp_dim", 64, "width"),
    (r"hidden_size|d_model|n_embd|.*(embed|embedding|hidden|model)_(dim|size)|dim|width|emb_dim", 32, "width"),
    (r".*_hidden_size|.*projection_dim|output_dim", 32, "width"),
    (r"image_size|img_size", 32, "image"),
    (r"patch_size", 8, "patch"),
    (r"num_mel_bins", 16, "bins"),
    (r".*num_queries|num_query_tokens|num_latents", 6, "queries"),
    (r"context_size", 16, "context"),
)

# Fields of configs whose layers are of several kinds.
MIXED = ("layer_types", "layers_block_type", "full_attention_interval", "block_types")
# Ways to be small, tried in turn: hybrids of attention and recurrence need a few layers to have both, and sections of
# M-RoPE ask for the head dimension that they sum to; a few make none of their width.
FITS: tuple[dict[str, int | None], ...] = (
    {},
    {"layers": 4},
    {"heads": 2, "head": 16, "layers": 4},
    {"layers": 8, "experts": 8},
    {"head": None, "width": None},
    {"own head": 8},
)


def tiny_config(kind: type[PreTrainedConfig], fit: dict[str, int | None]) -> PreTrainedConfig:
    """A small config of the class; what transformers raises if the family does not go together so."""
    return kind(**_fields(kind, fit))


def _fields(kind: type[PreTrainedConfig], fit: dict[str, int | None]) -> dict[str, Any]:
    default = vars(kind())
    if "layers" not in fit and not default.keys().isdisjoint(MIXED):
        fit = {**fit, "layers": 4}
    chosen: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        if parameter.default is inspect.Parameter.empty or name.startswith("_"):
            continue
        given = default.get(name, parameter.default)
        if name in kind.sub_configs:
            chosen[name] = _sub_config(kind.sub_configs[name], given, fit)
        elif re.fullmatch(r"(pad|bos|eos|cls|sep|unk|mask)_token_id|decoder_start_token_id", name):
            ids = {"pad": 0, "bos": 1, "eos": 2, "decoder": 0}
            chosen[name] = None if given is None else ids.get(name.split("_")[0], 3)
        elif re.fullmatch(r".*_token_(id|index)", name) and isinstance(given, int):
            chosen[name] = 110
        elif name == "rope_parameters" and (kind.model_type in MROPE or "mrope_section" in (given or {})):
            rope = {"rope_type": "default", "rope_theta": 1e4, **(given or {})}
            pairs = int((fit.get("head", 8) or 0) * (rope.get("partial_rotary_factor") or 1.0)) // 2
            if pairs >= 4:
                chosen[name] = {**rope, "mrope_section": [pairs // 2, pairs // 4, pairs // 4]}
        elif name == "head_dim" and given is None and "own head" in fit:
            chosen[name] = fit["own head"]
        elif name == "attention_types" and kind.model_type == "gpt_neo":
            chosen[name] = [[["global", "local"], (fit.get("layers", 2) or 2) // 2]]
        elif isinstance(given, int) and not isinstance(given, bool):
            size = _size(name, fit)
            if size is not None and given > size:
                chosen[name] = size
    if name_of_heads := next((n for n in ("num_attention_heads", "num_heads") if n in chosen), None):
        grouped = default.get("num_key_value_heads") not in (None, default.get(name_of_heads))
        if "num_key_value_heads" in chosen and not grouped:
            chosen["num_key_value_heads"] = chosen[name_of_heads]
    return chosen


def _size(name: str, fit: dict[str, int | None]) -> int | None:
    for pattern, size, what in SIZES:
        if re.fullmatch(pattern, name):
            return fit.get(what, size)
    return None


def _sub_config(kind: type[PreTrainedConfig], given: Any, fit: dict[str, int | None]) -> Any:
    if kind is AutoConfig:
        if given is None:
            return None
        kind = type(given) if isinstance(given, PreTrainedConfig) else CONFIG_MAPPING[given["model_type"]]
    return tiny_config(kind, fit).to_dict()
