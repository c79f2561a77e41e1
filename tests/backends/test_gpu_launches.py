"""What GPU launches read from memory when they run: bounds that nobody looked at before, and dropout's seed."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

import posattn
from posattn import validation
from posattn.backends.cuda import launch as cuda_launch
from posattn.backends.triton import launch as triton_launch
from tests.backends.gpu_cases import HALF, tensors
from tests.ptxsim.seam import behind_launch

POSITIONS = {
    "table": lambda: posattn.Kerple(2),
    "DAPE": lambda: posattn.DAPE(posattn.Kerple(2), 2, width=8),
}


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", POSITIONS)
def test_tokens_of_no_document_have_no_share_in_any_gradient(name, backend, monkeypatch):
    """Bounds on a GPU are not read, so they may end early; what the tokens behind them are given goes nowhere."""
    monkeypatch.setattr(validation, "_readable", lambda tensor: False)
    bounds = {"cu_seqlens_q": torch.tensor([0, 5, 5, 50]), "cu_seqlens_k": torch.tensor([0, 20, 21, 45])}
    position = POSITIONS[name]()
    q, k, v = (x.requires_grad_() for x in tensors(HALF, q_len=60, k_len=50, dim=32))
    sinks, inside = torch.randn(2, requires_grad=True), torch.arange(60) < 50
    given = torch.randn(1, 2, 60, 32).half(), torch.randn(1, 2, 60)

    def gradients(given):
        out, lse = posattn.attention(
            q, k, v, position, sinks=sinks, causal=True, deterministic=True, return_lse=True, backend=backend, **bounds
        )
        return torch.autograd.grad([out, lse], [q, k, v, sinks, *position.parameters()], given)

    with behind_launch(80):
        got = gradients(given)
        want = gradients([given[0] * inside[:, None], given[1] * inside])
    assert all(map(torch.equal, got, want))
    assert all(x.abs().sum() > 0 for x in got)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", POSITIONS)
def test_a_launch_again_drops_what_its_seed_now_says(name, backend):
    """As a captured graph launches again what it was given, after torch has drawn the seed anew."""
    seam, launched = {"cuda": cuda_launch, "triton": triton_launch}[backend], []
    q, k, v = tensors(HALF, q_len=40, k_len=40, dim=32)
    position = POSITIONS[name]()

    def run(seed: torch.Tensor) -> torch.Tensor:
        with mock.patch.object(torch, "randint", return_value=seed), torch.no_grad():
            return posattn.attention(q, k, v, position, dropout_p=0.5, backend=backend)

    with behind_launch(80):
        launch = seam.launch

        def record(*given: Any) -> None:
            launched.append(given)
            launch(*given)

        with mock.patch.object(seam, "launch", record):
            seed = torch.tensor([11])
            out = run(seed)
        first, second = out.clone(), run(torch.tensor([2**40 + 5]))
        assert torch.equal(first, run(torch.tensor([11])))
        assert not torch.equal(first, second)
        seed.fill_(2**40 + 5)
        for given in launched:
            launch(*given)
    assert torch.equal(out, second)
