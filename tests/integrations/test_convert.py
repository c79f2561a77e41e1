"""convert: T5's tables, and the attention of BLOOM, MPT, Falcon and GPT-Neo, against the families' own."""

from __future__ import annotations

import copy
from collections import Counter
from unittest import mock

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BloomConfig,
    DebertaV2Config,
    DebertaV2Model,
    FalconConfig,
    GPTNeoConfig,
    LlamaConfig,
    LongT5Config,
    MptConfig,
    MT5Config,
    Pop2PianoConfig,
    SwitchTransformersConfig,
    T5Config,
    UMT5Config,
)

from posattn.integrations.transformers import convert
from tests.integrations.pairs import IDS, PADDINGS, SMALL, disagreement, generated, pair
from tools.transformers_families.sweep import watched

T5 = {
    "vocab_size": 100,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
LIKE_T5 = {
    "t5": T5Config(**T5, relative_attention_max_distance=20),
    "mt5": MT5Config(**T5),
    "umt5": UMT5Config(**T5),
    "longt5": LongT5Config(**T5),
    "pop2piano": Pop2PianoConfig(**T5),
    "switch": SwitchTransformersConfig(**T5, num_sparse_encoder_layers=0, num_sparse_decoder_layers=0),
}
FALCON = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OWN = {
    "bloom": BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4),
    "bloom, six heads": BloomConfig(vocab_size=100, hidden_size=48, n_layer=1, n_head=6),
    "mpt": MptConfig(vocab_size=100, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "mpt, six heads": MptConfig(vocab_size=100, d_model=48, n_layers=1, n_heads=6, max_seq_len=64),
    "falcon": FalconConfig(**FALCON),
    "falcon, grouped": FalconConfig(**FALCON, num_kv_heads=2, new_decoder_architecture=True),
    "falcon, alibi": FalconConfig(**FALCON, alibi=True, multi_query=False),
    "gpt-neo": GPTNeoConfig(
        vocab_size=100,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=6,
        max_position_embeddings=64,
    ),
}


def converted(config, auto=AutoModelForCausalLM):
    # Falcon's eager code adds its ALiBi twice, to the mask and to the logits; with sdpa it is added once.
    reference = "sdpa" if getattr(config, "alibi", False) is True else "eager"
    first, second = pair(config, auto, reference, reference)
    before = {name: tensor.clone() for name, tensor in second.state_dict().items()}
    assert convert(second) is second
    after = second.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    return first, second


def check(first, second, **inputs):
    counts = Counter()
    with watched(counts):
        output, gradient = disagreement(first, second, **inputs)
    assert counts["fused"] > 0
    assert counts["dense"] + counts["own"] + counts["dense values"] == 0, counts
    assert output < 3e-6
    assert gradient < 3e-5


@pytest.mark.parametrize("family", LIKE_T5)
def test_tables_of_t5(family):
    models = converted(LIKE_T5[family], AutoModelForSeq2SeqLM) if family != "pop2piano" else None
    if models is None:
        from transformers import Pop2PianoForConditionalGeneration

        config = LIKE_T5[family]
        torch.manual_seed(0)
        config._attn_implementation = "eager"
        first = Pop2PianoForConditionalGeneration(config).eval()
        models = (first, convert(copy.deepcopy(first)))
        embeddings = torch.randn(2, 21, 32)
        check(*models, inputs_embeds=embeddings, attention_mask=PADDINGS["left"], decoder_input_ids=IDS[:, :9])
        return
    for padding in PADDINGS.values():
        check(*models, input_ids=IDS, attention_mask=padding, decoder_input_ids=IDS[:, :9])


@pytest.mark.parametrize("family", ["t5", "umt5"])
def test_t5_generates(family):
    first, second = converted(LIKE_T5[family], AutoModelForSeq2SeqLM)
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}, {"num_beams": 3}):
        expected = generated(first, PADDINGS["left"], **options)
        assert torch.equal(generated(second, PADDINGS["left"], **options), expected), options


