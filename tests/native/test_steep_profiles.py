"""FIRE with steep pieces before flat ones: what lies past a knot owes nothing to the slope before it."""

from __future__ import annotations

import pytest
import torch

import posattn
from posattn.encodings.base import Encoding
from tests.tolerance import assert_parity

pytestmark = pytest.mark.usefixtures("poisoned")


def steep(slope: float) -> posattn.FIRE:
    """f(y) = relu(1 - slope y) for one head and 2 f for the other: zero but for the nearest keys."""
    position = posattn.FIRE(2, width=1, initial_length=16.0)
    with torch.no_grad():
        for parameter, values in zip(position.mlp.parameters(), ([-slope], [1.0], [1.0, 2.0], [0.0, 0.25])):
            parameter.copy_(torch.tensor(values).view_as(parameter))
    return position


@pytest.mark.parametrize("slope", [1e3, 1e6])
@pytest.mark.parametrize("case", ["causal", "both ways", "positions", "decoding", "mixed", "bfloat16"])
def test_a_flat_piece_after_a_steep_one(isa: str, case: str, slope: float) -> None:
    decoding = case == "decoding"
    q_len, k_len = (3, 1100) if decoding else (70, 90)
    q, k, v = (torch.randn(1, 2, tokens, 16) for tokens in (q_len, k_len, k_len))
    position: Encoding = steep(slope)
    options: dict[str, object] = {"causal": case != "both ways"}
    if case == "positions":
        options = {"q_positions": 3 * torch.arange(q_len), "k_positions": 2 * torch.arange(k_len)}
    if case == "mixed":
        position = posattn.DAPE(position, 2, width=4)
    if case == "bfloat16":
        q, k, v = (x.bfloat16() for x in (q, k, v))
    assert_parity(q, k, v, position, options, "cpu")
