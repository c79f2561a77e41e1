"""attention(block_table=): pages give what the same keys give side by side, gradients included; wrong calls say why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import posattn
from posattn.paging import gathered
from posattn.parity import positions_for
from tests.tolerance import assert_forward_parity

HEADS, KV_HEADS, DIM, PAGE = 4, 2, 16, 4
LENGTHS = (11, 0, 8)
EXAMPLES = posattn.parity.examples(HEADS, DIM, 16)


def scattered(x: Tensor, pages: int = 12) -> tuple[Tensor, Tensor]:
    """x [B, H, 12, D] in pages of a pool in a random order, the others NaN, and the block table."""
    batch, heads, tokens, dim = x.shape
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(1))[: batch * tokens // PAGE]
    table = order.view(batch, tokens // PAGE)
    pool = x.new_full((pages, PAGE, heads, dim), float("nan"))
    pool[order] = x.transpose(1, 2).reshape(-1, PAGE, heads, dim)
    return pool, table.int()


def qkv(queries: int = 3, kv_heads: int = KV_HEADS) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(3, HEADS, queries, DIM),
        torch.randn(3, kv_heads, 12, DIM),
        torch.randn(3, kv_heads, 12, DIM + 3),
    )


@pytest.mark.parametrize("name", ["none", *EXAMPLES])
@pytest.mark.parametrize("queries", [1, 5], ids=["decode", "chunk"])
def test_pages_give_what_a_buffer_gives(name: str, queries: int) -> None:
    position = EXAMPLES.get(name)
    q, k, v = qkv(queries, getattr(position, "kv_heads", None) or KV_HEADS)  # one that learns a table of key heads
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    options = {"causal": True, "k_lengths": lengths, "return_lse": True, **positions_for(position, queries, 12)}
    expected = posattn.attention(q, k, v, position, **options)
    (k_pages, table), (v_pages, _) = scattered(k), scattered(v)
    unused = torch.arange(3) * PAGE >= lengths[:, None]
    table = table.masked_fill(unused, -1)
    got = posattn.attention(q, k_pages, v_pages, position, block_table=table, **options)
    for a, b in zip(got, expected):
        assert torch.equal(a, b)


def test_every_option_at_once(place: tuple[str, str]) -> None:
    device, backend = place
    q, k, v = (x.to(device) for x in qkv())
    (k_pages, table), (v_pages, _) = scattered(k), scattered(v)
    options = {
        "causal": True,
        "window": (6, None),
        "softcap": 5.0,
        "sinks": torch.randn(HEADS, device=device),
        "bias": torch.randn(HEADS, 3, 12, device=device),
        "mask": torch.rand(3, 1, 3, 12, device=device) > 0.2,
        "k_lengths": torch.tensor(LENGTHS, device=device),
        "backend": backend,
    }
    position = (posattn.RoPE(DIM) + posattn.ALiBi(HEADS)).to(device)
    expected = posattn.attention(q, k, v, position, **options)
    got = posattn.attention(q, k_pages, v_pages, position, block_table=table.to(device), **options)
    assert torch.equal(got, expected)


def test_where_queries_sit_and_sequences_begin() -> None:
    q, k, v = qkv()
    (k_pages, table), (v_pages, _) = scattered(k), scattered(v)
    options = {
        "causal": True,
        "offset": torch.tensor([3, 0, 2], dtype=torch.int32),
        "k_starts": torch.tensor([5, 0, 1]),
        "k_lengths": torch.tensor(LENGTHS),
    }
    position = posattn.RoPE(DIM) + posattn.FIRE(HEADS)
    expected = posattn.attention(q, k, v, position, **options)
    assert torch.equal(posattn.attention(q, k_pages, v_pages, position, block_table=table, **options), expected)


def test_gradients_go_through_the_pages() -> None:
    q, k, v = qkv()
    position = posattn.Kerple(HEADS)
    lengths = torch.tensor(LENGTHS)
    (k_pages, table), (v_pages, _) = scattered(k), scattered(v)
    pools = [pool.nan_to_num(0.0).requires_grad_() for pool in (k_pages, v_pages)]
    grad_out = torch.randn(3, HEADS, 3, DIM + 3)

    def gradients(keys: Tensor, values: Tensor, leaves: list[Tensor], **options: Tensor) -> tuple[Tensor, ...]:
        out = posattn.attention(q, keys, values, position, causal=True, k_lengths=lengths, **options)
        return torch.autograd.grad(out, [*leaves, *position.parameters()], grad_out)

    dk_pages, dv_pages, *rest = gradients(*pools, pools, block_table=table)
    k, v = k.requires_grad_(), v.requires_grad_()
    dk, dv, *expected = gradients(k, v, [k, v])
    for pages, dense in ((dk_pages, dk), (dv_pages, dv)):
        assert torch.equal(gathered(pages, table, torch.full((3,), 12)), dense)
        used = torch.zeros(12, dtype=torch.bool)
        used[table.long().flatten()] = True
        assert not pages[~used].any()
    for a, b in zip(rest, expected):
        assert torch.equal(a, b)


def test_pages_that_sequences_share() -> None:
    """Two sequences of one prefix: its gradient is the sum of both."""
    pool = torch.randn(3, PAGE, KV_HEADS, DIM)
    q = torch.randn(2, HEADS, 1, DIM)
    options = {"block_table": torch.tensor([[2, 0], [2, 1]]), "k_lengths": torch.tensor([6, 7])}
    shared = pool.clone().requires_grad_()
    out = posattn.attention(q, shared, shared, **options)
    (got,) = torch.autograd.grad(out.square().sum(), shared)
    total = torch.zeros_like(pool)
    for b in range(2):
        own = pool.clone().requires_grad_()
        one = {name: x[b : b + 1] for name, x in options.items()}
        part = posattn.attention(q[b : b + 1], own, own, **one)
        assert torch.equal(part, out[b : b + 1])
        total += torch.autograd.grad(part.square().sum(), own)[0]
    torch.testing.assert_close(got, total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tolerance_rule_holds(dtype: torch.dtype) -> None:
    q, k, _ = qkv(2)
    pool, table = scattered(k)
    pool = pool.nan_to_num(0.0)
    options = {"causal": True, "block_table": table, "k_lengths": torch.tensor(LENGTHS)}
    assert_forward_parity(q.to(dtype), pool.to(dtype), pool.to(dtype), posattn.FIRE(HEADS), options)


def test_autocast_casts_what_is_read() -> None:
    q, k, v = qkv()
    (k_pages, table), (v_pages, _) = scattered(k), scattered(v)
    lengths = torch.tensor(LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        got = posattn.attention(q, k_pages, v_pages, block_table=table, k_lengths=lengths)
        expected = posattn.attention(q, k, v, k_lengths=lengths)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)


def test_a_compiled_graph_serves_every_table() -> None:
    q, k, v = qkv()
    lengths = torch.tensor(LENGTHS)

    def call(pool: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        return posattn.attention(q, pool, values, posattn.RoPE(DIM), causal=True, block_table=table, k_lengths=lengths)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    (pool, table), (values, _) = scattered(k), scattered(v)
    for given in (table, table.flip(0)):
        torch.testing.assert_close(compiled(pool, values, given, lengths), call(pool, values, given, lengths))
    with pytest.raises(ValueError, match="block_table: expected 0 to 11, got"):
        compiled(pool, values, table + 100, lengths)


POOL = torch.zeros(5, PAGE, KV_HEADS, DIM)
Q = torch.zeros(2, HEADS, 3, DIM)
TABLE = torch.tensor([[0, 1], [2, 3]])
FULL = torch.tensor([8, 8])
WRONG = [
    ("no lengths", {"k_lengths": None}, ValueError, "block_table: expected k_lengths with it"),
    ("a list", {"block_table": [[0, 1], [2, 3]]}, TypeError, "block_table: expected a torch.Tensor, got list"),
    ("floats", {"block_table": TABLE.float()}, TypeError, "block_table: expected int32 or int64, got torch.float32"),
    ("rank", {"block_table": TABLE[0]}, ValueError, r"block_table: expected shape \[2, n\].*, got \[2\]"),
    ("batch", {"block_table": TABLE[:1]}, ValueError, r"block_table: expected shape \[2, n\].*, got \[1, 2\]"),
    ("device", {"block_table": TABLE.to("meta")}, ValueError, "block_table: expected device cpu like q, got meta"),
    ("negative", {"block_table": TABLE - 1}, ValueError, "block_table: expected pages from 0 to 4 .*, got -1"),
    ("too large", {"block_table": TABLE + 2}, ValueError, "block_table: expected pages from 0 to 4 .*, got 5"),
    ("lengths' shape", {"k_lengths": FULL[:1]}, ValueError, r"k_lengths: expected shape \[2\]"),
    ("lengths' dtype", {"k_lengths": FULL.float()}, TypeError, "k_lengths: expected int32 or int64"),
    ("too long", {"k_lengths": FULL + 1}, ValueError, "k_lengths: expected lengths from 0 to 8, .*2 pages of 4.*got 9"),
    ("negative length", {"k_lengths": FULL - 9}, ValueError, "k_lengths: expected lengths from 0 to 8, got -1"),
    ("q's rank", {"q": Q[0]}, ValueError, r"q: expected 4 dimensions \[batch, heads, tokens, head_dim\]"),
    ("k's rank", {"k": POOL[0]}, ValueError, r"k: expected 4 dimensions \[pages, page, kv_heads, head_dim\]"),
    ("v's pages", {"v": POOL[:4]}, ValueError, r"v: expected pages \[5, 4, 2\] .* like k, got \[4, 4, 2\]"),
    ("v's page", {"v": POOL[:, :3]}, ValueError, r"v: expected pages \[5, 4, 2\]"),
    ("v's heads", {"v": POOL[:, :, :1]}, ValueError, r"v: expected pages \[5, 4, 2\]"),
    ("no pages", {"k": POOL[:0], "v": POOL[:0]}, ValueError, "k: expected at least one page"),
    ("k's head_dim", {"k": POOL[..., :8]}, ValueError, "k: expected head_dim 16 like q, got 8"),
    ("k's dtype", {"k": POOL.half()}, TypeError, "k: expected dtype torch.float32 like q"),
    ("k's device", {"k": POOL.to("meta"), "v": POOL.to("meta")}, ValueError, "k: expected device cpu like q"),
    (
        "documents",
        {"cu_seqlens_q": torch.tensor([0, 3]), "cu_seqlens_k": torch.tensor([0, 8])},
        ValueError,
        "block_table, cu_seqlens_k: expected one or the other",
    ),
]


@pytest.mark.parametrize(("changed", "kind", "message"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_calls(changed: dict[str, object], kind: type[Exception], message: str) -> None:
    given = {"q": Q, "k": POOL, "v": POOL, "block_table": TABLE, "k_lengths": FULL, **changed}
    with pytest.raises(kind, match=message):
        posattn.attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def test_entries_past_the_lengths_are_not_read() -> None:
    table = torch.tensor([[0, -7], [10**6, 3]])
    out = posattn.attention(Q, POOL, POOL, block_table=table, k_lengths=torch.tensor([4, 0]))
    assert torch.equal(out, torch.zeros_like(Q))
