"""Few queries in CUDA, on the PTX machine: which kernels serve them, and tiles of heads packed into rows."""

from __future__ import annotations

import pytest
import torch

import posattn
from tests.backends.cuda_machine import cuda_machine  # noqa: F401
from tests.backends.gpu_cases import BF16, CASES, HALF, tensors
from tests.ptxsim.kernel import Options
from tests.ptxsim.seam import behind_launch
from tests.tolerance import assert_forward_parity

DECODE, COMBINE = "attention_decode", "attention_combine"
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("one query of many heads", [DECODE]),
        pytest.param("few queries of eight heads, table", [DECODE], marks=SLOW),
        pytest.param("few queries, D = 256, window", [DECODE], marks=SLOW),
        pytest.param("few queries in two blocks of rows", [DECODE], marks=SLOW),
        pytest.param("few queries, rotary", [DECODE], marks=SLOW),
        pytest.param("few queries, key lengths, softcap", [DECODE], marks=SLOW),
        pytest.param("few queries, dense and mask", [DECODE], marks=SLOW),
        pytest.param("few queries, documents", [DECODE, COMBINE], marks=SLOW),
        ("split keys, one query, D = 128, sinks", [DECODE, COMBINE]),
        pytest.param("split keys, rotary, dropout, wider values", [DECODE, COMBINE], marks=SLOW),
        pytest.param("split keys, more splits than lanes", [DECODE, COMBINE], marks=SLOW),
        pytest.param("split keys of many queries", ["attention_forward", COMBINE], marks=SLOW),
    ],
)
def test_which_kernels_serve_few_queries(name, kernels, cuda_machine):  # noqa: F811
    (q, k, v), position, options = CASES[name].inputs()
    with torch.no_grad():
        posattn.attention(q, k, v, position, backend="cuda", **options)
    assert [launched.kernel for launched in cuda_machine.launches] == kernels


@pytest.mark.parametrize("k_len", [1, 15, 16, 17, 63, 64, 65, 127, 129])
def test_every_part_of_a_tile(k_len, cuda_machine):  # noqa: F811
    assert_forward_parity(*tensors(HALF, 3, 1, 2, k_len, 32), None, {"causal": True}, "cuda")


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 192, 256])
def test_no_bank_conflicts_in_the_main_loop(dim, cuda_machine):  # noqa: F811
    q, k, v = tensors(BF16, 4, 1, 1, 256, dim)
    with behind_launch(80, Options(stats=True)) as machine:
        posattn.attention(q, k, v, backend="cuda")
    assert not machine.launches[-1].report.main_loop_conflicts
