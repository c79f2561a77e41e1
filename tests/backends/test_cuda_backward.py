"""What is CUDA's own in its backward kernels, on the PTX machine: every tile's banks, sums in order, modelled cycles.

The forward pass is the CPU's: the CUDA one has its own tests.
"""

from __future__ import annotations

import pytest
import torch

import posattn
from tests.backends.gpu_cases import BF16, HALF, tensors
from tests.tolerance import assert_parity

pytest.importorskip("cuda.core")

from posattn.backends import cpu, cuda
from posattn.backends.common.arch import shared_memory
from posattn.backends.common.reductions import by_entry
from posattn.backends.cuda import backward_operands
from posattn.backends.cuda.configs import backward
from tests.ptxsim.kernel import Options
from tests.ptxsim.seam import behind_launch
from tools.gpu_budget.cuda import cases, figures, launches


@pytest.fixture(autouse=True)
def _forward_on_the_cpu(monkeypatch):
    monkeypatch.setattr(cuda, "forward", cpu.forward)


def _plan(heads):
    """A bias with every gradient that has shared memory of its own in the kernel."""
    return posattn.Kerple(heads) + posattn.FIRE(heads, width=8)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("small", [False, True], ids=["163 KiB", "99 KiB"])
@pytest.mark.parametrize("dim", [64, 128, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (32, 96, 192, 256))])
def test_every_tile_without_bank_conflicts(dim, small, monkeypatch):
    if small:
        monkeypatch.setattr(backward, "shared_memory", lambda _: shared_memory("sm_86"))
    with behind_launch(80, Options(stats=True)) as machine:
        assert_parity(*tensors(HALF, q_len=130, k_len=141, dim=dim), _plan(2), {"causal": True}, "cuda")
    (main,) = (launched for launched in machine.launches if launched.kernel == "attention_backward")
    assert not main.report.main_loop_conflicts
    assert main.report.counters["shared_requests"] > 0


def _gradients(options, reverse, seed):
    torch.manual_seed(0)
    q, k, v = (x.requires_grad_() for x in tensors(BF16, kv_heads=1, q_len=200, k_len=290, dim=32))
    position = posattn.ALiBi(2, learnable=True) + _plan(2)
    with behind_launch(80, Options(stats=False, reverse=reverse, seed=seed)):
        out = posattn.attention(q, k, v, position, backend="cuda", **options)
        leaves = [q, k, v, *position.parameters(), *filter(torch.is_tensor, [options.get("bias")])]
        return torch.autograd.grad(out, leaves, torch.randn(out.shape).to(BF16))


IN_ORDER = {
    "by distance": {},
    "explicit positions": {"q_positions": torch.arange(200) * 2, "k_positions": torch.arange(290)},
    "a bias of each key": {"bias": torch.zeros(1, 1, 1, 290, requires_grad=True)},
}


@pytest.mark.parametrize("options", IN_ORDER.values(), ids=IN_ORDER.keys())
def test_ordered_sums_do_not_depend_on_the_order_of_blocks_and_warps(options):
    options = {"causal": True, "deterministic": True, **options}
    first, second = _gradients(options, False, 1), _gradients(options, True, 7)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_many_short_documents_beside_a_long_one_share_sums_by_distance(monkeypatch):
    """Else there would be a sum for each distance of the longest document and each document."""
    kept = []
    sums = backward_operands.sums
    monkeypatch.setattr(backward_operands, "sums", lambda of: kept.append(sums(of)) or kept[-1])
    cu_seqlens = torch.cat([torch.tensor([0, 300]), torch.arange(301, 381)]).int()
    tokens = int(cu_seqlens[-1])
    packed = {"causal": True, "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    with behind_launch(80):
        assert_parity(*tensors(BF16, q_len=tokens, k_len=tokens, dim=16), _plan(2), packed, "cuda")
    assert kept[0]["dtable"].shape[0] > 0
    assert max(kept[0][name].numel() for name in ("dtable", "dpsi")) <= 2 * (2 * 2 * tokens)


def _figures(label):
    case = next(case for case in cases() if case.label == label)
    (main,) = (noted for noted in launches(case, "sm_80", backward=True) if noted.kernel.name == "attention_backward")
    return figures(main, "sm_80")


@pytest.mark.parametrize(("dim", "flash_attention_2", "over_plain"), [(64, 1850, 1.17), (128, 3255, 1.15)])
def test_modelled_cycles(dim, flash_attention_2, over_plain):
    """Two-phase cycles beside FlashAttention-2's, and what the gradient of a table adds."""
    plain, table, profile = (_figures(f"{name}, D = {dim}") for name in ("plain", "table", "profile"))
    assert plain.two_phase <= flash_attention_2
    assert table.two_phase <= over_plain * plain.two_phase
    assert plain.loop_spills == table.loop_spills == profile.loop_spills == 0


@pytest.mark.parametrize(("start", "first", "length"), [(-9, -3, 5), (2, -3, 4), (-30, 1, 7), (-2, -6, 30), (0, 0, 10)])
def test_distances_outside_a_table_belong_to_its_ends(start, first, length):
    sums = torch.randn(2, 10)
    want = torch.zeros(2, length)
    for x in range(10):
        want[:, min(max(start + x - first, 0), length - 1)] += sums[:, x]
    torch.testing.assert_close(by_entry(sums, start, first, length), want)
