"""Families that use the attention interface match eager attention: outputs, gradients, caches, checkpoints, compile."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    CLIPVisionConfig,
    CohereConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPTNeoXConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
    T5Config,
    ViTConfig,
    WhisperConfig,
)

import posattn.integrations.transformers as integration
from posattn.serialize import parse
from tests.integrations.pairs import IDS, PADDINGS, SMALL, disagreement, generated, pair
from tools.transformers_families.sweep import watched

ENCODER = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SEQ2SEQ = {
    "vocab_size": 100,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 1,
}
IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
LONG = {"short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [1.5, 2.0, 4.0, 9.0]}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 16, "factor": 4.0, **LONG},
}
DECODERS = {
    "llama": LlamaConfig(**SMALL),
    **{f"llama {rule}": LlamaConfig(**SMALL, rope_parameters={"rope_theta": 1e4, **x}) for rule, x in ROPES.items()},
    "qwen2": Qwen2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}),
    "qwen3": Qwen3Config(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=6),
    "gemma2": Gemma2Config(**SMALL, sliding_window=6, attn_logit_softcapping=5.0),
    "gemma3": Gemma3TextConfig(**SMALL, sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    "gemma4": Gemma4TextConfig(
        **SMALL,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        hidden_size_per_layer_input=8,
        global_head_dim=16,
    ),
    "llama4": Llama4TextConfig(
        **SMALL,
        intermediate_size_mlp=64,
        num_local_experts=2,
        attention_chunk_size=6,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
    ),
    "gpt-neox": GPTNeoXConfig(**ENCODER, max_position_embeddings=64),
    "gpt-oss": GptOssConfig(**SMALL, sliding_window=6, num_local_experts=2, num_experts_per_tok=1),
    "deepseek-v3": DeepseekV3Config(
        **{k: v for k, v in SMALL.items() if k not in ("head_dim", "num_key_value_heads")},
        num_key_value_heads=4,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
    ),
    "cohere": CohereConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}),
}
# Outputs in float32 (the 1e-6 is of logits near 1; these are over the largest), and gradients.
OUTPUT, GRADIENT = 2e-6, 3e-5


def check(first, second, **inputs):
    counts = Counter()
    with watched(counts):
        output, gradient = disagreement(first, second, **inputs)
    assert counts["fused"] > 0
    assert counts["dense"] + counts["own"] + counts["dense values"] == 0, counts
    assert output < OUTPUT
    assert gradient < GRADIENT


@pytest.mark.parametrize("family", DECODERS)
def test_decoders(family):
    models = pair(DECODERS[family])
    for padding in PADDINGS.values():
        check(*models, input_ids=IDS, attention_mask=padding)


@pytest.mark.parametrize(
    "config",
    [BertConfig(**ENCODER), ModernBertConfig(**ENCODER, local_attention=8, pad_token_id=0)],
    ids=["bert", "modernbert"],
)
def test_encoders(config):
    models = pair(config, AutoModel)
    for padding in PADDINGS.values():
        check(*models, input_ids=IDS, attention_mask=padding)


@pytest.mark.parametrize("config", [ViTConfig(**IMAGE), CLIPVisionConfig(**IMAGE)], ids=["vit", "clip"])
def test_images(config):
    check(*pair(config, AutoModel), pixel_values=torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("family", ["bart", "whisper", "t5"])
def test_encoders_with_decoders(family):
    decoder = {"decoder_input_ids": IDS[:, :9]}
    if family == "whisper":
        config = WhisperConfig(
            **SEQ2SEQ, num_mel_bins=16, max_source_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2
        )
        check(*pair(config, AutoModel), input_features=torch.randn(2, 16, 64), **decoder)
        return
    if family == "bart":
        models = pair(BartConfig(**SEQ2SEQ, max_position_embeddings=64), AutoModelForSeq2SeqLM)
        for padding in PADDINGS.values():
            check(*models, input_ids=IDS, attention_mask=padding, **decoder)
        return
    config = T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    for padding in PADDINGS.values():  # its biases are dense until it is converted
        output, gradient = disagreement(
            *pair(config, AutoModelForSeq2SeqLM), input_ids=IDS, attention_mask=padding, **decoder
        )
        assert output < OUTPUT
        assert gradient < GRADIENT


@pytest.mark.parametrize("padding", ["none", "left"])
def test_wide_heads(padding):
    """Gemma 4's global layers have 512 dimensions."""
    config = Gemma4TextConfig(
        **SMALL, sliding_window=6, layer_types=["sliding_attention", "full_attention"], hidden_size_per_layer_input=8
    )
    output, gradient = disagreement(*pair(config), input_ids=IDS, attention_mask=PADDINGS[padding])
    assert output < 3 * OUTPUT  # sums of 512 products round more, on both sides in orders of their own
    assert gradient < GRADIENT
    softcapped = Gemma2Config(**{**SMALL, "head_dim": 320}, attn_logit_softcapping=5.0)
    output, gradient = disagreement(*pair(softcapped), input_ids=IDS, attention_mask=PADDINGS[padding])
    assert output < 3 * OUTPUT  # sums of 512 products round more, on both sides in orders of their own
    assert gradient < GRADIENT


