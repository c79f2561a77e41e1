"""The CUDA forward kernel for sm_90a on the PTX machine: wgmma on the head dimensions and operands it is chosen for."""

from __future__ import annotations

import pytest
import torch

import posattn
from tests.backends.cuda_machine import sm90_machine  # noqa: F401
from tests.backends.gpu_cases import BF16, CASES, tensors
from tests.ptxsim.kernel import Options
from tests.ptxsim.seam import behind_launch
from tests.tolerance import assert_forward_parity

SLOW = pytest.mark.slow
WGMMA = [
    "plain", "D = 24 and 56", "D = 128", "table", "profile", "table and mask", "rotary and slope",
    "every operand", "causal window, grouped heads, softcap, sinks", "packed documents, table, dropout, sinks",
    *(
        pytest.param(name, marks=SLOW)
        for name in (
            "D = 96", "D = 128 and 64, profile", "D = 192 and 32, slope", "D = 256, profile", "dense, mask, dropout",
            "all by distance, window", "rotary and slope, wide heads", "split keys of many queries",
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("name", WGMMA)
def test_wgmma_serves(name, sm90_machine):  # noqa: F811
    (q, k, v), position, options = CASES[name].inputs()
    with torch.no_grad():
        posattn.attention(q, k, v, position, backend="cuda", **options)
    assert any(opcode.startswith("wgmma.mma_async") for opcode in sm90_machine.launches[0].report.opcodes)


def test_what_wgmma_does_not_serve_runs_by_mma_sync(sm90_machine):  # noqa: F811
    assert_forward_parity(*tensors(BF16, q_len=60, k_len=60, dim=32), None, {"causal": True}, "cuda")
    assert not any(name.startswith("wgmma") for name in sm90_machine.launches[-1].report.opcodes)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_no_bank_conflicts_in_the_main_loop(dim, sm90_machine):  # noqa: F811
    q, k, v = tensors(BF16, q_len=128, k_len=256, dim=dim)
    with behind_launch(90, Options(stats=True)) as machine:
        posattn.attention(q, k, v, posattn.Kerple(2), backend="cuda")
    assert not machine.launches[0].report.main_loop_conflicts
