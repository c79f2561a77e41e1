"""Subnormal numbers count as zero while the kernels run, on every thread, and the caller's mode is as it was after.

They would not change a result that float32 can tell from another, but on Intel's processors each costs a multiply-add a
hundred cycles, and a steep slope makes them by the million.
"""

from __future__ import annotations

import pytest
import torch

import posattn

TINY = 1e-39  # below the least normal float32, 1.18e-38


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [40, 1500], ids=["attention", "many tasks"])
def test_they_are_flushed_while_a_call_runs(isa: str, threads: int, tokens: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        q, k = (torch.randn(1, 4, tokens, 8) for _ in range(2))
        v = torch.full_like(q, TINY).requires_grad_()
        out = posattn.attention(q, k, v, causal=True, backend="cpu")
        out.backward(torch.full_like(out, TINY))
    finally:
        torch.set_num_threads(before)
    assert not out.any()
    assert v.grad is not None
    assert not v.grad.any()
    assert (torch.full((4,), TINY) * 1.0).all()


def test_decoding(isa: str) -> None:
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 3000, 8)
    assert not posattn.attention(q, k, torch.full_like(k, TINY), backend="cpu").any()


def test_dape(isa: str) -> None:
    q = torch.randn(1, 4, 50, 8)
    out = posattn.attention(q, q, torch.full_like(q, TINY), posattn.DAPE(posattn.Kerple(4), 4), backend="cpu")
    assert not out.any()