def test_packed_documents():
    """Positions that begin again mark documents; none [Tq, Tk] is made."""
    positions = torch.cat([torch.arange(9), torch.arange(12)])[None].expand(2, -1)
    models = pair(DECODERS["mistral"])
    output, gradient = disagreement(*models, input_ids=IDS, position_ids=positions, use_cache=False)
    assert output < OUTPUT
    assert gradient < GRADIENT


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_generate(family, padding):
    first, second = pair(DECODERS[family])
    expected = generated(first, PADDINGS[padding])
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}):
        assert torch.equal(generated(second, PADDINGS[padding], **options), expected), options
    assert torch.equal(
        generated(second, PADDINGS[padding], num_beams=3), generated(first, PADDINGS[padding], num_beams=3)
    )


def test_prefill_in_chunks_of_a_static_cache():
    first, second = pair(DECODERS["llama"])
    expected = first(input_ids=IDS).logits
    cache = StaticCache(config=second.config, max_cache_len=40)
    chunks = [second(input_ids=IDS[:, part], cache=cache).logits for part in (slice(0, 8), slice(8, 13), slice(13, 21))]
    torch.testing.assert_close(torch.cat(chunks, 1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    first, second = pair(DECODERS["mistral"])
    second.train()
    first.train()
    second.gradient_checkpointing_enable({"use_reentrant": reentrant})
    output, gradient = disagreement(first, second, input_ids=IDS, attention_mask=PADDINGS["left"])
    assert output < OUTPUT
    assert gradient < GRADIENT


def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def test_compiled():
    """One graph, mask and all."""
    first, second = pair(LlamaConfig(**{**SMALL, "num_hidden_layers": 1}))
    seen = PADDINGS["left"].bool()
    with torch.no_grad():
        expected = first(input_ids=IDS, attention_mask=seen).logits[seen]
        got = compiled(second)(input_ids=IDS, attention_mask=seen).logits[seen]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


PACKED = torch.cat([torch.arange(9), torch.arange(12)])[None].expand(2, -1)


@pytest.mark.parametrize(
    ("family", "inputs", "operands"),
    [
        ("mistral", {"attention_mask": PADDINGS["left"]}, {"boolean": (2, 1, 1, 21)}),
        ("mistral", {"position_ids": PACKED, "use_cache": False}, {"q_segments": (2, 21), "k_segments": (2, 21)}),
        ("llama4", {"attention_mask": PADDINGS["left"]}, {"boolean": (2, 1, 1, 21), "q_segments": (2, 21)}),
    ],
    ids=["window", "packed", "chunks"],
)
def test_masks_made_inside_a_graph_stay_rules(family, inputs, operands):
    """No call in the graph of a whole model has a mask [Tq, Tk]."""
    first, second = pair(DECODERS[family])
    calls = []

    def compiler(graph, examples):
        for node in graph.graph.nodes:
            if node.target is torch.ops.posattn.attention_forward.default:
                found = parse(node.args[8])
                shapes = {name: tuple(x.meta["val"].shape) for name, x in zip(found.names, node.args[3])}
                calls.append((shapes, node.args[4][:2]))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    seen = inputs.get("attention_mask", torch.ones_like(IDS)).bool()
    with torch.no_grad():
        expected = first(input_ids=IDS, **inputs).logits[seen]
        model = torch.compile(second, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))
        got = model(input_ids=IDS, **inputs).logits[seen]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == 2
    chunked = calls[0][0]
    assert operands.items() <= chunked.items()
    for shapes, window in calls:
        assert (21, 21) not in [shape[-2:] for shape in shapes.values()]
        assert window[0] == (5 if family == "mistral" else -1)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_compiled_training(family, padding):
    first, second = pair(DECODERS[family])
    output, gradient = disagreement(first, compiled(second), input_ids=IDS, attention_mask=PADDINGS[padding])
    assert output < OUTPUT
    assert gradient < GRADIENT


@pytest.mark.slow
def test_compiled_steps_of_a_static_cache():
    """The mask may come from outside of the graph, as generate() makes it."""
    first, second = pair(DECODERS["llama"])
    step = compiled(second)
    with torch.no_grad():
        cache = StaticCache(config=second.config, max_cache_len=32)
        second(input_ids=IDS, cache=cache)
        tokens = IDS
        for _ in range(2):
            token = first(input_ids=tokens).logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, token], 1)
            mask = integration.attention_mask(2, 1, 32, q_offset=torch.tensor(tokens.shape[1] - 1))
            for attention_mask in (None, mask):
                held = copy.deepcopy(cache)
                got = step(input_ids=token, cache=held, attention_mask=attention_mask).logits[:, -1]
                torch.testing.assert_close(got, first(input_ids=tokens).logits[:, -1], atol=1e-5, rtol=1e-5)
            cache = held


