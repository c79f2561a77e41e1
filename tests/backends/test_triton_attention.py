"""What is Triton's own in attention, on the PTX machine: dropout of nearly everything, sums in order."""

from __future__ import annotations

import pytest
import torch

import posattn
from tests.backends.gpu_cases import BF16, FULL, tensors

pytest.importorskip("triton")

from tests.ptxsim.kernel import Options
from tests.ptxsim.seam import ptx_machine  # noqa: F401

pytestmark = pytest.mark.usefixtures("ptx_machine")


def test_dropout_of_all_but_nothing():
    out = posattn.attention(*tensors(FULL, q_len=3, k_len=5, dim=16), dropout_p=1 - 2**-40, backend="triton")
    assert not out.any()


@pytest.mark.parametrize("explicit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradients_do_not_depend_on_the_order_of_warps(ptx_machine, explicit):  # noqa: F811
    """Bit for bit: FIRE and ALiBi have a gradient of every kind, and two blocks of keys add to the same queries."""
    q, k, v = (x.requires_grad_() for x in tensors(BF16, heads=1, kv_heads=1, q_len=40, k_len=140, dim=32))
    position = posattn.FIRE(1, width=4)
    places = {"q_positions": torch.arange(40), "k_positions": torch.arange(140) // 2} if explicit else {}
    found = []
    for seed in (0, 7):
        ptx_machine.options = Options(stats=False, seed=seed)
        out = posattn.attention(q, k, v, position, deterministic=True, backend="triton", **places)
        found.append(torch.autograd.grad(out.float().square().sum(), (q, k, v, *position.parameters())))
    for first, second in zip(*found):
        assert torch.equal(first, second)
