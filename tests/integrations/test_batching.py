"""generate_batch of transformers with posattn: the tokens that each prompt alone gives, and no mask on the way."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    Gemma2Config,
    GenerationConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
)

import posattn
import posattn.integrations.transformers as integration
from tests.integrations.pairs import SMALL, pair

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [20, 21] * 9]
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=6),
    "gemma2": Gemma2Config(**SMALL, sliding_window=6, attn_logit_softcapping=5.0),
    "gpt-oss": GptOssConfig(**SMALL, sliding_window=6, num_local_experts=2, num_experts_per_tok=1),
}
GREEDY = GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=99, pad_token_id=0)
# Few enough tokens that the longest prompt comes in chunks.
SMALL_BATCHES = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=16, max_memory_percent=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_each_prompt_alone(family, monkeypatch):
    eager, model = pair(FAMILIES[family])
    given = []
    attention = posattn.attention
    monkeypatch.setattr(
        posattn, "attention", lambda *args, **options: given.append(options) or attention(*args, **options)
    )
    with integration.continuous_batching(model):
        results = model.generate_batch(
            inputs=PROMPTS, generation_config=GREEDY, continuous_batching_config=SMALL_BATCHES, progress_bar=False
        )
    assert model.config._attn_implementation == "posattn"
    assert given
    assert all("cu_seqlens_q" in options and options.get("mask") is None for options in given)
    for prompt, result in zip(PROMPTS, results.values()):
        alone = eager.generate(torch.tensor([prompt]), generation_config=GREEDY)[0, len(prompt) :].tolist()
        assert result.error is None
        assert result.generated_tokens == alone


def test_wrong_models():
    with (
        pytest.raises(TypeError, match="model: expected a PreTrainedModel, got Linear"),
        integration.continuous_batching(torch.nn.Linear(2, 2)),
    ):
        pass
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"], attn_implementation="eager")
    with pytest.raises(ValueError, match=r"expected one with attn_implementation=.posattn., got 'eager'"):
        integration.continuous_batching(model).__enter__()


def test_a_name_that_is_not_known_is_refused_by_transformers():
    """Why the name is what it is: if this passes one day, "posattn" itself will do."""
    _, model = pair(FAMILIES["llama"])
    with pytest.raises(ValueError, match="Implementation posattn is not supported for continuous batching"):
        model.generate_batch(inputs=PROMPTS[:1], generation_config=GREEDY, progress_bar=False)
