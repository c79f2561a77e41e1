"""Few queries on the CUDA backend: heads packed into rows, split keys, and their combination, on the PTX machine."""

from __future__ import annotations

import pytest
import torch

import posattn
from tests.backends.cuda_machine import assert_forward_parity, cuda_machine, kernel_cache  # noqa: F401
from tests.ptxsim.kernel import Options
from tests.ptxsim.seam import behind_launch

HALF, BF16 = torch.float16, torch.bfloat16


def tensors(dtype, heads, kv_heads, q_len, k_len, dim=64, batch=1, dim_v=None):
    shapes = ((heads, q_len, dim), (kv_heads, k_len, dim), (kv_heads, k_len, dim_v or dim))
    return [torch.randn(batch, *shape).to(dtype) for shape in shapes]


def _rows(q_len, k_len):
    return torch.rand(1, 1, q_len, k_len) < 0.5


# dtype, sizes, encoding, options, kernels
CASES = {
    "one query": ((BF16, 4, 2, 1, 100), None, dict, ["attention_decode"]),
    "three queries of eight heads": (
        (BF16, 8, 1, 3, 300), lambda: posattn.Kerple(8), lambda: {"causal": True}, ["attention_decode"]
    ),
    "split, D = 128, sinks": (
        (HALF, 4, 1, 1, 700, 128), lambda: posattn.ALiBi(4), lambda: {"causal": True, "sinks": torch.randn(4)},
        ["attention_decode", "attention_combine"],
    ),
    "D = 256, window": (
        (BF16, 2, 2, 5, 130, 256), lambda: posattn.FIRE(2, width=8), lambda: {"causal": True, "window": (40, 0)},
        ["attention_decode"],
    ),
    "two blocks of rows": (
        (BF16, 4, 1, 6, 90, 192), lambda: posattn.RoPE(192) + posattn.FIRE(4, width=8), lambda: {"causal": True},
        ["attention_decode"],
    ),
    "rotary": ((BF16, 2, 2, 5, 130), lambda: posattn.RoPE(64), lambda: {"causal": True}, ["attention_decode"]),
    "split, rotary, dropout, wider values": (
        (BF16, 4, 2, 5, 1130, 32, 1, 64), lambda: posattn.RoPE(32) + posattn.ALiBi(4),
        lambda: {"causal": True, "dropout_p": 0.3}, ["attention_decode", "attention_combine"],
    ),
    "key lengths, softcap": (
        (BF16, 4, 2, 2, 140, 64, 3), lambda: posattn.Kerple(4),
        lambda: {"causal": True, "k_lengths": torch.tensor([0, 3, 139]), "softcap": 5.0}, ["attention_decode"],
    ),
    "dense and mask": (
        (BF16, 4, 2, 2, 140, 64, 2), None,
        lambda: {"bias": torch.randn(1, 4, 2, 140).to(BF16), "mask": _rows(2, 140)}, ["attention_decode"],
    ),
    "packed documents": (
        (HALF, 4, 2, 7, 600, 40), lambda: posattn.Kerple(4),
        lambda: {
            "causal": True, "cu_seqlens_q": torch.tensor([0, 1, 5, 7]), "cu_seqlens_k": torch.tensor([0, 1, 590, 600])
        },
        ["attention_decode", "attention_combine"],
    ),
    "more splits than lanes": (
        (HALF, 2, 1, 1, 10300, 32), lambda: posattn.ALiBi(2), lambda: {"causal": True, "sinks": torch.randn(2)},
        ["attention_decode", "attention_combine"],
    ),
    "split of many queries": (
        (BF16, 4, 2, 100, 1300), lambda: posattn.Kerple(4), lambda: {"causal": True, "sinks": torch.randn(4)},
        ["attention_forward", "attention_combine"],
    ),
}  # fmt: skip


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_decode(case, cuda_machine):  # noqa: F811
    sizes, position, options, kernels = case
    assert_forward_parity(*tensors(*sizes), position() if position else None, options())
    assert [launched.kernel for launched in cuda_machine.launches] == kernels


@pytest.mark.parametrize("k_len", [1, 15, 16, 17, 63, 64, 65, 127, 129])
def test_every_part_of_a_tile(k_len, cuda_machine):  # noqa: F811
    assert_forward_parity(*tensors(HALF, 3, 1, 2, k_len, 32), None, {"causal": True})


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 192, 256])
def test_no_bank_conflicts_in_the_main_loop(dim, cuda_machine):  # noqa: F811
    q, k, v = tensors(BF16, 4, 1, 1, 256, dim)
    with behind_launch(80, Options(stats=True)) as machine:
        posattn.attention(q, k, v, backend="cuda")
    assert not machine.launches[-1].report.main_loop_conflicts