def test_masks_of_ones_own():
    """4-D masks go through as they are: bool, and float that is added."""
    models = pair(DECODERS["llama"])
    seen = torch.ones(IDS.shape[1], IDS.shape[1]).tril().bool()[None, None].repeat(2, 1, 1, 1)
    seen[1, 0, :, 3] = False
    seen[1, 0, 3, 3] = True
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    expected = models[0](input_ids=IDS, attention_mask=added).logits
    for mask in (seen, added):
        torch.testing.assert_close(models[1](input_ids=IDS, attention_mask=mask).logits, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bloom", "mpt", "big_bird", "xlnet", "deberta-v2", "gpt_neox_japanese", "roformer"])
def test_families_with_attention_of_their_own_are_left_right(family):
    from transformers import CONFIG_MAPPING

    from tools.transformers_families.sweep import look_at

    finding = look_at(family, CONFIG_MAPPING[family])
    assert finding.way.startswith("own attention"), finding
    assert finding.error == 0.0


def test_a_mask_for_other_sizes_counts_by_its_values():
    """One row for a batch, and keys that the layer has fewer of: eager attention would broadcast, and callers cut."""
    layer = torch.nn.Module()
    q, k = torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 8)
    expected, _ = integration.attention_forward(layer, q, k, k, None, is_causal=True)
    for mask in (integration.attention_mask(1, 5, 5), integration.attention_mask(3, 5, 7)):
        got, _ = integration.attention_forward(layer, q, k, k, mask)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("family", ["gpt-oss", "gemma2", "mistral"])
def test_bfloat16(family):
    """Beside eager attention in float32, no further off than eager attention in bfloat16, and roundings."""
    first, second = pair(DECODERS[family])
    half = copy.deepcopy(first).bfloat16()
    seen = PADDINGS["left"].bool()
    with torch.no_grad():
        exact, eager, got = (
            model(input_ids=IDS, attention_mask=seen).logits[seen].float() for model in (first, half, second.bfloat16())
        )
    assert (got - exact).norm() < 1.5 * (eager - exact).norm()


def test_register_under_another_name():
    integration.register("mine")
    first, second = pair(DECODERS["llama"], name="mine")
    check_output, _ = disagreement(first, second, input_ids=IDS)
    assert check_output < OUTPUT
    with pytest.raises(ValueError, match="name: expected a name"):
        integration.register("")


def test_an_eager_function_that_takes_more_runs_itself():
    """A family whose own function takes an argument that is not understood here gets that function."""
    import sys

    module = sys.modules[__name__]
    layer = torch.nn.Module()
    calls = []

    class Layer(torch.nn.Module):
        pass

    def eager_attention_forward(
        module, query, key, value, attention_mask, scaling=None, dropout=0.0, slopes=None, **kwargs
    ):
        calls.append((slopes, attention_mask.shape))
        return query.transpose(1, 2), None

    module.eager_attention_forward = eager_attention_forward
    try:
        x = torch.randn(1, 2, 5, 8)
        mask = integration.attention_mask(1, 5, 5)
        integration.attention_forward(Layer(), x, x, x, mask, slopes=torch.ones(2), output_attentions=False)
        integration.attention_forward(Layer(), x, x, x, mask, unheard_of=torch.ones(2))
    finally:
        del module.eager_attention_forward
    assert len(calls) == 1
    assert layer is not None
