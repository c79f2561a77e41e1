"""transformers' own ModelTesterMixin over sixteen families: a pytest file of its own, run by test_transformers_suite.py
in a folder that has transformers' tests beside it, once as it is and once with "sdpa" read as posattn."""

from __future__ import annotations

import os
import unittest
from typing import Any

import torch
import transformers

from tests import test_modeling_common  # transformers', from its sdist

if os.environ.get("READ_SDPA_AS_POSATTN") == "1":
    import posattn.integrations.transformers as integration

    integration.register("sdpa")

TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
BART = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5 = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "image_size": 30,
    "patch_size": 2,
}
GPT2 = {
    "vocab_size": 99,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Family: (prefix of its classes, config class, numbers, suffixes of its classes).
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "llama": ("Llama", "LlamaConfig", GROUPED, "Model ForCausalLM ForSequenceClassification"),
    "mistral": (
        "Mistral",
        "MistralConfig",
        {**GROUPED, "sliding_window": 5},
        "Model ForCausalLM ForTokenClassification",
    ),
    "qwen2": ("Qwen2", "Qwen2Config", GROUPED, "Model ForCausalLM ForQuestionAnswering"),
    "qwen3": ("Qwen3", "Qwen3Config", {**GROUPED, "head_dim": 8}, "Model ForCausalLM"),
    "gemma2": ("Gemma2", "Gemma2Config", {**GROUPED, "head_dim": 8}, "Model ForCausalLM"),
    "gemma3": ("Gemma3", "Gemma3TextConfig", {**GROUPED, "head_dim": 8, "sliding_window": 5}, "TextModel ForCausalLM"),
    "gpt_neox": ("GPTNeoX", "GPTNeoXConfig", TEXT, "Model ForCausalLM"),
    "gpt2": ("GPT2", "GPT2Config", GPT2, "Model LMHeadModel"),
    "cohere": ("Cohere", "CohereConfig", GROUPED, "Model ForCausalLM"),
    "phi3": ("Phi3", "Phi3Config", GROUPED, "Model ForCausalLM"),
    "olmo2": ("Olmo2", "Olmo2Config", GROUPED, "Model ForCausalLM"),
    "bert": ("Bert", "BertConfig", TEXT, "Model ForMaskedLM ForTokenClassification"),
    "roberta": ("Roberta", "RobertaConfig", TEXT, "Model ForMaskedLM"),
    "vit": ("ViT", "ViTConfig", VIT, "Model ForImageClassification"),
    "bart": ("Bart", "BartConfig", BART, "Model ForConditionalGeneration"),
    "t5": ("T5", "T5Config", T5, "Model ForConditionalGeneration"),
}


class Tester:
    """What the mixin asks of a family's tester."""

    batch_size, seq_length, is_training = 4, 7, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    num_labels, num_choices, vocab_size, image_size, patch_size = 3, 4, 99, 30, 2

    def __init__(self, family: str) -> None:
        self.family = family
        _, self.config_name, self.numbers, _ = FAMILIES[family]
        if family in ("bart", "t5"):
            self.encoder_seq_length = self.decoder_seq_length = self.key_length = self.seq_length
        if family == "vit":
            self.seq_length = (30 // 2) ** 2 + 1

    def get_config(self) -> Any:
        return getattr(transformers, self.config_name)(**self.numbers)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        config = self.get_config()
        if self.family == "vit":
            return config, {"pixel_values": torch.rand(self.batch_size, 3, 30, 30)}
        ids = torch.randint(3, 99, (self.batch_size, self.seq_length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.family in ("bart", "t5"):
            inputs |= {"decoder_input_ids": ids.flip(1), "decoder_attention_mask": torch.ones_like(ids)}
        return config, inputs


def _case(family: str) -> type[unittest.TestCase]:
    prefix, _, _, suffixes = FAMILIES[family]

    def set_up(self: Any) -> None:
        self.model_tester = Tester(family)

    contents = {
        "setUp": set_up,
        "all_model_classes": tuple(getattr(transformers, prefix + suffix) for suffix in suffixes.split()),
        "is_encoder_decoder": family in ("bart", "t5"),
        "__module__": __name__,
        "pipeline_model_mapping": {},
    }
    return type(f"{prefix}Test", (test_modeling_common.ModelTesterMixin, unittest.TestCase), contents)


for _family in FAMILIES:
    _made = _case(_family)
    globals()[_made.__name__] = _made
del _family, _made
