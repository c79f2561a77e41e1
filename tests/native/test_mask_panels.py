"""Boolean masks are looked through by panels of keys, once a call: what is hidden or shown whole costs nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import posattn
from tests.tolerance import assert_parity

Q_LEN, K_LEN = 150, 330
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def masks() -> dict[str, Tensor]:
    rows, keys = torch.arange(Q_LEN)[:, None], torch.arange(K_LEN)
    at = rows + K_LEN - Q_LEN
    blocks = (rows // 40 + keys // 70) % 2 == 0
    return {
        "causal": keys <= at,
        "window": (keys <= at) & (keys > at - 70),
        "blocks": blocks,
        "rows from a block on": (rows >= 32).expand(Q_LEN, K_LEN),
        "rows": (rows % 3 != 0).expand(Q_LEN, K_LEN),
        "keys": (keys // 64 != 2).expand(Q_LEN, K_LEN),
        "all": torch.ones(1, 1, dtype=torch.bool),
        "none": torch.zeros(Q_LEN, K_LEN, dtype=torch.bool),
        "one row for all": keys[None] < 100,
        "one key for all": rows < 77,
        "by head": torch.stack([blocks, ~blocks]),
        "every other key": (keys <= at).repeat_interleave(2, -1)[:, ::2],
        "padding": (keys < 197)[None, None, None],
    }


@DTYPES
@pytest.mark.parametrize("name", masks())
def test_parity(isa: str, dtype: torch.dtype, name: str) -> None:
    q, k, v = (torch.randn(1, 2, tokens, 16).to(dtype) for tokens in (Q_LEN, K_LEN, K_LEN))
    assert_parity(q, k, v, posattn.ALiBi(2, learnable=True), {"mask": masks()[name]}, "cpu")


@DTYPES
def test_with_documents_and_a_window(isa: str, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, 330, 16).to(dtype) for _ in range(3))
    bounds = torch.tensor([0, 130, 210, 330], dtype=torch.int32)
    mask = torch.arange(330)[:, None] // 48 % 2 == torch.arange(330) // 48 % 2
    options = {"mask": mask, "cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "window": (80, 0)}
    assert_parity(q, k, v, None, options, "cpu")


@DTYPES
def test_panels_that_nobody_sees_are_not_read(isa: str, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, tokens, 16).to(dtype) for tokens in (Q_LEN, K_LEN, K_LEN))
    v[:, :, :64] = torch.nan  # of weight zero, which times NaN would be NaN
    mask = (torch.arange(K_LEN) >= 64).expand(Q_LEN, K_LEN)
    assert not posattn.attention(q, k, v, mask=mask, backend="cpu").isnan().any()
