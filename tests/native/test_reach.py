"""Keys that a falling bias puts out of reach are left out, and only those: csrc/cpu/reach.h."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import posattn
from tests.tolerance import assert_forward_parity, assert_parity

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def tensors(dtype: torch.dtype, q_len: int = 200, k_len: int = 700, heads: int = 2) -> list[Tensor]:
    return [torch.randn(1, heads, tokens, 16).to(dtype) for tokens in (q_len, k_len, k_len)]


def steep(slope: float = 0.6, signed: bool = False) -> posattn.ALiBi:
    return posattn.ALiBi(2, slopes=[slope, slope / 4], learnable=True, signed=signed)


@DTYPES
@pytest.mark.parametrize("softcap", [None, 1e4])
def test_far_tiles_are_not_read(isa: str, dtype: torch.dtype, softcap: float | None) -> None:
    q, k, v = tensors(dtype)
    v[:, :, :64] = torch.nan  # of weight zero, which times NaN would be NaN
    v.requires_grad_()
    out = posattn.attention(q, k, v, steep(2.0), causal=True, softcap=softcap, backend="cpu")
    assert not out.isnan().any()
    out.sum().backward()
    assert v.grad is not None
    assert not v.grad[:, :, :64].any()


@DTYPES
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {},
        {"window": (600, 0)},
        {"causal": True, "softcap": 3.0},
        {"causal": True, "sinks": torch.tensor([1.0, -3.0])},
        {"causal": True, "dropout_p": 0.2},
        {"causal": True, "scale": -0.5},
    ],
    ids=str,
)
def test_parity(isa: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    assert_parity(*tensors(dtype), steep(), options, "cpu")


@DTYPES
@pytest.mark.parametrize("causal", [True, False])
def test_a_huge_key_far_away_is_reached(isa: str, dtype: torch.dtype, causal: bool) -> None:
    q, k, v = tensors(dtype)
    k[:, :, 3] = 200.0 * q[:, :, 150].sign()  # its logit outweighs the distance in that row
    with_key, _ = posattn.attention(q, k, v, steep(), causal=causal, backend="cpu", return_lse=True)
    v[:, :, 3] += 1.0
    assert (posattn.attention(q, k, v, steep(), causal=causal, backend="cpu") - with_key)[:, :, 150].abs().min() > 0.5
    assert_parity(q, k, v, steep(), {"causal": causal}, "cpu")


@DTYPES
def test_a_huge_query_reaches_further(isa: str, dtype: torch.dtype) -> None:
    q, k, v = tensors(dtype)
    k[:, :, 3] *= 3.0
    q[:, :, 150] = 200.0 * k[:, :, 3].sign()
    out = posattn.attention(q, k, v, steep(), causal=True, backend="cpu")
    v[:, :, 3] += 1.0
    assert (posattn.attention(q, k, v, steep(), causal=True, backend="cpu") - out)[:, :, 150].abs().min() > 0.5


@DTYPES
def test_rows_whose_near_keys_are_hidden(isa: str, dtype: torch.dtype) -> None:
    """torch's own causal mask starts at the top left: row i stands at key i + 500 and sees keys up to i."""
    q, k, v = tensors(dtype)
    out = posattn.scaled_dot_product_attention(q, k, v, is_causal=True, position=steep())
    visible = torch.ones(200, 700, dtype=torch.bool).tril()
    expected = posattn.attention(*(x.double() for x in (q, k, v)), steep(), mask=visible, backend="reference")
    assert (out - expected).abs().max() < (2e-2 if dtype == torch.bfloat16 else 1e-4)


@DTYPES
def test_a_table_that_rises_again(isa: str, dtype: torch.dtype) -> None:
    encoding = posattn.RelativeTable(2, 700)
    distance = torch.arange(-700.0, 701.0)
    encoding.weight.data = (-0.5 * distance.abs() + 250.0 * ((distance - 500.0).abs() < 8.0)).expand(2, -1).clone()
    assert_parity(*tensors(dtype), encoding, {"causal": True}, "cpu")


