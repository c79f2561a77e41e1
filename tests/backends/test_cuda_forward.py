"""What is CUDA's own in its forward kernels, on the PTX machine: a row's reference, copies of any alignment, banks."""

from __future__ import annotations

import pytest
import torch

import posattn
from tests.backends.cuda_machine import cuda_machine  # noqa: F401
from tests.backends.gpu_cases import BF16, HALF, tensors
from tests.ptxsim.kernel import Options
from tests.ptxsim.seam import behind_launch
from tests.tolerance import assert_forward_parity

pytestmark = pytest.mark.usefixtures("cuda_machine")


def test_rising_logits_move_the_reference():
    """Each tile of keys exceeds the one before by more than the slack, and by less: both must be exact."""
    for step in (0.03, 3.0):
        q = torch.ones(1, 1, 20, 32, dtype=HALF)
        k = (step * torch.arange(400.0)[:, None].expand(400, 32) / 32).to(HALF)[None, None]
        assert_forward_parity(q, k, torch.randn(1, 1, 400, 32).to(HALF), None, {"scale": 1.0}, "cuda")


def test_strides_of_views():
    """Heads inside tokens, and rows that no 16-byte copy can read."""
    q, k, v = (torch.randn(1, n, 2, 64).to(BF16).transpose(1, 2) for n in (70, 90, 90))
    assert_forward_parity(q, k, v, None, {"causal": True}, "cuda")
    q, k, v = (torch.randn(1, 2, n, 67).to(BF16)[..., 3:] for n in (70, 90, 90))
    assert_forward_parity(q, k, v, None, {"causal": True}, "cuda")


@pytest.mark.parametrize("dim", [64, 128, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (32, 96, 192, 256))])
@pytest.mark.parametrize("position", [None, posattn.Kerple(2)], ids=["plain", "table"])
def test_no_bank_conflicts_in_the_main_loop(dim, position):
    q, k, v = tensors(BF16, q_len=128, k_len=256, dim=dim)
    with behind_launch(80, Options(stats=True)) as machine:
        posattn.attention(q, k, v, position, backend="cuda")
    assert not machine.launches[-1].report.main_loop_conflicts
