"""The CUDA backward pass for sm_90a on the PTX machine: wgmma on the head dimensions and operands it is chosen for."""

from __future__ import annotations

import pytest
import torch

import posattn
from posattn.backends import cpu, cuda
from tests.backends.cuda_machine import sm90_machine  # noqa: F401
from tests.backends.gpu_cases import BF16, CASES, HALF, tensors
from tests.ptxsim.kernel import Options
from tests.ptxsim.seam import behind_launch
from tests.tolerance import assert_parity
from tools.gpu_budget.cuda import cases, figures, launches


@pytest.fixture(autouse=True)
def _forward_on_the_cpu(monkeypatch):
    monkeypatch.setattr(cuda, "forward", cpu.forward)


def main_launch(machine):
    (main,) = (launched for launched in machine.launches if launched.kernel == "attention_backward")
    return main.report


def by_wgmma(report):
    return any(name.startswith("wgmma.mma_async") for name in report.opcodes)


SLOW = pytest.mark.slow
WGMMA = [
    "plain", "table", "D = 24 and 56", "D = 128", "rotary and slope", "in order, table",
    "packed documents, table, dropout, sinks", "causal window, grouped heads, softcap, sinks", "key lengths",
    *(
        pytest.param(name, marks=SLOW)
        for name in (
            "D = 128, grouped heads, one step each", "dense, mask, dropout", "every operand, wide heads",
            "table of explicit positions, T5", "D = 128, T5 both ways", "table, short sequences that share sums",
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("name", WGMMA)
def test_wgmma_serves(name, sm90_machine):  # noqa: F811
    qkv, position, options = CASES[name].inputs()
    leaves = [x.requires_grad_() for x in qkv]
    posattn.attention(*leaves, position, backend="cuda", **options).sum().backward()
    assert by_wgmma(main_launch(sm90_machine))


@pytest.mark.parametrize("dim", [64, 128])
def test_no_bank_conflicts_in_the_main_loop(dim):
    with behind_launch(90, Options(stats=True)) as machine:
        assert_parity(*tensors(HALF, q_len=260, k_len=256, dim=dim), posattn.Kerple(2), {"causal": True}, "cuda")
    report = main_launch(machine)
    assert by_wgmma(report)
    assert not report.main_loop_conflicts
    assert report.counters["shared_requests"] > 0


def test_what_wgmma_does_not_serve_runs_by_mma_sync(sm90_machine):  # noqa: F811
    assert_parity(*tensors(BF16, heads=1, kv_heads=1, q_len=40, k_len=50, dim=192), None, {}, "cuda")
    assert not by_wgmma(main_launch(sm90_machine))


def test_ordered_sums_do_not_depend_on_the_order_of_blocks_and_warps():
    def gradients(reverse, seed):
        torch.manual_seed(0)
        q, k, v = (x.requires_grad_() for x in tensors(BF16, kv_heads=1, q_len=200))
        with behind_launch(90, Options(stats=False, reverse=reverse, seed=seed)):
            out = posattn.attention(q, k, v, posattn.Kerple(2), backend="cuda", causal=True, deterministic=True)
            return torch.autograd.grad(out, [q, k, v], torch.randn(out.shape).to(BF16))

    assert all(torch.equal(a, b) for a, b in zip(gradients(False, 1), gradients(True, 7)))


FLASH_ATTENTION_3 = {64: 1038, 128: 1794}


@pytest.mark.parametrize(
    ("label", "share"), [("plain, D = 64", 1), ("plain, D = 128", 1), ("slope, D = 64", 1.05), ("table, D = 64", 1.16)]
)
def test_modelled_cycles(label, share):
    """Two-phase cycles within FlashAttention-3's plain ones, times what an operand may cost, and no spill."""
    case = next(case for case in cases() if case.label == label)
    (main,) = (x for x in launches(case, "sm_90", backward=True) if x.kernel.name == "attention_backward")
    found = figures(main, "sm_90")
    assert found.spills == 0
    assert found.two_phase <= share * FLASH_ATTENTION_3[case.dim]
