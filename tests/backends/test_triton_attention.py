"""What is Triton's own in attention, on the PTX machine: dropout of nearly everything, sums in order."""

from __future__ import annotations

import pytest
import torch

import posattn
from tests.backends.gpu_cases import CASES, FULL, tensors

pytest.importorskip("triton")

from tests.ptxsim.kernel import Options
from tests.ptxsim.seam import ptx_machine  # noqa: F401

pytestmark = pytest.mark.usefixtures("ptx_machine")


def test_dropout_of_all_but_nothing():
    out = posattn.attention(*tensors(FULL, q_len=3, k_len=5, dim=16), dropout_p=1 - 2**-40, backend="triton")
    assert not out.any()


# Kernels that test_gpu_parity.py compiles as well.
@pytest.mark.parametrize("name", ["explicit positions, profile", pytest.param("profile", marks=pytest.mark.slow)])
def test_gradients_do_not_depend_on_the_order_of_warps(ptx_machine, name):  # noqa: F811
    """Bit for bit: FIRE has a gradient of every kind, and several blocks of keys add to the same queries."""
    (q, k, v), position, options = CASES[name].inputs()
    leaves = [*(x.requires_grad_() for x in (q, k, v)), *position.parameters()]
    found = []
    for seed in (0, 7):
        ptx_machine.options = Options(stats=False, seed=seed)
        out = posattn.attention(q, k, v, position, deterministic=True, backend="triton", **options)
        found.append(torch.autograd.grad(out.float().square().sum(), leaves))
    for first, second in zip(*found):
        assert torch.equal(first, second)
