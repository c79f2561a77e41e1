"""AttentionMask: eager attention's values for whoever computes, the rule for posattn, and no belief in what changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import masking_utils
from transformers.masking_utils import eager_mask

from posattn.integrations.transformers import AttentionMask, attention_mask, patterns, symbols
from posattn.integrations.transformers.attention import mask_options
from posattn.integrations.transformers.masks import rule_of

T = 9
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 1, 1, 1]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5, 0, 1, 2]])
WINDOW = masking_utils.sliding_window_causal_mask_function(3)
FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "both ways": masking_utils.bidirectional_mask_function,
    "window": WINDOW,
    "window both ways": masking_utils.sliding_window_bidirectional_mask_function(2),
    "packed": masking_utils.and_masks(
        masking_utils.remap_positions_for_packed_sequence(WINDOW, POSITIONS),
        masking_utils.packed_sequence_mask_function(DOCUMENTS),
    ),
    "chunked": masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 2])),
    "packed and chunked": masking_utils.and_masks(
        masking_utils.remap_positions_for_packed_sequence(
            masking_utils.chunked_causal_mask_function(2, torch.zeros(2, dtype=torch.long)), POSITIONS
        ),
        masking_utils.packed_sequence_mask_function(DOCUMENTS),
    ),
    "a union": masking_utils.or_masks(WINDOW, lambda b, h, q, k: k == 0),
}
PADDINGS = {
    "no mask": None,
    "full": torch.ones(2, T, dtype=torch.bool),
    "left": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9]).bool(),
    "right": torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0, 0], [1] * 9]).bool(),
    "holes": torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1, 1], [1] * 9]).bool(),
}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_eager_attention(function, padding, dtype):
    arguments = {
        "batch_size": 2,
        "q_length": T,
        "kv_length": T,
        "mask_function": FUNCTIONS[function],
        "attention_mask": PADDINGS[padding],
        "dtype": dtype,
    }
    expected = eager_mask(**arguments)
    mask = attention_mask(**arguments)
    assert (mask.shape, mask.dtype) == (expected.shape, dtype)
    assert torch.equal(mask + 0.0, expected)
    assert rule_of(mask) is not None
    assert (rule_of(mask).allowed is None) == (function != "a union")


@pytest.mark.parametrize("offset", [0, 3, torch.tensor(3)])
@pytest.mark.parametrize("function", ["causal", "window"])
def test_values_in_a_cache(function, offset):
    arguments = {
        "batch_size": 2,
        "q_length": 4,
        "kv_length": 16,
        "q_offset": offset,
        "mask_function": FUNCTIONS[function],
        "attention_mask": PADDINGS["left"],
    }
    assert torch.equal(attention_mask(**arguments) * 1.0, eager_mask(**arguments))
    sliding = {**arguments, "q_offset": 12, "kv_offset": 5, "kv_length": 11, "attention_mask": None}
    assert torch.equal(attention_mask(**sliding) * 1.0, eager_mask(**sliding))


def test_none_stands_for_a_mask_that_hides_nothing_alone():
    both = {"batch_size": 2, "q_length": T, "kv_length": T, "mask_function": FUNCTIONS["both ways"]}
    assert attention_mask(**both, allow_is_bidirectional_skip=True) is None
    assert attention_mask(**both, allow_is_bidirectional_skip=True, attention_mask=PADDINGS["full"]) is None
    assert attention_mask(**both, allow_is_bidirectional_skip=True, attention_mask=PADDINGS["left"]) is not None
    assert isinstance(attention_mask(**both), AttentionMask)
    assert isinstance(attention_mask(2, T, T, allow_is_causal_skip=True), AttentionMask)


def test_a_window_that_hides_nothing_is_none():
    wide = attention_mask(2, T, T, mask_function=masking_utils.sliding_window_causal_mask_function(T))
    assert rule_of(wide).left is None
    narrow = attention_mask(2, T, T, mask_function=masking_utils.sliding_window_causal_mask_function(T - 1))
    assert rule_of(narrow).left == T - 2


def test_casts_slices_and_copies_keep_the_rule():
    mask = attention_mask(2, T, T, attention_mask=PADDINGS["left"])
    for same in (mask.to(torch.bfloat16), mask.double(), mask[:, :, :, :T], mask.clone(), mask.detach()):
        assert isinstance(same, AttentionMask)
        assert torch.equal(same == 0, mask == 0)
    assert torch.equal(copy.deepcopy(mask) + 0, mask + 0)
    hidden = mask.to(torch.bool)  # as MPT casts it
    assert isinstance(hidden, AttentionMask)
    assert torch.equal(hidden | False, (mask + 0).to(torch.bool))
    assert mask.new_zeros(3).shape == (3,)
    assert type(mask[:, :, -1:]) is torch.Tensor
    assert "causal=True" in repr(mask)


def test_what_was_written_into_a_mask_counts():
    mask = attention_mask(1, T, T)
    mask[0, 0, 0, 5] = 0.0
    assert rule_of(mask) is None
    query = torch.zeros(1, 1, T, 8)
    options = mask_options(mask, query, query, causal=True)
    assert options["bias"][0, 0, 0, 5] == 0.0
    other = attention_mask(1, T, T)
    other.masked_fill_(torch.ones(T, T, dtype=torch.bool), 0.0)
    assert rule_of(other) is None
    assert (other == 0).all()


def test_a_mask_passes_through_checkpoints():
    mask = attention_mask(2, T, T, attention_mask=PADDINGS["left"])
    x = torch.randn(2, 1, T, T, requires_grad=True)
    seen = []

    def layer(x, mask):
        seen.append(type(mask))
        return (x + mask).softmax(-1)

    for reentrant in (True, False):
        checkpoint(layer, x, mask, use_reentrant=reentrant).sum().backward()
    assert set(seen) == {AttentionMask}


def test_factories_that_changed_are_not_believed(monkeypatch):
    """As if a later transformers counted a window otherwise under the same name."""

    def sliding_window_overlay(sliding_window):
        def inner_mask(batch_idx, head_idx, q_idx, kv_idx):
            return kv_idx >= q_idx - sliding_window

        return inner_mask

    sliding_window_overlay.__module__ = masking_utils.__name__
    assert patterns._trusted()
    monkeypatch.setattr(masking_utils, "sliding_window_overlay", sliding_window_overlay)
    patterns._trusted.cache_clear()
    try:
        changed = masking_utils.sliding_window_causal_mask_function(3)
        # The closure's module is this test's, as an unknown function's would be.
        mask = attention_mask(1, T, T, mask_function=changed)
        assert torch.equal(mask + 0, eager_mask(1, T, T, mask_function=changed))
        assert rule_of(mask).allowed is not None
        assert not patterns._trusted()
    finally:
        patterns._trusted.cache_clear()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_a_graph_reads_is_what_closures_say(function):
    """Symbols run through a function find the pattern that its closures hold."""
    read = patterns._read(FUNCTIONS[function])
    assert symbols.run(FUNCTIONS[function], patterns.Pattern) == read
    assert (read is None) == (function == "a union")


@pytest.mark.parametrize(
    "function",
    [
        lambda b, h, q, k: q <= k,
        lambda b, h, q, k: k > q + 1,
        lambda b, h, q, k: k - 1 <= q,
        lambda b, h, q, k: q >= 3,
        lambda b, h, q, k: abs(k - q) <= 3,
        lambda b, h, q, k: abs(q - k) <= torch.tensor(3),
        lambda b, h, q, k: k // 4 == q // 4,
        lambda b, h, q, k: (k - POSITIONS[:, 0][b]) // 4 == (q - POSITIONS[:, 0][b]) // 3,
        lambda b, h, q, k: (k - POSITIONS[:, 0][b]) // 4 == (q - POSITIONS[:, 1][b]) // 4,
        lambda b, h, q, k: POSITIONS[b],
        lambda b, h, q, k: q.new_zeros(()) | (k <= q),
        lambda b, h, q, k: (k <= q) & torch.tensor(True),
        lambda b, h, q, k: True,
        masking_utils.and_masks(FUNCTIONS["chunked"], FUNCTIONS["chunked"]),
    ],
)
def test_what_symbols_do_not_say_is_not_read(function):
    assert symbols.run(function, patterns.Pattern) is None


def test_factories_that_take_or_say_something_else_stay(monkeypatch):
    def taking_more(packed_sequence_mask, other):
        return packed_sequence_mask

    def saying_else(mask_function, position_ids):
        return lambda b, h, q, k: mask_function(b, h, position_ids[b, k], position_ids[b, q])

    monkeypatch.setattr(masking_utils, "packed_sequence_mask_function", taking_more)
    monkeypatch.setattr(masking_utils, "remap_positions_for_packed_sequence", saying_else)
    patterns.adopt()
    assert masking_utils.packed_sequence_mask_function is taking_more
    assert masking_utils.remap_positions_for_packed_sequence is saying_else
