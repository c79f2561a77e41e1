"""Every mask and option of attention() on every backend, with and without head mixing, within the tolerance rule."""

from __future__ import annotations

import pytest
import torch

import posattn
from posattn.parity import measure
from tests.tolerance import assert_parity

HEADS, DIM = 4, 16

pytestmark = pytest.mark.usefixtures("poisoned")


def tensors(place, q_len=37, k_len=53, batch=2, dtype=torch.float32):
    return [torch.randn(batch, HEADS, n, DIM).to(place[0], dtype) for n in (q_len, k_len, k_len)]


@pytest.fixture(params=["none", "Kerple", "DAPE-Kerple"])
def position(request, place):
    torch.manual_seed(2)
    kerple = posattn.Kerple(HEADS)
    made = {"none": None, "Kerple": kerple, "DAPE-Kerple": posattn.DAPE(kerple, HEADS)}[request.param]
    return None if made is None else made.to(place[0])


OPTIONS = {
    "causal": {"causal": True},
    "window": {"window": 5},
    "window left": {"window": (7, None)},
    "window right": {"window": (None, 3)},
    "window none wide": {"window": (0, 0)},
    "causal window": {"causal": True, "window": (6, 100)},
    "softcap": {"softcap": 2.0},
    "scale": {"scale": -0.7},
    "scale zero": {"scale": 0.0},
    "dropout": {"dropout_p": 0.3},
    "causal dropout": {"dropout_p": 0.5, "causal": True},
    "deterministic": {"deterministic": True, "causal": True},
    "softcap causal window dropout": {"softcap": 5.0, "causal": True, "window": (20, 0), "dropout_p": 0.1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_option(place, position, options):
    assert_parity(*tensors(place), position, options, place[1])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_option_with_more_queries_than_keys(place, position, options):
    """Bottom-right alignment leaves the first rows of a causal call with no key at all."""
    assert_parity(*tensors(place, 53, 37), position, options, place[1])


BIASES = {
    "full": lambda: torch.randn(2, HEADS, 37, 53),
    "shared over batch": lambda: torch.randn(1, HEADS, 37, 53),
    "shared over heads": lambda: torch.randn(2, 1, 37, 53),
    "one matrix": lambda: torch.randn(37, 53),
    "one row": lambda: torch.randn(2, 1, 1, 53),
    "one column": lambda: torch.randn(37, 1),
    "transposed": lambda: torch.randn(2, HEADS, 53, 37).transpose(2, 3),
    "every second key": lambda: torch.randn(2, HEADS, 37, 106)[..., ::2],
    "forbidding": lambda: torch.randn(37, 53).masked_fill(torch.rand(37, 53) < 0.4, -torch.inf),
    "forbidding rows": lambda: torch.randn(37, 53).masked_fill((torch.arange(37) % 3 == 0)[:, None], -torch.inf),
}


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_bias(place, position, bias):
    assert_parity(*tensors(place), position, {"bias": bias().to(place[0])}, place[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bias_in_a_narrow_dtype(place, dtype):
    bias = torch.randn(HEADS, 37, 53).to(place[0], dtype)
    assert_parity(*tensors(place, dtype=dtype), None, {"bias": bias, "causal": True}, place[1])


MASKS = {
    "full": lambda: torch.rand(2, HEADS, 37, 53) < 0.5,
    "one matrix": lambda: torch.rand(37, 53) < 0.5,
    "padding": lambda: (torch.arange(53) < torch.tensor([[53], [20]]))[:, None, None],
    "empty rows": lambda: (torch.rand(37, 53) < 0.5) & (torch.arange(37) % 4 != 1)[:, None],
    "empty": lambda: torch.zeros(37, 53, dtype=torch.bool),
    "one key": lambda: torch.eye(37, 53, dtype=torch.bool),
    "transposed": lambda: (torch.rand(2, 1, 53, 37) < 0.5).transpose(2, 3),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_mask(place, position, mask):
    assert_parity(*tensors(place), position, {"mask": mask().to(place[0])}, place[1])


def test_mask_and_causal_hold_together(place, position):
    mask = (torch.rand(37, 53) < 0.5).to(place[0])
    assert_parity(*tensors(place), position, {"mask": mask, "causal": True, "window": (30, None)}, place[1])


@pytest.mark.parametrize("size", [0.0, -30.0, 60.0], ids=["zero", "tiny", "large"])
def test_sinks(place, position, size):
    sinks = (size + torch.randn(HEADS)).to(place[0])
    assert_parity(*tensors(place), position, {"sinks": sinks, "causal": True, "window": 4}, place[1])


def test_sinks_where_rows_see_no_key(place, position):
    mask = ((torch.rand(37, 53) < 0.5) & (torch.arange(37) % 4 != 1)[:, None]).to(place[0])
    assert_parity(*tensors(place), position, {"sinks": torch.randn(HEADS).to(place[0]), "mask": mask}, place[1])


@pytest.mark.parametrize("lengths", [[53, 0], [1, 36], [52, 37]], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (5, 2)}], ids=["full", "causal", "window"])
def test_key_lengths(place, position, lengths, options):
    options = {**options, "k_lengths": torch.tensor(lengths, device=place[0])}
    assert_parity(*tensors(place), position, options, place[1])


def test_what_lies_past_the_key_lengths_is_never_read(place, position):
    q, k, v = tensors(place)
    k[1, :, 20:] = torch.nan
    v[1, :, 20:] = torch.nan
    assert_parity(q, k, v, position, {"k_lengths": torch.tensor([53, 20], device=place[0])}, place[1])


@pytest.mark.parametrize(
    ("q_bounds", "k_bounds"),
    [
        ([0, 37], [0, 53]),
        ([0, 5, 5, 20, 37], [0, 30, 31, 31, 53]),  # a document with no query, and one with no key
        ([0, 36, 37], [0, 1, 53]),
        (list(range(38)), [0, *range(17, 54)]),
    ],
    ids=["one", "ragged", "crossed", "single tokens"],
)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": (3, 0)}], ids=str)
def test_packed_documents(place, position, q_bounds, k_bounds, options):
    bounds = {"cu_seqlens_q": q_bounds, "cu_seqlens_k": k_bounds}
    options = {**options, **{n: torch.tensor(b, dtype=torch.int32, device=place[0]) for n, b in bounds.items()}}
    assert_parity(*tensors(place, batch=1), position, options, place[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_where_exp_overflows(place, position, dtype):
    """Logits of a few hundred: exp of them is past every dtype here, and their softmax is near one-hot."""
    q, k, v = tensors(place, dtype=dtype)
    assert_parity(q * 8, k * 8, v, position, {"causal": True, "scale": 1.0}, place[1])


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_equal_logits(place, position, value):
    q, k, v = tensors(place)
    assert_parity(torch.full_like(q, value), torch.full_like(k, value), v, position, {"causal": True}, place[1])


def test_dropout_keeps_its_share_and_follows_the_seed(place):
    q, k, v = tensors(place, 64, 256)
    v = torch.ones_like(v)
    calls = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        calls.append(posattn.attention(q * 0, k, v, dropout_p=0.25, backend=place[1]))
    assert torch.equal(calls[0], calls[1])
    assert not torch.equal(calls[0], calls[2])
    # Each output element is the kept share of 256 weights / 0.75: deviation 0.036 each, 0.0016 over all rows.
    assert abs(calls[0].mean().item() - 1.0) < 0.008


def test_the_rule_can_fail(place):
    """The suite's own check: another encoding's result is far outside the rule."""
    q, k, v = tensors(place)
    right = measure(q, k, v, posattn.ALiBi(HEADS).to(place[0]), {}, place[1])
    assert all(c.ok for c in right)
    from posattn.parity import compare

    out = posattn.attention(q, k, v, backend=place[1])
    exact = posattn.attention(q.double(), k.double(), v.double(), posattn.ALiBi(HEADS).to(place[0]).double())
    assert not compare("out", out, out * 0 + exact.float(), exact, torch.zeros(1), torch.float32).ok
