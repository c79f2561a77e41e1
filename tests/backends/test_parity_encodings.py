"""Every exported encoding on every backend: output, log-sum-exp and all gradients within the tolerance rule."""

from __future__ import annotations

import pytest
import torch

import posattn
from posattn import encodings
from posattn.encodings.base import Encoding
from posattn.parity import examples, positions_for
from tests.tolerance import assert_parity

HEADS, DIM, TOKENS = 4, 16, 160
NAMES = tuple(examples(HEADS, DIM, TOKENS))
CELLS = ("RelativeTable2D", "RelativeTable3D")  # whose positions are cells of a window
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.usefixtures("poisoned")


def build(name: str, heads: int = HEADS, dim: int = DIM) -> Encoding:
    torch.manual_seed(1)
    return examples(heads, dim, TOKENS)[name]


def inputs(place, dtype, q_len, k_len, batch=1, heads=HEADS, kv_heads=HEADS, dim=DIM):
    shapes = ((batch, heads, q_len, dim), (batch, kv_heads, k_len, dim), (batch, kv_heads, k_len, dim))
    return [torch.randn(shape).to(place[0], dtype) for shape in shapes]


def on(place, name, q_len, k_len, **options):
    position = build(name).to(place[0])
    for key, value in positions_for(position, q_len, k_len).items():
        options[key] = value.to(place[0])
    return position, options


def test_examples_show_every_exported_encoding():
    found = examples(HEADS, DIM, TOKENS, every=True)
    shown = {type(module).__name__ for example in found.values() for module in example.modules()}
    # Decays are of one call's tokens: tests/native/test_decay.py.
    assert set(encodings.__all__) - {"Decay", "ForgetGate"} <= shown


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", NAMES)
def test_causal(place, name, dtype):
    position, options = on(place, name, 67, 67, causal=True)
    assert_parity(*inputs(place, dtype, 67, 67), position, options, place[1])


@pytest.mark.parametrize("name", NAMES)
def test_full_and_longer_than_a_tile(place, name):
    position, options = on(place, name, 131, 131)
    assert_parity(*inputs(place, torch.float32, 131, 131), position, options, place[1])


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 150), (33, 97), (97, 33), (1, 1)])
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(CELLS)])
def test_lengths_that_differ(place, name, q_len, k_len):
    position, options = on(place, name, q_len, k_len, causal=q_len <= k_len)
    assert_parity(*inputs(place, torch.float32, q_len, k_len, batch=2), position, options, place[1])


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith((*CELLS, "MRoPE"))])
def test_explicit_positions_per_sequence(place, name):
    position = build(name).to(place[0])
    q_positions = torch.stack([torch.arange(20, 51), torch.randint(0, 60, (31,)).sort().values])
    k_positions = torch.stack([torch.arange(47), torch.randint(0, 60, (47,)).sort().values])
    options = {"q_positions": q_positions.to(place[0]), "k_positions": k_positions.to(place[0]), "causal": True}
    assert_parity(*inputs(place, torch.float32, 31, 47, batch=2), position, options, place[1])


@pytest.mark.parametrize("name", [name for name in NAMES if "BiPE" not in name and not name.startswith(CELLS)])
def test_packed_documents(place, name):
    cu = torch.tensor([0, 13, 13, 14, 51, 71], dtype=torch.int32, device=place[0])
    options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "causal": True}
    assert_parity(*inputs(place, torch.float32, 71, 71), build(name).to(place[0]), options, place[1])


@pytest.mark.parametrize("name", [name for name in NAMES if "BiPE" not in name and not name.startswith(CELLS)])
def test_key_lengths(place, name):
    lengths = torch.tensor([41, 0, 7], device=place[0])
    options = {"k_lengths": lengths, "causal": True}
    assert_parity(*inputs(place, torch.float32, 9, 41, batch=3), build(name).to(place[0]), options, place[1])


@pytest.mark.parametrize("name", ["ALiBi learnable", "Kerple", "FIRE", "DAPE-Kerple", "RoPE"])
def test_grouped_heads_with_every_option_at_once(place, name):
    position, options = on(place, name, 45, 61, causal=True, window=(20, 0), softcap=8.0, dropout_p=0.2, scale=0.3)
    options["sinks"] = torch.randn(HEADS).to(place[0])
    options["bias"] = torch.randn(2, 1, 45, 61).to(place[0])
    options["mask"] = (torch.rand(2, HEADS, 45, 61) > 0.2).to(place[0])
    assert_parity(*inputs(place, torch.float32, 45, 61, batch=2, kv_heads=2), position, options, place[1])


@pytest.mark.parametrize(
    "pair", [("RoPE", "ALiBi learnable"), ("Kerple", "FIRE"), ("DAPE-Kerple", "T5Bias")], ids="+".join
)
def test_sums(place, pair):
    position = build(pair[0]) + build(pair[1])
    assert_parity(*inputs(place, torch.float32, 53, 53), position.to(place[0]), {"causal": True}, place[1])


def test_twelve_heads_and_wide_mixing(place):
    """Head counts and widths that no tile size divides."""
    position = posattn.DAPE(posattn.Kerple(12), 12, width=29).to(place[0])
    assert_parity(*inputs(place, torch.float32, 50, 50, heads=12, kv_heads=12), position, {"causal": True}, place[1])
