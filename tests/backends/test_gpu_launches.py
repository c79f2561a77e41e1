"""What GPU launches read from memory when they run: bounds that nobody looked at before, and dropout's seed."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

import posattn
from posattn import ops, validation
from posattn.backends.cuda import launch as cuda_launch
from posattn.backends.triton import launch as triton_launch
from tests.backends.gpu_cases import CASES, packed
from tests.ptxsim.seam import behind_launch

# By name, kernels that test_gpu_parity.py compiles as well, and bounds that end before the tokens do.
SHORT = {
    "packed documents, table, dropout, sinks": packed(0, 7, 7, 131, keys=(0, 90, 91, 200)),
    "mix, packed documents, dropout, sinks": packed(0, 5, 5, 50, keys=(0, 20, 21, 45)),
}


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", SHORT)
def test_tokens_of_no_document_have_no_share_in_any_gradient(name, backend, monkeypatch):
    """Bounds on a GPU are not read, so they may end early; what the tokens behind them are given goes nowhere."""
    monkeypatch.setattr(validation, "_readable", lambda tensor: False)
    (q, k, v), position, options = CASES[name].inputs()
    options.update(SHORT[name])
    leaves = [*(x.requires_grad_() for x in (q, k, v, options["sinks"])), *position.parameters()]
    inside = torch.arange(q.shape[2]) < options["cu_seqlens_q"][-1]
    given = torch.randn(q.shape).to(q.dtype), torch.randn(q.shape[:3])

    def gradients(given):
        torch.manual_seed(1)  # of dropout
        out, lse = posattn.attention(q, k, v, position, return_lse=True, backend=backend, **options)
        return torch.autograd.grad([out, lse], leaves, given)

    with behind_launch(80):
        got = gradients(given)
        want = gradients([given[0] * inside[:, None], given[1] * inside])
    assert all(map(torch.equal, got, want))
    assert all(x.abs().sum() > 0 for x in got)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", SHORT)
def test_a_launch_again_drops_what_its_seed_now_says(name, backend):
    """As a captured graph launches again what it was given, after torch has drawn the seed anew."""
    seam, launched = {"cuda": cuda_launch, "triton": triton_launch}[backend], []
    (q, k, v), position, options = CASES[name].inputs()

    def run(seed: torch.Tensor) -> torch.Tensor:
        with mock.patch.object(torch, "randint", return_value=seed), torch.no_grad():
            return posattn.attention(q, k, v, position, backend=backend, **options)

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


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_pages_are_read_where_they_lie(backend, monkeypatch):
    """Nothing is gathered; and an entry that names no page of the pool, which nobody can look for, reads one that is
    there: the machine finds no access outside it."""

    def refuse(call: Any) -> Any:
        raise AssertionError("keys were gathered")

    name = "pages of three, few queries, rotary, dense, mask, key starts, offset"
    torch.manual_seed(0)
    (q, k, v), position, options = CASES[name].inputs()
    monkeypatch.setattr(ops, "gathered_call", refuse)
    monkeypatch.setattr(validation, "_readable", lambda tensor: False)
    with behind_launch(80), torch.no_grad():
        out = posattn.attention(q, k, v, position, backend=backend, **options)
        table = options["block_table"]
        clamped = table.clone()
        table[0, 20], table[0, 21] = -5, 10**6
        clamped[0, 20], clamped[0, 21] = 0, k.shape[0] - 1
        wrong = posattn.attention(q, k, v, position, backend=backend, **options)
        same = posattn.attention(q, k, v, position, backend=backend, **{**options, "block_table": clamped})
    assert torch.equal(wrong.nan_to_num(7.0), same.nan_to_num(7.0))
    assert torch.equal(wrong[1], out[1])
    assert not torch.equal(wrong[0], out[0])
