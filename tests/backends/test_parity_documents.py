"""Packed documents with one more option each: what an option is read by counts in the pack, what encodings and masks
are counts in the document."""

from __future__ import annotations

import pytest
import torch

import posattn
from tests.tolerance import assert_parity

HEADS, DIM, QUERIES, KEYS = 4, 16, 90, 110
BOUNDS = {"cu_seqlens_q": [0, 21, 21, 60, 90], "cu_seqlens_k": [0, 33, 40, 79, 110]}

pytestmark = pytest.mark.usefixtures("poisoned")

ENCODINGS = {
    "none": lambda: None,
    "RoPE": lambda: posattn.RoPE(DIM),
    "ALiBi": lambda: posattn.ALiBi(HEADS, learnable=True),
    "Kerple": lambda: posattn.Kerple(HEADS),
    "FIRE": lambda: posattn.FIRE(HEADS, initial_length=20.0),
    "DAPE-Kerple": lambda: posattn.DAPE(posattn.Kerple(HEADS), HEADS),
}
OPTIONS = {
    "positions": lambda: {"q_positions": torch.arange(QUERIES) * 3 % 50, "k_positions": torch.arange(KEYS) * 5 % 60},
    "bias": lambda: {"bias": torch.randn(1, HEADS, QUERIES, KEYS)},
    "bias over heads": lambda: {"bias": torch.randn(1, 1, QUERIES, KEYS)},
    "bias over queries": lambda: {"bias": torch.randn(1, HEADS, 1, KEYS)},
    "bias over keys": lambda: {"bias": torch.randn(1, HEADS, QUERIES, 1)},
    "mask": lambda: {"mask": torch.rand(1, HEADS, QUERIES, KEYS) < 0.6},
    "dropout": lambda: {"dropout_p": 0.4},
    "sinks": lambda: {"sinks": torch.randn(HEADS)},
    "softcap": lambda: {"softcap": 1.5},
    "window": lambda: {"window": (6, 3)},
}


UNREAD = ("none", "positions")  # an error: nobody would read them


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name in ENCODINGS for option in OPTIONS if (name, option) != UNREAD]
)
def test_option(place, name, option):
    torch.manual_seed(5)
    position = ENCODINGS[name]()
    given = {n: x.to(place[0]) if isinstance(x, torch.Tensor) else x for n, x in OPTIONS[option]().items()}
    given.update({n: torch.tensor(b, dtype=torch.int32, device=place[0]) for n, b in BOUNDS.items()})
    q, k, v = (torch.randn(1, HEADS, n, DIM).to(place[0]) for n in (QUERIES, KEYS, KEYS))
    assert_parity(q, k, v, None if position is None else position.to(place[0]), given, place[1])


@pytest.mark.parametrize("name", ["none", "FIRE", "DAPE-Kerple"])
def test_grouped_heads_in_bfloat16(place, name):
    torch.manual_seed(5)
    position = ENCODINGS[name]()
    given = {n: torch.tensor(b, dtype=torch.int32, device=place[0]) for n, b in BOUNDS.items()}
    given |= {"mask": (torch.rand(1, 1, QUERIES, KEYS) < 0.7).to(place[0]), "dropout_p": 0.2, "causal": True}
    shapes = ((1, HEADS, QUERIES, DIM), (1, 2, KEYS, DIM), (1, 2, KEYS, DIM))
    q, k, v = (torch.randn(shape).to(place[0], torch.bfloat16) for shape in shapes)
    assert_parity(q, k, v, None if position is None else position.to(place[0]), given, place[1])
