"""Gradients of dense biases that broadcast over queries or keys, on both GPU backends."""

from __future__ import annotations

import pytest
import torch

import posattn
from tests.ptxsim.seam import behind_launch
from tests.tolerance import assert_parity

BACKENDS = ["cuda", "triton"]
# Of each sequence and head or shared; where a head's logits are mixed with others', two shapes meet every sum.
PLAIN = [(1, 1, 1, 70), (2, 4, 1, 70), (2, 1, 50, 1), (1, 4, 50, 1), (1, 1, 1, 1)]
MIXED = [(2, 4, 1, 70), (1, 1, 50, 1)]
CASES = [(None, shape) for shape in PLAIN] + [(posattn.DAPE(posattn.Kerple(4), 4), shape) for shape in MIXED]


@pytest.mark.parametrize(("position", "shape"), CASES, ids=lambda x: "DAPE" if isinstance(x, posattn.DAPE) else str(x))
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_a_batch(position: posattn.DAPE | None, shape: tuple[int, ...], backend: str) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, 50, 32, dtype=torch.bfloat16)
    k, v = (torch.randn(2, 2, 70, 32, dtype=torch.bfloat16) for _ in range(2))
    options = {"bias": torch.randn(shape), "k_lengths": torch.tensor([33, 70]), "sinks": torch.randn(4)}
    with behind_launch(80):
        assert_parity(q, k, v, position, {**options, "causal": True, "deterministic": True}, backend)


@pytest.mark.parametrize("shape", [(1, 1, 1, 90), (1, 2, 90, 1)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed(shape: tuple[int, ...], backend: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 90, 32, dtype=torch.bfloat16) for _ in range(3))
    starts = torch.tensor([0, 40, 90])
    options = {"bias": torch.randn(shape), "cu_seqlens_q": starts, "cu_seqlens_k": starts}
    with behind_launch(90):
        assert_parity(q, k, v, None, options, backend)
