"""from_hf: transformers' rules for frequencies to float32's rounding, and the families' own rotations."""

from __future__ import annotations

import math
import random

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    BertConfig,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    FalconConfig,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4vTextConfig,
    GlmConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MptConfig,
    PhiConfig,
    Qwen2_5_VLConfig,
    Qwen3VLTextConfig,
    T5Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

import posattn
from posattn.integrations.transformers import from_hf
from tools.transformers_families.rotations import disagreement, layer_types

EPSILON = torch.finfo(torch.float32).eps
ROUNDING = 2e-6  # of logits after both sides' cosines and sines in float32


def random_rule(rule: str, dice: random.Random) -> dict:
    """rope_parameters of a rule, edges among them."""
    half = 8
    factor = dice.choice([1.0, 1.5, 2.0, 8.0, 32.0, dice.uniform(1.0, 64.0)])
    rope = {"rope_type": rule, "rope_theta": dice.choice([1e3, 1e4, 5e5, 1e6, 1e7]), "factor": factor}
    if rule in ("yarn", "llama3", "longrope"):
        rope["original_max_position_embeddings"] = dice.choice([128, 2048, 4096, 8192])
    if rule == "yarn":
        rope |= dice.choice(
            [{}, {"beta_fast": 32, "beta_slow": 1}, {"beta_fast": 1, "beta_slow": 32}, {"beta_fast": 4, "beta_slow": 4}]
        )
        rope |= dice.choice([{}, {"mscale": 1.0, "mscale_all_dim": 0.7}, {"attention_factor": 1.3}, {"mscale": 0.7}])
        rope |= dice.choice([{}, {"truncate": False}])
        if dice.random() < 0.2:
            rope["factor"] = None
    if rule == "llama3":
        low = dice.choice([1.0, 2.0, 4.0])
        rope |= {"low_freq_factor": low, "high_freq_factor": dice.choice([low, 4.0, 8.0])}
    if rule == "longrope":
        rope |= {name: [dice.uniform(1.0, 40.0) for _ in range(half)] for name in ("short_factor", "long_factor")}
        rope |= dice.choice([{}, {"attention_factor": 1.2}])
        if dice.random() < 0.3:
            rope["factor"] = None
    if rule == "proportional":
        rope |= {"partial_rotary_factor": dice.choice([0.25, 0.5, 0.3, 1.0])}
    return rope


@pytest.mark.parametrize("rule", ROPE_INIT_FUNCTIONS)
def test_frequencies_are_those_of_transformers(rule):
    dice = random.Random(rule)
    for _ in range(120):
        rope = random_rule(rule, dice)
        config = LlamaConfig(
            hidden_size=64, num_attention_heads=4, head_dim=16, max_position_embeddings=8192, rope_parameters=rope
        )
        length = dice.choice([1, 100, 5000, 9000, 20000])
        expected, attention = ROPE_INIT_FUNCTIONS[rule](config, "cpu", seq_len=length)
        rope_encoding = from_hf(config)
        got, factor = rope_encoding.scaling.frequencies(16, rope["rope_theta"], length, "cpu")
        plain = rope["rope_theta"] ** (-torch.arange(8, dtype=torch.float64) / 8)
        bound = EPSILON * (4 + math.log(rope["rope_theta"])) * plain * max(1.0, 1.0 / (rope["factor"] or 1.0))
        assert ((got - expected.double()).abs() <= bound).all(), (rope, length, got, expected)
        assert factor == pytest.approx(attention, rel=1e-6)


