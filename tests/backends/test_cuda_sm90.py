"""The CUDA forward kernel for sm_90a on the PTX machine: wgmma on the head dimensions and operands it is chosen for."""

from __future__ import annotations

import pytest
import torch

import posattn
from tests.backends.cuda_machine import assert_forward_parity, kernel_cache, sm90_machine  # noqa: F401
from tests.ptxsim.kernel import Options
from tests.ptxsim.seam import behind_launch

HALF, BF16 = torch.float16, torch.bfloat16


def tensors(dtype, q_len=150, k_len=300, dim=64, dim_v=None, heads=2):
    return [torch.randn(1, heads, n, d).to(dtype) for n, d in ((q_len, dim), (k_len, dim), (k_len, dim_v or dim))]


def _causal(**options):
    return lambda: {"causal": True, **options}


CASES = {
    "plain": (BF16, {}, None, dict),
    "plain, D = 128": (HALF, {"dim": 128}, None, _causal()),
    "D = 40, padded": (BF16, {"dim": 40}, lambda: posattn.ALiBi(2), dict),
    "D = 96, padded": (BF16, {"dim": 96, "k_len": 150}, lambda: posattn.Kerple(2), _causal()),
    "D = 192 and 32": (HALF, {"dim": 192, "dim_v": 32, "q_len": 70}, lambda: posattn.ALiBi(2), _causal()),
    "D = 256": (BF16, {"dim": 256, "q_len": 70}, lambda: posattn.FIRE(2, width=8), _causal()),
    "values wider than keys": (BF16, {"dim": 64, "dim_v": 128}, lambda: posattn.Kerple(2), _causal()),
    "keys wider than values": (HALF, {"dim": 128, "dim_v": 64}, lambda: posattn.FIRE(2, width=8), _causal()),
    "all by distance, window": (
        BF16, {}, lambda: posattn.ALiBi(2) + posattn.Kerple(2) + posattn.FIRE(2, width=8), _causal(window=(140, 0))
    ),
    "rotary": (HALF, {}, lambda: posattn.RoPE(64), _causal()),
    "rotary, D = 128": (BF16, {"dim": 128}, lambda: posattn.RoPE(128) + posattn.ALiBi(2), _causal()),
    "softcap and sinks": (BF16, {}, None, lambda: {"softcap": 5.0, "sinks": torch.randn(2), "causal": True}),
    "dropout, dense, mask": (
        HALF, {}, None,
        lambda: {"dropout_p": 0.3, "bias": torch.randn(1, 2, 150, 300), "mask": torch.rand(1, 1, 150, 300) < 0.6},
    ),
    "more queries than keys": (BF16, {"q_len": 300, "k_len": 150}, None, _causal()),
    "split keys": (BF16, {"q_len": 40, "k_len": 600}, lambda: posattn.Kerple(2), _causal()),
}  # fmt: skip


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward(case, sm90_machine):  # noqa: F811
    dtype, shape, position, options = case
    assert_forward_parity(*tensors(dtype, **shape), position() if position else None, options())
    opcodes = sm90_machine.launches[0].report.opcodes
    assert any(name.startswith("wgmma.mma_async") for name in opcodes)


@pytest.mark.parametrize("extra", range(0, 128, 17))
def test_every_remainder_of_a_tile(extra, sm90_machine):  # noqa: F811
    assert_forward_parity(*tensors(HALF, 129 + extra, 129 + extra, heads=1), None, {"causal": True})


def test_what_wgmma_does_not_serve_runs_by_mma_sync(sm90_machine):  # noqa: F811
    assert_forward_parity(*tensors(BF16, 60, 60, 32), None, {"causal": True})
    assert not any(name.startswith("wgmma") for name in sm90_machine.launches[-1].report.opcodes)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_no_bank_conflicts_in_the_main_loop(dim, sm90_machine):  # noqa: F811
    q, k, v = tensors(BF16, 128, 256, dim)
    with behind_launch(90, Options(stats=True)) as machine:
        posattn.attention(q, k, v, posattn.Kerple(2), backend="cuda")
    assert not machine.launches[0].report.main_loop_conflicts
