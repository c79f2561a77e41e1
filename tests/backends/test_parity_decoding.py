"""A few queries against more than a thousand keys: keys are split into runs whose results are combined, with a kernel
of its own on every backend, and every option meets keys past the first run and past a tile."""

from __future__ import annotations

import pytest
import torch

import posattn
from tests.tolerance import assert_forward_parity, assert_parity

HEADS, KV_HEADS, KEYS, DIM = 4, 2, 2300, 16

pytestmark = pytest.mark.usefixtures("poisoned")


def tensors(place, q_len=3, k_len=KEYS, batch=2, dim=DIM, value_dim=None, dtype=torch.float32):
    """Keys that grow along the sequence, so that the runs' maxima and sums are far from one another."""
    growing = torch.linspace(0.5, 3.0, k_len)[:, None]
    shapes = ((HEADS, q_len, dim), (KV_HEADS, k_len, dim), (KV_HEADS, k_len, value_dim or dim))
    q, k, v = (torch.randn(batch, *shape) for shape in shapes)
    return [x.to(place[0], dtype) for x in (q, k * growing, v + torch.arange(k_len)[:, None] / k_len)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (64, 32), (32, 96), (20, 33)], ids=str)
@pytest.mark.parametrize("q_len", [1, 5, 16])
def test_rows_heads_and_runs(place, q_len, dim, value_dim, dtype):
    assert_forward_parity(*tensors(place, q_len, dim=dim, value_dim=value_dim, dtype=dtype), backend=place[1])


@pytest.mark.parametrize("k_len", [1025, 1151, 1153, 2047, 2048, 2049])
def test_lengths_around_a_run(place, k_len):
    assert_forward_parity(*tensors(place, 2, k_len), None, {"causal": True}, place[1])


def some_rows_false(rows, keys):
    mask = torch.rand(2, HEADS, 3, KEYS) < 0.7
    mask[:, :, rows, keys] = False
    return mask


OPTIONS = {
    "causal": lambda: {"causal": True},
    "window": lambda: {"window": (900, 0)},
    "window of one run": lambda: {"window": (300, None), "causal": True},
    "window that starts a run": lambda: {"window": (KEYS - 1024 - 2, 0)},
    "window right": lambda: {"window": (None, 0)},
    "dropout": lambda: {"dropout_p": 0.3},
    "softcap": lambda: {"softcap": 3.0},
    "negative scale": lambda: {"scale": -0.3},
    "zero scale": lambda: {"scale": 0.0},
    "sinks": lambda: {"sinks": 3.0 * torch.randn(HEADS)},
    "mask": lambda: {"mask": some_rows_false(0, slice(0, 0))},
    "first run hidden": lambda: {"mask": some_rows_false(1, slice(0, 1024))},
    "middle run hidden": lambda: {"mask": some_rows_false(1, slice(1024, 2048))},
    "last run hidden": lambda: {"mask": some_rows_false(1, slice(2048, None))},
    "row hidden": lambda: {"mask": some_rows_false(1, slice(0, None))},
    "mask over heads": lambda: {"mask": torch.rand(1, HEADS, 1, KEYS) < 0.5},
    "bias": lambda: {"bias": torch.randn(2, HEADS, 3, KEYS)},
    "bias over keys": lambda: {"bias": torch.randn(HEADS, 1, KEYS)},
    "bias over queries": lambda: {"bias": torch.randn(2, HEADS, 3, 1)},
    "lengths": lambda: {"k_lengths": torch.tensor([1500, 40]), "causal": True},
    "an empty sequence": lambda: {"k_lengths": torch.tensor([KEYS, 0])},
    "everything": lambda: {
        "causal": True,
        "window": (2000, 0),
        "softcap": 5.0,
        "dropout_p": 0.2,
        "sinks": torch.randn(HEADS),
        "mask": torch.rand(2, HEADS, 3, KEYS) < 0.7,
        "bias": torch.randn(2, HEADS, 3, KEYS),
        "k_lengths": torch.tensor([2300, 1200]),
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_option(place, options, dtype):
    made = {n: x.to(place[0]) if isinstance(x, torch.Tensor) else x for n, x in options().items()}
    assert_forward_parity(*tensors(place, dim=32, dtype=dtype), None, made, place[1])


ENCODINGS = {
    "RoPE": lambda: posattn.RoPE(DIM),
    "ALiBi": lambda: posattn.ALiBi(HEADS, slopes=[0.01, 0.002, 0.0005, 0.003]),
    "ALiBi signed": lambda: posattn.ALiBi(HEADS, signed=True, slopes=[0.001, -0.002, 0.0005, 0.003]),
    "Kerple": lambda: posattn.Kerple(HEADS),
    "FIRE": lambda: posattn.FIRE(HEADS),
    "DAPE-Kerple": lambda: posattn.DAPE(posattn.Kerple(HEADS), HEADS),
    "FIRE and Kerple": lambda: posattn.FIRE(HEADS) + posattn.Kerple(HEADS),
}


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("explicit", [False, True], ids=["implicit", "explicit"])
def test_encoding(place, name, explicit):
    torch.manual_seed(3)
    position = ENCODINGS[name]().to(place[0])
    options = {"causal": True}
    if explicit:
        options["q_positions"] = torch.tensor([[2310, 2320, 2401], [2300, 2350, 2400]], device=place[0])
        options["k_positions"] = (torch.arange(KEYS) + torch.tensor([[0], [20]])).to(place[0])
    assert_forward_parity(*tensors(place), position, options, place[1])


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.4}, {"causal": True, "window": (1200, 0)}], ids=str)
def test_documents(place, options):
    q, k, v = tensors(place, 12, 3400, batch=1)
    bounds = {"cu_seqlens_q": [0, 5, 9, 12], "cu_seqlens_k": [0, 1100, 1150, 3400]}
    given = {n: torch.tensor(b, dtype=torch.int32, device=place[0]) for n, b in bounds.items()}
    mask = (torch.rand(HEADS, 12, 3400) < 0.8).to(place[0])
    bias = torch.randn(HEADS, 12, 3400).to(place[0])
    position = posattn.Kerple(HEADS).to(place[0])
    assert_forward_parity(q, k, v, position, {**options, **given, "mask": mask, "bias": bias}, place[1])


@pytest.mark.parametrize("position", [None, posattn.Kerple(HEADS), posattn.FIRE(HEADS)], ids=["none", "Kerple", "FIRE"])
def test_gradients(place, position):
    q, k, v = tensors(place, 3, 1300)
    position = None if position is None else position.to(place[0])
    assert_parity(q, k, v, position, {"causal": True, "dropout_p": 0.2}, place[1])