@pytest.mark.parametrize("family", ["t5", "umt5"])
def test_no_bias_is_square(family):
    """The largest tensor that the bias makes is its table, and attention to the encoder makes none."""
    _, model = converted(LIKE_T5[family], AutoModelForSeq2SeqLM)
    biases = []
    layer = model.decoder.block[0].layer[0].SelfAttention
    own = layer.compute_bias

    def compute_bias(*args, **kwargs):
        biases.append(own(*args, **kwargs))
        return biases[-1]

    layer.compute_bias = compute_bias
    model(input_ids=IDS, decoder_input_ids=IDS[:, :9]).logits.sum().backward()
    assert [b.shape for b in biases] == [(1, 4, 1, 17)]
    with mock.patch.object(torch, "zeros", side_effect=torch.zeros) as zeros:
        model(input_ids=IDS, decoder_input_ids=IDS[:, :9])
    assert all(call.args[:2] != (1, 4) and call.args[0] != (1, 4, 9, 21) for call in zeros.call_args_list)


@pytest.mark.parametrize("reentrant", [True, False])
def test_t5_with_gradient_checkpointing(reentrant):
    first, second = converted(LIKE_T5["t5"], AutoModelForSeq2SeqLM)
    for model in (first, second):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        model.train()
    second.gradient_checkpointing_enable({"use_reentrant": reentrant})
    check(first, second, input_ids=IDS, attention_mask=PADDINGS["left"], decoder_input_ids=IDS[:, :9], use_cache=False)


@pytest.mark.parametrize("family", OWN)
def test_attention_of_their_own(family):
    models = converted(OWN[family])
    for padding in PADDINGS.values():
        check(*models, input_ids=IDS, attention_mask=padding)


@pytest.mark.parametrize("family", OWN)
def test_they_generate(family):
    first, second = converted(OWN[family])
    for options in ({}, {"num_beams": 3}):
        expected = generated(first, PADDINGS["left"], **options)
        assert torch.equal(generated(second, PADDINGS["left"], **options), expected), options
    # transformers' own GPT-Neo and Falcon with ALiBi do not work with a static cache; ours is held to the growing one.
    static = generated(second, PADDINGS["left"], cache_implementation="static", disable_compile=True)
    assert torch.equal(static, generated(first, PADDINGS["left"]))


def test_dropout_is_that_of_training():
    _, second = converted(BloomConfig(vocab_size=100, hidden_size=32, n_layer=2, n_head=4, attention_dropout=0.5))
    second.train()
    torch.manual_seed(1)
    a = second(input_ids=IDS).logits
    torch.manual_seed(2)
    assert not torch.equal(a, second(input_ids=IDS).logits)


def test_copies_and_files_are_as_before(tmp_path):
    first, second = converted(LIKE_T5["t5"], AutoModelForSeq2SeqLM)
    second.save_pretrained(tmp_path / "converted")
    first.save_pretrained(tmp_path / "plain")
    names = [sorted(p.name for p in (tmp_path / d).iterdir()) for d in ("plain", "converted")]
    assert names[0] == names[1]
    weights = [(tmp_path / d / "model.safetensors").read_bytes() for d in ("plain", "converted")]
    assert weights[0] == weights[1]
    configs = [(tmp_path / d / "config.json").read_text() for d in ("plain", "converted")]
    assert configs[0] == configs[1]
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "converted", attn_implementation="posattn").eval()
    check(first, convert(again), input_ids=IDS, decoder_input_ids=IDS[:, :9])
    twin = copy.deepcopy(second)
    twin.get_input_embeddings().weight.data.mul_(2.0)
    check(first, second, input_ids=IDS, decoder_input_ids=IDS[:, :9])
    check(first, convert(second), input_ids=IDS, decoder_input_ids=IDS[:, :9])  # twice is once


def test_others_gain_the_name_alone():
    first, second = pair(LlamaConfig(**SMALL), name="eager")
    forwards = [module.forward for module in second.modules()]
    convert(second)
    assert second.config._attn_implementation == "posattn"
    assert [module.forward for module in second.modules()] == forwards
    check(first, second, input_ids=IDS, attention_mask=PADDINGS["left"])


def test_what_cannot_be_converted_says_so():
    config = DebertaV2Config(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        relative_attention=True,
    )
    with pytest.raises(ValueError, match=r"DebertaV2Model cannot be converted: .* relative keys"):
        convert(DebertaV2Model(config))
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got str"):
        convert("t5-small")