@DTYPES
def test_slopes_that_rise_with_the_distance(isa: str, dtype: torch.dtype) -> None:
    assert_parity(*tensors(dtype), steep(-0.3), {"causal": True}, "cpu")
    assert_parity(*tensors(dtype), steep(0.3, signed=True), {}, "cpu")


def test_packed_documents(isa: str) -> None:
    bounds = torch.tensor([0, 300, 310, 700], dtype=torch.int32)
    options = {"causal": True, "cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
    assert_parity(*tensors(torch.float32, 700, 700), steep(1.0), options, "cpu")


def test_shared_keys(isa: str) -> None:
    q, k, v = tensors(torch.bfloat16, heads=4)
    encoding = posattn.ALiBi(4, slopes=[2.0, 0.5, 0.1, 1.0], learnable=True)
    assert_parity(q, k[:, :2], v[:, :2], encoding, {"causal": True}, "cpu")


def decoding(dtype: torch.dtype, kv_heads: int = 2, q_len: int = 2) -> list[Tensor]:
    """More keys than from which decoding looks for values that it need not read, and not whole tiles."""
    return [torch.randn(1, heads, n, 16).to(dtype) for heads, n in ((2, q_len), (kv_heads, 5000), (kv_heads, 5000))]


@DTYPES
@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("options", [{}, {"window": (4800, 0)}, {"softcap": 1e4}], ids=str)
def test_decoding_leaves_far_values(isa: str, dtype: torch.dtype, options: dict[str, Any], kv_heads: int) -> None:
    q, k, v = decoding(dtype, kv_heads)
    assert_forward_parity(q, k, v, steep(), {**options, "causal": True}, "cpu")
    v[:, :, :4096] = torch.nan
    assert not posattn.attention(q, k, v, steep(), **{**options, "causal": True}, backend="cpu").isnan().any()


@DTYPES
@pytest.mark.parametrize("far", [3, 2000, 4095])
def test_decoding_reaches_a_huge_key(isa: str, dtype: torch.dtype, far: int) -> None:
    q, k, v = decoding(dtype)
    k[:, :, far] = 1000.0 * q[:, :, 1].sign()  # its logit outweighs the distance in that row
    out = posattn.attention(q, k, v, steep(), causal=True, backend="cpu")
    v[:, :, far] += 1.0
    assert (posattn.attention(q, k, v, steep(), causal=True, backend="cpu") - out)[:, :, 1].abs().min() > 0.5
    assert_forward_parity(q, k, v, steep(), {"causal": True}, "cpu")


@DTYPES
def test_decoding_shows_nan_in_a_far_key(isa: str, dtype: torch.dtype) -> None:
    q, k, v = decoding(dtype)
    k[:, 0, 3] = torch.nan
    out = posattn.attention(q, k, v, steep(), causal=True, backend="cpu")
    assert out[:, 0].isnan().all()
    assert not out[:, 1].isnan().any()


@DTYPES
def test_decoding_where_near_keys_are_hidden(isa: str, dtype: torch.dtype) -> None:
    q, k, v = decoding(dtype)
    mask = torch.ones(2, 5000, dtype=torch.bool)
    mask[0, 4800:] = mask[1, 1000:] = False  # of what is looked at first, the latter leaves neither row anything
    assert_forward_parity(q, k, v, steep(), {"causal": True, "mask": mask}, "cpu")


def test_decoding_has_the_same_bits_on_any_threads(isa: str) -> None:
    q, k, v = decoding(torch.float32)
    threads = torch.get_num_threads()
    found = []
    for n in (1, 3):
        torch.set_num_threads(n)
        found.append(posattn.attention(q, k, v, steep(0.02), causal=True, backend="cpu"))
    torch.set_num_threads(threads)
    assert torch.equal(*found)
