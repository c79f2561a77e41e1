"""Calls past one packed tile of 512 keys, each with one encoding and one option: an offset of a tile that is lost shows
only here."""

from __future__ import annotations

import pytest
import torch

import posattn
from tests.tolerance import assert_parity

HEADS, DIM, QUERIES, KEYS = 2, 8, 37, 1290

pytestmark = pytest.mark.usefixtures("poisoned")

ENCODINGS = {
    "none": lambda: None,
    "ALiBi": lambda: posattn.ALiBi(HEADS, learnable=True, slopes=[0.01, 0.002]),
    "ALiBi signed": lambda: posattn.ALiBi(HEADS, learnable=True, signed=True, slopes=[0.002, -0.001]),
    "Kerple": lambda: posattn.Kerple(HEADS),
    "FIRE": lambda: posattn.FIRE(HEADS),
    "FIRE bidirectional": lambda: posattn.FIRE(HEADS, bidirectional=True, initial_length=600.0),
    "RoPE": lambda: posattn.RoPE(DIM),
    "DAPE-ALiBi": lambda: posattn.DAPE(posattn.ALiBi(HEADS, learnable=True, slopes=[0.01, 0.002]), HEADS),
    "DAPE-FIRE": lambda: posattn.DAPE(posattn.FIRE(HEADS), HEADS),
}
OPTIONS = {
    "full": dict,
    "causal": lambda: {"causal": True},
    "dropout": lambda: {"dropout_p": 0.3, "causal": True},
    "window": lambda: {"window": (700, 5)},
    "mask": lambda: {"mask": torch.rand(1, HEADS, QUERIES, KEYS) < 0.6},
    "softcap": lambda: {"softcap": 4.0},
    "bias": lambda: {"bias": torch.randn(1, HEADS, QUERIES, KEYS)},
    "bias and softcap": lambda: {"bias": torch.randn(1, HEADS, QUERIES, KEYS), "softcap": 4.0},
    "positions": lambda: {
        "q_positions": torch.arange(1200, 1200 + 4 * QUERIES, 4),
        "k_positions": torch.arange(KEYS) + torch.arange(KEYS) // 7,
    },
    "lengths": lambda: {"k_lengths": torch.tensor([1100]), "causal": True},
}


UNREAD = ("none", "positions")  # an error: nobody would read them


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name in ENCODINGS for option in OPTIONS if (name, option) != UNREAD]
)
def test_past_a_tile(place, name, option):
    torch.manual_seed(4)
    position = ENCODINGS[name]()
    given = {n: x.to(place[0]) if isinstance(x, torch.Tensor) else x for n, x in OPTIONS[option]().items()}
    q, k, v = (torch.randn(1, HEADS, n, DIM).to(place[0]) for n in (QUERIES, KEYS, KEYS))
    assert_parity(q, k, v, None if position is None else position.to(place[0]), given, place[1])


@pytest.mark.parametrize("name", ["none", "ALiBi", "FIRE"])
def test_past_a_tile_in_bfloat16(place, name):
    torch.manual_seed(4)
    position = ENCODINGS[name]()
    q, k, v = (torch.randn(1, HEADS, n, DIM).to(place[0], torch.bfloat16) for n in (QUERIES, KEYS, KEYS))
    options = {"causal": True, "dropout_p": 0.2}
    assert_parity(q, k, v, None if position is None else position.to(place[0]), options, place[1])


WHOLE = {
    "full": dict,
    "left window": lambda: {"window": (640, None)},
    "softcap": lambda: {"softcap": 1.5},
    "bias": lambda: {"bias": torch.randn(1, 1, 210, 1024)},
    "large scale": lambda: {"scale": 12.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("name", ["none", "RoPE", "ALiBi", "FIRE"])
def test_whole_tiles_and_several_blocks_of_queries(place, name, options, dtype):
    """No panel of a row is cut off, so none is finished apart: the scale of all waits for the same pass. Values are
    read where they lie, and one head's queries are the work of several tasks."""
    torch.manual_seed(4)
    position = {
        "none": lambda: None,
        "RoPE": lambda: posattn.RoPE(32),
        "ALiBi": lambda: posattn.ALiBi(1, learnable=True, slopes=[0.01]),
        "FIRE": lambda: posattn.FIRE(1),
    }[name]()
    given = {n: x.to(place[0]) if isinstance(x, torch.Tensor) else x for n, x in options().items()}
    q, k, v = (torch.randn(1, 1, n, 32).to(place[0], dtype) for n in (210, 1024, 1024))
    position = None if position is None else position.to(place[0])
    assert_parity(q, k, v, position, {"scale": 0.9, **given}, place[1])
