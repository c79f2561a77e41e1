"""The CUDA forward kernels' real PTX on the PTX machine: out and lse within the tolerance rule, and no finding.

Every plan operand, mask, dtype, head dimension and option of the plain family occurs at least once; sizes are odd, and
small enough for a few blocks.
"""

from __future__ import annotations

import math

import pytest
import torch

import posattn
from tests.backends.cuda_machine import assert_forward_parity, cuda_machine, kernel_cache  # noqa: F401
from tests.ptxsim.kernel import Options
from tests.ptxsim.seam import behind_launch

pytestmark = pytest.mark.usefixtures("cuda_machine")

HALF, BF16 = torch.float16, torch.bfloat16


def tensors(dtype, heads=2, kv_heads=2, q_len=70, k_len=150, dim=64, batch=1, dim_v=None):
    shapes = ((heads, q_len, dim), (kv_heads, k_len, dim), (kv_heads, k_len, dim_v or dim))
    return [torch.randn(batch, *shape).to(dtype) for shape in shapes]


def _mask(q_len, k_len, heads):
    return torch.rand(1, heads, q_len, k_len) < 0.1


def _causal(**options):
    return lambda: {"causal": True, **options}


CASES = {
    "plain": (BF16, {}, None, dict),
    "plain, float16, D = 128": (HALF, {"dim": 128}, None, _causal()),
    "D = 32": (BF16, {"dim": 32}, lambda: posattn.Kerple(2), _causal()),
    "D = 96": (BF16, {"dim": 96}, lambda: posattn.Kerple(2), _causal()),
    "D = 96, profile": (HALF, {"dim": 96}, lambda: posattn.FIRE(2, width=8), _causal()),
    "D = 128": (BF16, {"dim": 128, "q_len": 150}, lambda: posattn.ALiBi(2), _causal()),
    "D = 192 and 256": (BF16, {"dim": 192, "dim_v": 256}, lambda: posattn.FIRE(2, width=8), _causal()),
    "D = 256": (HALF, {"dim": 256}, lambda: posattn.ALiBi(2), dict),
    "values wider than keys": (BF16, {"dim": 32, "dim_v": 128}, None, _causal()),
    "causal window, grouped heads": (HALF, {"kv_heads": 1}, None, _causal(window=(40, None))),
    "more queries than keys": (BF16, {"q_len": 150, "k_len": 70}, None, lambda: {"causal": True, "window": (20, 3)}),
    "narrow window": (BF16, {"q_len": 300, "k_len": 300, "dim": 32}, lambda: posattn.ALiBi(2), _causal(window=(70, 0))),
    "softcap and sinks": (BF16, {}, None, lambda: {"softcap": 5.0, "sinks": torch.randn(2), "causal": True}),
    "dropout, odd dims": (HALF, {"dim": 40, "dim_v": 24}, None, lambda: {"dropout_p": 0.4}),
    "negative scale, one dimension": (BF16, {"dim": 1, "q_len": 9, "k_len": 33}, None, lambda: {"scale": -1.0}),
    "one query, one key": (BF16, {"q_len": 1, "k_len": 1}, lambda: posattn.Kerple(2), lambda: {"dropout_p": 0.3}),
    "no keys": (BF16, {"k_len": 0}, None, dict),
    "ALiBi both ways": (HALF, {}, lambda: posattn.ALiBi(2), dict),
    "table and mask": (BF16, {}, lambda: posattn.T5Bias(2), lambda: {"mask": _mask(70, 150, 2)}),
    "table that clamps": (BF16, {}, lambda: posattn.RelativeTable(2, 20), dict),
    "profile": (BF16, {"k_len": 250}, lambda: posattn.FIRE(2, width=8), _causal()),
    "profile of many knots": (HALF, {}, lambda: posattn.FIRE(2, width=40), _causal()),
    "all by distance": (BF16, {}, lambda: posattn.ALiBi(2) + posattn.Kerple(2) + posattn.FIRE(2, width=8), _causal()),
    "dense": (BF16, {}, None, lambda: {"bias": torch.randn(1, 2, 70, 150).masked_fill(_mask(70, 150, 2), -math.inf)}),
    "dense, D = 128": (BF16, {"dim": 128}, None, lambda: {"bias": torch.randn(1, 2, 70, 150), "causal": True}),
    "dense, bfloat16, shared": (
        BF16, {"batch": 2}, None, lambda: {"bias": torch.randn(1, 1, 70, 150).to(BF16), "causal": True}
    ),
    "dense, float16, transposed": (
        HALF, {"dim": 32}, lambda: posattn.ALiBi(2), lambda: {"bias": torch.randn(1, 2, 150, 70).to(HALF).mT}
    ),
    "rotary turned in the kernel": (BF16, {}, lambda: posattn.RoPE(64), _causal()),
    "rotary turned ahead": (
        HALF, {"q_len": 300, "k_len": 300, "dim": 32}, lambda: posattn.RoPE(32, layout="interleaved", rotary_dim=16),
        _causal(),
    ),
    "rotary ahead in halves": (HALF, {"q_len": 270, "k_len": 65, "dim": 32}, lambda: posattn.RoPE(32), dict),
    "odd rotary and ALiBi": (BF16, {"dim": 24}, lambda: posattn.RoPE(24, rotary_dim=6) + posattn.ALiBi(2), _causal()),
    "key lengths": (
        BF16, {"q_len": 25, "batch": 3}, lambda: posattn.Kerple(2), _causal(k_lengths=torch.tensor([0, 3, 149]))
    ),
    "packed documents": (
        BF16, {"q_len": 130, "k_len": 120}, lambda: posattn.Kerple(2),
        _causal(
            dropout_p=0.3, cu_seqlens_q=torch.tensor([0, 5, 5, 130]), cu_seqlens_k=torch.tensor([0, 50, 51, 120])
        ),
    ),
}  # fmt: skip


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward(case):
    dtype, shape, position, options = case
    assert_forward_parity(*tensors(dtype, **shape), position() if position else None, options())


