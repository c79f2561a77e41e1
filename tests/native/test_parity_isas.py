"""Every instruction set of the native module that this processor can run keeps the tolerance rule."""

from __future__ import annotations

import pytest
import torch

import posattn
from posattn import _cpu
from posattn.parity import examples
from tests.tolerance import assert_parity

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.usefixtures("poisoned")


def test_the_best_one_is_chosen_at_load():
    assert _cpu.isa() == _cpu.isas()[-1]


def test_an_unknown_one_is_an_error():
    with pytest.raises(ValueError, match="mmx"):
        _cpu.set_isa("mmx")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", ["RoPE", "RoPE interleaved", "ALiBi signed", "Kerple", "FIRE", "DAPE-Kerple", "DAPE"])
def test_encodings(isa, name, dtype):
    q, k, v = (torch.randn(1, 4, tokens, 20).to(dtype) for tokens in (45, 83, 83))
    assert_parity(q, k, v, examples(4, 20, 90)[name], {"causal": True}, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_option_at_once(isa, dtype):
    q, k, v = (torch.randn(2, heads, tokens, 33).to(dtype) for heads, tokens in ((4, 37), (2, 61), (2, 61)))
    options = {
        "window": (30, 9),
        "softcap": 6.0,
        "dropout_p": 0.2,
        "sinks": torch.randn(4),
        "bias": torch.randn(4, 37, 61),
        "mask": torch.rand(2, 1, 37, 61) < 0.7,
        "k_lengths": torch.tensor([61, 40]),
    }
    assert_parity(q, k, v, posattn.FIRE(4), options, "cpu")
    options |= {"k_starts": torch.tensor([3, 10]), "offset": torch.tensor([20, 5])}
    assert_parity(q, k, v, posattn.FIRE(4), options, "cpu")


@pytest.mark.parametrize("dim", [1, 7, 16, 31, 64, 100, 256, 320, 1024])
def test_head_dimensions(isa, dim):
    q, k, v = (torch.randn(1, 2, 19, dim) for _ in range(3))
    assert_parity(q, k, v, None, {"causal": True}, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_logits_where_exp_overflows(isa, dtype):
    q, k, v = (torch.randn(1, 2, 137, 16).to(dtype) for _ in range(3))
    assert_parity(q * 8, k * 8, v, None, {"scale": 1.0}, "cpu")
    assert_parity(q * 8, k * 8, v, posattn.Kerple(2), {"scale": 2.0, "causal": True}, "cpu")
