"""Keys that the CPU kernels read through a block table: the bits of the same keys side by side, for every page size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import posattn
from posattn import ops, paging

HEADS, KV_HEADS = 4, 2
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)


@pytest.fixture(autouse=True)
def _nothing_is_gathered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(call: Any) -> Any:
        assert call.block_table is None, "keys were gathered"
        return call

    monkeypatch.setattr(ops, "gathered_call", refuse)
    with torch.no_grad():
        yield


def paged(x: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """x [B, H, T, D] in pages of a pool in a random order, one more that is NaN, and the block table."""
    batch, heads, tokens, dim = x.shape
    entries = -(-tokens // page)
    x = torch.nn.functional.pad(x, (0, 0, 0, entries * page - tokens), value=float("nan"))
    order = torch.randperm(batch * entries + 1, generator=torch.Generator().manual_seed(7))[:-1]
    pool = x.new_full((batch * entries + 1, page, heads, dim), float("nan"))
    pool[order] = x.transpose(1, 2).reshape(-1, page, heads, dim)
    return pool, order.view(batch, entries).int()


def same_bits(
    tensors: tuple[Tensor, Tensor, Tensor], page: int, position: posattn.Encoding | None = None, **options: Any
) -> None:
    q, k, v = tensors
    lengths = options.setdefault("k_lengths", torch.full((q.shape[0],), k.shape[2]))
    k_pages, table = paged(k, page)
    v_pages, _ = paged(v, page)
    table[torch.arange(table.shape[1]) * page >= lengths[:, None]] = -1
    expected = posattn.attention(q, k, v, position, return_lse=True, **options)
    got = posattn.attention(q, k_pages, v_pages, position, block_table=table, return_lse=True, **options)
    for a, b in zip(got, expected):
        assert torch.equal(a, b)


def qkv(dtype: torch.dtype, queries: int, keys: int, dim: int = 32, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((HEADS, queries, dim), (KV_HEADS, keys, dim), (KV_HEADS, keys, dim))
    q, k, v = (torch.randn(batch, *shape).to(dtype) for shape in shapes)
    return q, k, v


@DTYPES
@pytest.mark.parametrize("page", [1, 7, 16, 64])
def test_a_chunk_of_a_prefill(isa: str, dtype: torch.dtype, page: int) -> None:
    lengths = torch.tensor([211, 100])
    same_bits(qkv(dtype, 70, 211), page, posattn.ALiBi(HEADS), causal=True, k_lengths=lengths)


@DTYPES
@pytest.mark.parametrize("page", [1, 16, 48, 1024])
@pytest.mark.parametrize("queries", [1, 3])
def test_decoding_of_split_keys(isa: str, dtype: torch.dtype, page: int, queries: int) -> None:
    lengths = torch.tensor([1501, 1030])
    same_bits(qkv(dtype, queries, 1501), page, posattn.ALiBi(HEADS), causal=True, k_lengths=lengths)


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("dim", [20, 96])
@DTYPES
def test_rotated_keys_and_rows_that_do_not_lie_ready(dtype: torch.dtype, queries: int, dim: int) -> None:
    position = posattn.RoPE(dim, layout="interleaved")
    same_bits(qkv(dtype, queries, 1200, dim), 24, position, causal=True)


@DTYPES
@pytest.mark.parametrize("queries", [1, 33])
def test_every_option_at_once(dtype: torch.dtype, queries: int) -> None:
    same_bits(
        qkv(dtype, queries, 1100),
        10,
        posattn.RoPE(32) + posattn.ALiBi(HEADS) + posattn.Kerple(HEADS) + posattn.FIRE(HEADS),
        window=(900, 0),
        softcap=5.0,
        sinks=torch.randn(HEADS),
        bias=torch.randn(1, HEADS, queries, 1100),
        mask=torch.rand(2, 1, queries, 1100) > 0.1,
        offset=torch.tensor([1060, 800]),
        k_starts=torch.tensor([13, 0]),
        k_lengths=torch.tensor([1100, 1003]),
    )


@pytest.mark.parametrize("name", ["DAPE", "DAPE-Kerple", "DAPE-RoPE-FIRE"])
def test_mixed_heads(isa: str, name: str) -> None:
    position = posattn.parity.examples(HEADS, 32, 128)[name]
    lengths = torch.tensor([90, 0])
    same_bits(qkv(torch.float32, 9, 90), 8, position, causal=True, k_lengths=lengths)


def test_rows_without_keys_and_pages_that_are_wider_than_all_keys() -> None:
    same_bits(qkv(torch.float32, 4, 50, batch=3), 64, posattn.ALiBi(HEADS), k_lengths=torch.tensor([0, 50, 1]))


def test_a_prefix_that_two_sequences_share() -> None:
    q, k, v = qkv(torch.float32, 1, 40, batch=1)
    (k_pages, table), (v_pages, _) = paged(k, 8), paged(v, 8)
    out = posattn.attention(
        q.expand(2, -1, -1, -1), k_pages, v_pages, block_table=table.expand(2, -1), k_lengths=torch.tensor([40, 24])
    )
    for row, length in enumerate((40, 24)):
        assert torch.equal(out[row], posattn.attention(q, k[:, :, :length], v[:, :, :length])[0])


def test_pools_of_any_strides() -> None:
    """A pool as [pages, H, page, D], and one of both keys and values."""
    q, k, v = qkv(torch.bfloat16, 5, 96)
    (k_pages, table), (v_pages, _) = paged(k, 16), paged(v, 16)
    lengths = torch.tensor([96, 50])
    expected = posattn.attention(q, k, v, k_lengths=lengths)
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k_pages, v_pages)]
    both = torch.cat([k_pages, v_pages], -1)
    for pools in (by_head, both.split(32, -1)):
        assert torch.equal(posattn.attention(q, *pools, block_table=table.long(), k_lengths=lengths), expected)


def test_the_module_looks_at_what_nobody_could_check() -> None:
    """Inside a compiled graph the values of a table are seen by the kernels' module alone."""
    q, k, v = qkv(torch.float32, 3, 32)
    (k_pages, table), (v_pages, _) = paged(k, 8), paged(v, 8)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(table: Tensor, lengths: Tensor) -> Tensor:
        return posattn.attention(q, k_pages, v_pages, block_table=table, k_lengths=lengths)

    full = torch.tensor([32, 32])
    assert torch.equal(call(table, full), posattn.attention(q, k, v, k_lengths=full))
    for wrong in (table + 100, table - 100):
        with pytest.raises(ValueError, match="block_table: expected 0 to 8, got"):
            call(wrong, full)
    with pytest.raises(ValueError, match="k_lengths: expected 0 to 32, got 33"):
        call(table, full + 1)


def test_a_call_that_needs_a_gradient_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(ops, "gathered_call", lambda call: asked.append(call) or paging.gathered_call(call))
    q, k, v = qkv(torch.float32, 3, 32)
    (k_pages, table), (v_pages, _) = paged(k, 8), paged(v, 8)
    options = {"block_table": table, "k_lengths": torch.tensor([32, 9])}
    expected = posattn.attention(q, k_pages, v_pages, **options)
    assert not asked
    posattn.attention(q.requires_grad_(), k_pages, v_pages, **options)
    assert not asked
    with torch.enable_grad():
        assert torch.equal(posattn.attention(q, k_pages, v_pages, **options), expected)
    assert len(asked) == 1
