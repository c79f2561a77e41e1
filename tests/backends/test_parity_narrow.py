"""bfloat16 and float16 keep their bits as operands, so the scale waits for the product: every way in which a logit is
finished, with a scale of its own."""

from __future__ import annotations

import pytest
import torch

import posattn
from tests.tolerance import assert_parity

HEADS, DIM, QUERIES, KEYS = 4, 32, 43, 70

pytestmark = pytest.mark.usefixtures("poisoned")

ENCODINGS = {
    "none": lambda: None,
    "RoPE": lambda: posattn.RoPE(DIM),
    "Kerple": lambda: posattn.Kerple(HEADS),
    "FIRE": lambda: posattn.FIRE(HEADS, initial_length=20.0),
    "FIRE and ALiBi": lambda: posattn.FIRE(HEADS, initial_length=20.0) + posattn.ALiBi(HEADS, learnable=True),
    "DAPE-Kerple": lambda: posattn.DAPE(posattn.Kerple(HEADS), HEADS),
}
OPTIONS = {
    "full": dict,
    "causal": lambda: {"causal": True},
    "softcap": lambda: {"softcap": 1.5, "causal": True},
    "bias": lambda: {"bias": torch.randn(1, HEADS, QUERIES, KEYS)},
    "mask": lambda: {"mask": torch.rand(1, HEADS, QUERIES, KEYS) < 0.6},
    "dropout": lambda: {"dropout_p": 0.3},
    "positions": lambda: {"q_positions": torch.arange(QUERIES) * 2, "k_positions": torch.arange(KEYS) + 3},
}
UNREAD = ("none", "positions")  # an error: nobody would read them


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name in ENCODINGS for option in OPTIONS if (name, option) != UNREAD]
)
def test_scale(place, name, option, dtype):
    torch.manual_seed(8)
    position = ENCODINGS[name]()
    given = {n: x.to(place[0]) if isinstance(x, torch.Tensor) else x for n, x in OPTIONS[option]().items()}
    shapes = ((1, HEADS, QUERIES, DIM), (1, 2, KEYS, DIM), (1, 2, KEYS, DIM))
    q, k, v = (torch.randn(shape).to(place[0], dtype) for shape in shapes)
    position = None if position is None else position.to(place[0])
    assert_parity(q, k, v, position, {"scale": 0.45, **given}, place[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_lie_at_odd_distances(place, dtype):
    """Row strides that no pair and no vector divides: what is read in place elsewhere has to be packed here."""
    q, k, v = (torch.randn(1, HEADS, n, DIM + 1).to(place[0], dtype)[..., :DIM] for n in (QUERIES, KEYS, KEYS))
    assert_parity(q, k, v, None, {"causal": True, "scale": 0.45}, place[1])
