"""The CUDA backward pass for sm_90a on the PTX machine: wgmma on the head dimensions and operands it is chosen for."""

from __future__ import annotations

import pytest
import torch

import posattn
from posattn.backends import cpu, cuda
from tests.backends.cuda_machine import kernel_cache, sm90_machine  # noqa: F401
from tests.ptxsim.kernel import Options
from tests.ptxsim.seam import behind_launch
from tests.tolerance import assert_parity
from tools.gpu_budget.cuda import cases, figures, launches

HALF, BF16 = torch.float16, torch.bfloat16


def tensors(dtype, heads=2, kv_heads=2, q_len=150, k_len=300, dim=64, batch=1, dim_v=None):
    shapes = ((heads, q_len, dim), (kv_heads, k_len, dim), (kv_heads, k_len, dim_v or dim))
    return [torch.randn(batch, *shape).to(dtype) for shape in shapes]


def _causal(**options):
    return lambda: {"causal": True, **options}


def _packed():
    queries, keys = torch.tensor([0, 5, 5, 150]), torch.tensor([0, 90, 91, 300])
    return {"causal": True, "cu_seqlens_q": queries, "cu_seqlens_k": keys}


CASES = {
    "plain": (HALF, {}, None, dict),
    "plain, D = 128": (BF16, {"dim": 128}, None, _causal()),
    "D = 24 and 56, padded": (BF16, {"dim": 24, "dim_v": 56}, None, _causal()),
    "D = 96 and 24, padded": (HALF, {"dim": 96, "dim_v": 24}, None, _causal()),
    "grouped heads, window": (BF16, {"heads": 4, "q_len": 300}, None, _causal(window=(140, 0))),
    "grouped heads, one step each": (HALF, {"heads": 4, "kv_heads": 1, "q_len": 40, "dim": 128}, None, _causal()),
    "more queries than keys": (BF16, {"q_len": 300, "k_len": 150}, None, _causal(window=(20, 3))),
    "keys that no query sees": (BF16, {"q_len": 20}, None, lambda: {"window": (30, 0)}),
    "lengths": (BF16, {"batch": 3, "q_len": 20}, None, _causal(k_lengths=torch.tensor([0, 130, 299]))),
    "packed documents": (HALF, {}, lambda: posattn.ALiBi(2, learnable=True), _packed),
    "slope": (BF16, {}, lambda: posattn.ALiBi(2, learnable=True), _causal()),
    "steep slopes": (BF16, {}, lambda: posattn.ALiBi(2, learnable=True, slopes=[20.0, 22.0]), _causal()),
    "table": (BF16, {"kv_heads": 1}, lambda: posattn.Kerple(2), _causal()),
    "table, window": (
        HALF, {"kv_heads": 1, "q_len": 400, "k_len": 390}, lambda: posattn.Kerple(2), _causal(window=(150, 0))
    ),
    "table, short sequences that share sums": (
        HALF, {"batch": 2, "heads": 4, "kv_heads": 1, "q_len": 130, "k_len": 5}, lambda: posattn.Kerple(4), _causal()
    ),
    "table, packed documents": (HALF, {}, lambda: posattn.Kerple(2), _packed),
    "table of explicit positions": (
        BF16, {}, lambda: posattn.T5Bias(2),
        lambda: {"q_positions": torch.arange(150) * 2, "k_positions": torch.arange(300)},
    ),
    "table, D = 128": (HALF, {"dim": 128}, lambda: posattn.T5Bias(2), dict),
    "dropout, dense, mask": (
        HALF, {}, None,
        lambda: {"dropout_p": 0.3, "bias": torch.randn(1, 2, 150, 300), "mask": torch.rand(1, 1, 150, 300) < 0.6},
    ),
    "rotary": (HALF, {}, lambda: posattn.RoPE(64), _causal()),
    "every operand, D = 128": (
        BF16, {"dim": 128, "q_len": 100, "k_len": 150}, lambda: posattn.ALiBi(2, learnable=True) + posattn.Kerple(2),
        _causal(bias=torch.randn(1, 2, 100, 150), softcap=20.0, sinks=torch.randn(2), dropout_p=0.2),
    ),
    "in order": (BF16, {"kv_heads": 1}, lambda: posattn.Kerple(2), _causal(deterministic=True)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _forward_on_the_cpu(monkeypatch):
    monkeypatch.setattr(cuda, "forward", cpu.forward)


def main_launch(machine):
    (main,) = (launched for launched in machine.launches if launched.kernel == "attention_backward")
    return main.report


def by_wgmma(report):
    return any(name.startswith("wgmma.mma_async") for name in report.opcodes)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(case, sm90_machine):  # noqa: F811
    dtype, shape, position, options = case
    assert_parity(*tensors(dtype, **shape), position() if position else None, options(), "cuda")
    assert by_wgmma(main_launch(sm90_machine))


@pytest.mark.parametrize("extra", range(0, 128, 17))
def test_every_remainder_of_a_tile(extra, sm90_machine):  # noqa: F811
    lengths = {"q_len": 129 + extra, "k_len": 129 + 2 * extra % 128}
    assert_parity(*tensors(BF16, heads=1, kv_heads=1, **lengths), None, {"causal": True}, "cuda")


def test_large_logits(sm90_machine):  # noqa: F811
    """Logits in the thousands: weights of exactly one and exactly zero, and log-sum-exps far from both."""
    q, k, v = tensors(BF16, q_len=40, k_len=140)
    assert_parity(100 * q, 100 * k, v, None, {"causal": True, "scale": 1.0}, "cuda")


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
def test_modelled_cycles(label, share, kernel_cache, monkeypatch):  # noqa: F811
    """Two-phase cycles within FlashAttention-3's plain ones, times what an operand may cost, and no spill."""
    monkeypatch.setenv("POSATTN_CACHE_DIR", kernel_cache)
    case = next(case for case in cases() if case.label == label)
    (main,) = (x for x in launches(case, "sm_90", backward=True) if x.kernel.name == "attention_backward")
    found = figures(main, "sm_90")
    assert found.spills == 0
    assert found.two_phase <= share * FLASH_ATTENTION_3[case.dim]
