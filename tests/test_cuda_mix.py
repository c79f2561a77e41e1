"""HeadMix (DAPE) in CUDA, the PTX of its kernels on the PTX machine: every form and operand, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_parity

import posattn
from posattn.backends import cuda_compile

pytestmark = [
    pytest.mark.skipif(cuda_compile.missing() is not None, reason=str(cuda_compile.missing())),
    pytest.mark.usefixtures("ptx_machine"),
]

from tests.ptxsim.seam import behind_launch, ptx_machine  # noqa: E402, F401


def tensors(dtype=torch.bfloat16, heads=3, kv_heads=3, q_len=37, k_len=53, dim=32, batch=1):
    shapes = ((heads, q_len, dim), (kv_heads, k_len, dim), (kv_heads, k_len, dim))
    return [torch.randn(batch, *shape).to(dtype) for shape in shapes]


CASES = {
    "no inner bias": ({}, lambda: posattn.DAPE(None, 3, width=8), lambda: {"causal": True}),
    "table, two sequences": (
        {"batch": 2}, lambda: posattn.DAPE(posattn.Kerple(3), 3, width=8), lambda: {"causal": True}
    ),
    "concat, slope, softcap": (
        {}, lambda: posattn.DAPE(posattn.ALiBi(3, learnable=True), 3, form="concat"), lambda: {"softcap": 3.0}
    ),
    "add, profile": ({}, lambda: posattn.DAPE(posattn.FIRE(3, width=6), 3, form="add"), dict),
    "outer bias, sinks, dropout, window, mask": (
        {"batch": 2}, lambda: posattn.DAPE(posattn.Kerple(3), 3, width=8),
        lambda: {"bias": torch.randn(2, 1, 37, 53), "sinks": torch.randn(3), "dropout_p": 0.3, "window": (20, None),
                 "mask": torch.rand(1, 3, 37, 53) < 0.7},
    ),
    "rotary, grouped heads": (
        {"heads": 12, "kv_heads": 4, "dim": 64, "dtype": torch.float16},
        lambda: posattn.DAPE(posattn.RoPE(64) + posattn.Kerple(12), 12), lambda: {"causal": True},
    ),
    "packed documents": (
        {"q_len": 60, "k_len": 50}, lambda: posattn.DAPE(posattn.Kerple(3), 3, width=8),
        lambda: {
            "causal": True,
            "cu_seqlens_q": torch.tensor([0, 5, 5, 60]),
            "cu_seqlens_k": torch.tensor([0, 20, 21, 50]),
        },
    ),
    "key lengths": (
        {"q_len": 5, "batch": 3}, lambda: posattn.DAPE(posattn.Kerple(3), 3, width=8),
        lambda: {"causal": True, "k_lengths": torch.tensor([0, 3, 49])},
    ),
    "explicit positions": (
        {"q_len": 5}, lambda: posattn.DAPE(posattn.FIRE(3, width=6), 3, width=8),
        lambda: {"q_positions": torch.randint(0, 30, (5,)), "k_positions": torch.randint(0, 30, (53,))},
    ),
    "128 dimensions": ({"heads": 4, "kv_heads": 2, "dim": 128}, lambda: posattn.DAPE(posattn.Kerple(4), 4), dict),
    "88 dimensions, one head": (
        {"heads": 1, "kv_heads": 1, "dim": 88, "dtype": torch.float16}, lambda: posattn.DAPE(None, 1), dict
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(case):
    shape, position, options = case
    torch.manual_seed(3)
    assert_parity(*tensors(**shape), position(), options(), "cuda")