def test_explicit_positions():
    """Not poisoned: poisoning sets torch's deterministic mode, which refuses the gradients' atomics."""
    options = {"q_positions": torch.randint(0, 100, (70,)), "k_positions": torch.randint(0, 100, (1, 150))}
    position = posattn.Kerple(2) + posattn.ALiBi(2) + posattn.FIRE(2, width=8)
    assert_forward_parity(*tensors(BF16), position, options)


@pytest.mark.parametrize("extra", range(0, 64, 7))
def test_every_remainder_of_a_tile(extra):
    assert_forward_parity(*tensors(HALF, 1, 1, 65 + extra, 65 + extra, 32), None, {"causal": True})


def test_large_logits_stay_finite():
    """Logits in the thousands: exponents far outside float32's range if a row's reference did not follow them."""
    q, k, v = tensors(BF16, q_len=40, k_len=200)
    assert_forward_parity(100 * q, 100 * k, v, None, {"causal": True, "scale": 1.0})


def test_rising_logits_move_the_reference():
    """Each tile of keys exceeds the one before by more than the slack, and by less: both must be exact."""
    for step in (0.03, 3.0):
        q = torch.ones(1, 1, 20, 32, dtype=HALF)
        k = (step * torch.arange(400.0)[:, None].expand(400, 32) / 32).to(HALF)[None, None]
        assert_forward_parity(q, k, torch.randn(1, 1, 400, 32).to(HALF), None, {"scale": 1.0})


def test_strides_of_views():
    """Heads inside tokens, and rows that no 16-byte copy can read."""
    q, k, v = (torch.randn(1, n, 2, 64).to(BF16).transpose(1, 2) for n in (70, 90, 90))
    assert_forward_parity(q, k, v, None, {"causal": True})
    q, k, v = (torch.randn(1, 2, n, 67).to(BF16)[..., 3:] for n in (70, 90, 90))
    assert_forward_parity(q, k, v, None, {"causal": True})


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("position", [None, posattn.Kerple(2)], ids=["plain", "table"])
def test_no_bank_conflicts_in_the_main_loop(dim, position):
    q, k, v = tensors(BF16, q_len=128, k_len=256, dim=dim)
    with behind_launch(80, Options(stats=True)) as machine:
        posattn.attention(q, k, v, position, backend="cuda")
    assert not machine.launches[-1].report.main_loop_conflicts