FAMILIES = [
    "llama",
    "cohere",
    "glm",
    "glm4",
    "gpt_neox",
    "phi",
    "phi3",
    "gemma3_text",
    "gemma4_text",
    "deepseek_v3",
    "modernbert",
    "qwen2_vl_text",
    "qwen3_vl_text",
    "llama4_text",
    "gpt_oss",
    "stablelm",
    "smollm3",
    "mistral4",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_rotations_of_families(family):
    config = CONFIG_MAPPING[family]()
    kinds = layer_types(config)
    assert kinds
    for kind in kinds:
        assert disagreement(config, kind) < ROUNDING


# Configs that no rotary class of their modeling file takes, or whose code lies elsewhere.
NOT_HELD = [
    "bailing_hybrid",
    "blt",
    "deepseek_v2",
    "edgetam_video",
    "eomt_dinov3",
    "exaone",
    "glm_moe_dsa",
    "granite4_vision_text",
    "internlm3",
    "iquestcoder",
    "laguna",
    "llama4_vision_model",
    "longcat_flash",
    "mellum",
    "mistral_large4_text",
    "musicflamingo",
    "qwen2_5_omni_dit",
    "sam2_video",
    "sam3_tracker_video",
    "sarvam_mla",
    "sarvam_moe",
    "zaya",
]


@pytest.mark.slow
def test_rotations_of_every_family():
    agree, refused, other = [], [], []
    for family in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[family]()
        except Exception:
            continue
        for kind in layer_types(config):
            try:
                from_hf(config, kind)
            except ValueError as problem:
                refused.append(str(problem))
                continue
            try:
                found = disagreement(config, kind)
            except Exception:
                other.append(family)
                continue
            if found is None:
                other.append(family)
            else:
                agree.append(family)
                assert found < ROUNDING, (family, kind, found)
    assert len(agree) >= 200
    assert set(other) <= set(NOT_HELD)
    assert len(refused) < 50
    assert all(problem.startswith(("config: ", "rotary_dim: ", "sections: ")) for problem in refused)


def test_layouts():
    assert from_hf(LlamaConfig()).layout == "half"
    assert from_hf(CohereConfig()).layout == "interleaved"
    assert from_hf(GlmConfig()).layout == "interleaved"
    assert from_hf(GlmConfig()).rotary_dim == GlmConfig().head_dim // 2
    phi = PhiConfig()
    assert from_hf(phi).rotary_dim == int(phi.rope_parameters["partial_rotary_factor"] * from_hf(phi).head_dim)
    glm4v = from_hf(
        Glm4vTextConfig(
            head_dim=128, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
        )
    )
    assert (glm4v.layout, glm4v.sections, glm4v.arrangement) == ("interleaved", (8, 12, 12), "blocks")
    assert from_hf(Qwen3VLTextConfig()).arrangement == "interleaved"
    neox = from_hf(GPTNeoXConfig())
    assert neox.rotary_dim == neox.head_dim // 4


def test_layers_of_a_kind():
    config = Gemma3TextConfig()
    local, whole = from_hf(config, "sliding_attention"), from_hf(config, "full_attention")
    assert (local.base, whole.base) == (10000.0, 1000000.0)
    with pytest.raises(ValueError, match=r"layer_type: expected one of \[.*full_attention.*\], .* got None"):
        from_hf(config)
    with pytest.raises(ValueError, match="layer_type: expected one of"):
        from_hf(config, "recurrent")
    gemma4 = Gemma4TextConfig()
    turn = from_hf(gemma4, "full_attention")
    assert turn.head_dim == 2 * from_hf(gemma4, "sliding_attention").head_dim == 512
    assert isinstance(turn.scaling, posattn.Proportional)
    assert from_hf(gemma4, "sliding_attention").scaling is None
    assert from_hf(Cohere2Config(), "full_attention") is None
    assert from_hf(Cohere2Config(), "sliding_attention").layout == "interleaved"
    assert from_hf(Gemma3Config(), "full_attention").base == 1000000.0  # of the text model


def test_additive_positions():
    heads = 12
    alibi = from_hf(BloomConfig(n_head=heads, hidden_size=96))
    numbers = build_alibi_tensor(torch.ones(1, 9), heads, torch.float32)  # [H, 1, Tk], up to a number a row
    got = alibi.bias(1, 9)
    torch.testing.assert_close(got - got[..., -1:], numbers - numbers[..., -1:], rtol=1e-5, atol=1e-5)
    mpt = from_hf(MptConfig(n_heads=6, d_model=96)).bias(1, 9)
    torch.testing.assert_close(mpt, build_mpt_alibi_tensor(6, 9), rtol=1e-5, atol=1e-5)
    assert isinstance(from_hf(FalconConfig(alibi=True)), posattn.ALiBi)
    assert isinstance(from_hf(FalconConfig()), posattn.RoPE)
    config = T5Config(num_heads=4)
    t5 = from_hf(config)
    assert (t5.num_heads, t5.bidirectional) == (4, True)
    config.is_decoder = True
    assert not from_hf(config).bidirectional
    assert from_hf(BertConfig()) is None


def test_mrope_with_yarn():
    text = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
            "mrope_section": [4, 2, 2], "rope_theta": 1e6}, "hidden_size": 64, "num_attention_heads": 4}  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text).get_text_config()
    assert from_hf(config).sections == (4, 2, 2)
    assert disagreement(config, None) < ROUNDING


def test_what_it_cannot_give():
    with pytest.raises(TypeError, match="config: expected a PreTrainedConfig of transformers, got dict"):
        from_hf({})
    with pytest.raises(ValueError, match=r"config: .* nanochat: it turns against the usual direction"):
        from_hf(CONFIG_MAPPING["nanochat"]())
    config = LlamaConfig()
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1e4}
    with pytest.raises(ValueError, match="config: expected a rope_type that posattn has, got 'spiral'"):
        from_hf(config)
