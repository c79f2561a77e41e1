"""Caches: step by step equals at once, whichever holds the keys; pages are shared, copied when written, given back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import posattn
from posattn.nn import DynamicCache, KVCache, OutOfPages, PagedCache, StaticCache
from posattn.parity import positions_for

B, HEADS, KV_HEADS, DIM, TOKENS = 3, 4, 2, 16, 23
EXAMPLES = {
    **posattn.parity.examples(HEADS, DIM, 32),
    "AxialRoPE mixed": posattn.AxialRoPE(DIM, width=8, mixed=True, num_heads=HEADS, kv_heads=KV_HEADS),
}
CHUNKS = (5, 1, 1, 10, 1, 5)

CACHES: dict[str, Callable[..., KVCache]] = {
    "dynamic": lambda **_: DynamicCache(),
    "static": lambda **options: StaticCache(B, KV_HEADS, 32, DIM, DIM + 3, **options),
    "paged": lambda **options: PagedCache(24, 4, B, KV_HEADS, DIM, DIM + 3, **options),
}


@pytest.fixture(params=CACHES.values(), ids=CACHES)
def make(request: pytest.FixtureRequest) -> Callable[..., KVCache]:
    return request.param  # type: ignore[no-any-return]


def qkv(tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(B, HEADS, tokens, DIM)
    return q, torch.randn(B, KV_HEADS, tokens, DIM), torch.randn(B, KV_HEADS, tokens, DIM + 3)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["none", *EXAMPLES])
def test_chunks_give_what_one_call_gives(name: str, make: Callable[..., KVCache]) -> None:
    q, k, v = qkv()
    position = EXAMPLES.get(name)
    explicit = positions_for(position, TOKENS, TOKENS)
    expected = posattn.attention(q, k, v, position, causal=True, window=(9, 0), **explicit)
    cache = make(positions=True) if explicit else make()
    outs, start = [], 0
    for count in CHUNKS:
        part = slice(start, start := start + count)
        own = {"positions": explicit["k_positions"][part]} if explicit else {}
        keys = cache.append(k[:, :, part], v[:, :, part], **own)
        asked = {"q_positions": explicit["q_positions"][part]} if explicit else {}
        outs.append(posattn.attention(q[:, :, part], position=position, causal=True, window=(9, 0), **keys, **asked))
    close(torch.cat(outs, 2), expected)
    assert cache.lengths.tolist() == [TOKENS] * B
    if not explicit:
        close(cache.attend(q[:, :, -2:], position, causal=True, window=(9, 0)), expected[:, :, -2:])


def test_rows_of_their_own_lengths(make: Callable[..., KVCache]) -> None:
    """A prompt padded on the right, then steps: each row as if it were alone."""
    q, k, v = qkv()
    position = posattn.RoPE(DIM) + posattn.T5Bias(HEADS)
    prompts = (7, 2, 5)
    cache = make()
    cache.append(k[:, :, :7], v[:, :, :7], lengths=torch.tensor(prompts))
    assert cache.lengths.tolist() == list(prompts)
    for step in range(4):
        at = slice(7 + step, 8 + step)
        out = posattn.attention(q[:, :, at], position=position, causal=True, **cache.append(k[:, :, at], v[:, :, at]))
        for b, prompt in enumerate(prompts):
            seen = [*range(prompt), *range(7, 8 + step)]
            alone = posattn.attention(
                q[b : b + 1, :, at], k[b : b + 1, :, seen], v[b : b + 1, :, seen], position, causal=True
            )
            close(out[b : b + 1], alone)
    assert cache.lengths.tolist() == [11, 6, 9]


def test_ragged_chunks_say_where_their_queries_sit(make: Callable[..., KVCache]) -> None:
    q, k, v = qkv()
    position = posattn.RoPE(DIM) + posattn.Kerple(HEADS)
    cache = make()
    cache.append(k[:, :, :6], v[:, :, :6], lengths=[6, 3, 1])
    keys = cache.append(k[:, :, 6:10], v[:, :, 6:10], lengths=[2, 4, 3])
    assert keys["offset"].tolist() == [6, 3, 1]
    out = posattn.attention(q[:, :, 6:10], position=position, causal=True, **keys)
    for b, (past, new) in enumerate([(6, 2), (3, 4), (1, 3)]):
        seen = [*range(past), *range(6, 6 + new)]
        own = k[b : b + 1, :, seen], v[b : b + 1, :, seen]
        close(out[b : b + 1, :, :new], posattn.attention(q[b : b + 1, :, 6 : 6 + new], *own, position, causal=True))


def test_some_rows_stand_still(make: Callable[..., KVCache]) -> None:
    q, k, v = qkv()
    cache = make()
    cache.append(k[:, :, :6], v[:, :, :6])
    cache.append(k[:, :, 6:8], v[:, :, 6:8], lengths=[2, 0, 1])
    cache.append(k[:, :, 8:9], v[:, :, 8:9], lengths=[0, 1, 1])
    seen = ([*range(8)], [*range(6), 8], [*range(7), 8])
    out = cache.attend(q[:, :, -1:])
    for b in range(B):
        close(
            out[b : b + 1], posattn.attention(q[b : b + 1, :, -1:], k[b : b + 1, :, seen[b]], v[b : b + 1, :, seen[b]])
        )


def test_as_many_of_each_row_but_not_all(make: Callable[..., KVCache]) -> None:
    q, k, v = qkv()
    cache = make()
    cache.append(k[:, :, :5], v[:, :, :5])
    cache.append(k[:, :, 5:9], v[:, :, 5:9], lengths=[2, 2, 2])
    assert cache.lengths.tolist() == [7, 7, 7]
    close(cache.attend(q[:, :, :1]), posattn.attention(q[:, :, :1], k[:, :, :7], v[:, :, :7]))


def test_what_lies_behind_the_lengths_is_not_read(make: Callable[..., KVCache]) -> None:
    q, k, v = qkv()
    cache = make()
    for buffer in getattr(cache, "_buffers", getattr(cache, "_pools", [])):
        buffer.fill_(torch.nan)
    padded = k[:, :, :6].clone()
    padded[0, :, 3:] = torch.nan
    cache.append(padded, v[:, :, :6], lengths=[3, 6, 6])
    assert cache.attend(q[:, :, :1]).isfinite().all()


def test_reset_and_reorder(make: Callable[..., KVCache]) -> None:
    q, k, v = qkv()
    cache = make()
    cache.append(k, v)
    cache.reset()
    assert cache.lengths.tolist() == [0, 0, 0]
    cache.append(k[:, :, :6], v[:, :, :6], lengths=[6, 4, 1])
    cache.reorder(torch.tensor([1, 1, 0]))
    assert cache.lengths.tolist() == [4, 4, 6]
    cache.append(k[:, :, 6:7], v[:, :, 6:7])
    out = cache.attend(q[:, :, :1], posattn.ALiBi(HEADS))
    for b, (row, prompt) in enumerate([(1, 4), (1, 4), (0, 6)]):
        keys, values = (torch.cat([x[row, :, :prompt], x[b, :, 6:7]], 1)[None] for x in (k, v))
        close(out[b : b + 1], posattn.attention(q[b : b + 1, :, :1], keys, values, posattn.ALiBi(HEADS)))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["copy", "pickle"]
)
def test_copies_stand_alone(make: Callable[..., KVCache], copied: Callable[[KVCache], KVCache]) -> None:
    q, k, v = qkv()
    cache = make()
    cache.append(k[:, :, :5], v[:, :, :5])
    other = copied(cache)
    before = cache.attend(q[:, :, :1])
    assert torch.equal(other.attend(q[:, :, :1]), before)
    other.append(k[:, :, 5:], v[:, :, 5:])
    close(other.attend(q, causal=True), posattn.attention(q, k, v, causal=True))
    assert torch.equal(cache.attend(q[:, :, :1]), before)
    assert cache.lengths.tolist() == [5, 5, 5]


def test_memory_doubles() -> None:
    _, k, v = qkv(1)
    cache = DynamicCache()
    assert cache.capacity == 0
    grown = []
    for _ in range(70):
        cache.append(k, v)
        grown.append(cache.capacity)
    assert sorted(set(grown)) == [16, 32, 64, 128]
    assert (grown[15], grown[16]) == (16, 32)
    assert cache.append(k.expand(-1, -1, 300, -1), v.expand(-1, -1, 300, -1))["k"].shape[2] == 370


def test_a_compiled_step_is_one_graph() -> None:
    """Steps and prompts of a static cache: no graph for each length, and the eager result."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    position = posattn.RoPE(DIM) + posattn.Kerple(HEADS)
    eager, cache = (StaticCache(B, KV_HEADS, 16, DIM, DIM + 3) for _ in range(2))

    def step(cache: StaticCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            return posattn.attention(q, position=position, causal=True, **cache.append(k, v))

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    q, k, v = qkv(16)
    for t in range(16):
        given = [x[:, :, t : t + 1].contiguous() for x in (q, k, v)]
        close(compiled(cache, *given), step(eager, *given))
    assert counter.frame_count == 1
    assert torch.equal(cache.lengths, eager.lengths)
    with pytest.raises(RuntimeError, match="more tokens appended"):
        compiled(cache, *given)


def test_sharing_copies_no_page_until_one_is_written() -> None:
    _, k, v = qkv()
    cache = PagedCache(12, 4, 4, KV_HEADS, DIM, DIM + 3)
    one = cache.select([0])
    one.append(k[:1, :, :10], v[:1, :, :10])
    assert cache.free_pages == 9
    cache.share(0, 1)
    cache.share(0, 3, tokens=8)
    assert cache.free_pages == 9
    assert cache.k_lengths.tolist() == [10, 10, 0, 8]
    assert torch.equal(cache.block_table[0], cache.block_table[1])
    assert torch.equal(cache.block_table[3, :2], cache.block_table[0, :2])
    # Rows 0 and 1 both write behind token 10, in a page that they share: one copy, and not of the full pages.
    cache.select([0, 1]).append(k[:2, :, 10:11], v[:2, :, 10:11])
    assert cache.free_pages == 8
    assert torch.equal(cache.block_table[0, :2], cache.block_table[1, :2])
    assert cache.block_table[0, 2] != cache.block_table[1, 2]
    # Row 3 ends at a page's end, so it takes a page and copies none.
    cache.select([3]).append(k[2:, :, 11:12], v[2:, :, 11:12])
    assert cache.free_pages == 7
    q = torch.randn(3, HEADS, 1, DIM)
    out = cache.select([0, 3, 1]).attend(q, posattn.ALiBi(HEADS))
    first = [torch.cat([x[:1, :, :10], x[b : b + 1, :, 10:11]], 2) for b in (0, 1) for x in (k, v)]
    third = [torch.cat([x[:1, :, :8], x[2:, :, 11:12]], 2) for x in (k, v)]
    for i, (keys, values) in enumerate((first[:2], third, first[2:])):
        close(out[i : i + 1], posattn.attention(q[i : i + 1], keys, values, posattn.ALiBi(HEADS)))
    cache.free([0, 3])
    assert cache.free_pages == 9  # the last page of each, and not what row 1 holds
    cache.free(1)
    assert cache.free_pages == 12
    assert cache.block_table.eq(-1).all()


def test_no_more_pages_than_are_needed() -> None:
    _, k, v = qkv()
    cache = PagedCache(4, 4, 4, KV_HEADS, DIM, DIM + 3)
    cache.select([0]).append(k[:1, :, :10], v[:1, :, :10])
    cache.share(0, 1)
    # Row 1 stands still, so that it needs no page of its own; then one is enough for both.
    cache.select([1, 0]).append(k[:2, :, :1], v[:2, :, :1], lengths=[0, 0])
    assert cache.free_pages == 1
    cache.select([1, 0]).append(k[:2, :, :1], v[:2, :, :1], lengths=[1, 1])
    assert cache.free_pages == 0
    assert cache.k_lengths.tolist() == [11, 11, 0, 0]


def test_rows_of_a_selection_are_reordered_among_themselves() -> None:
    _, k, v = qkv()
    cache = PagedCache(12, 4, 4, KV_HEADS, DIM, DIM + 3)
    some = cache.select([3, 1])
    some.append(k[:2, :, :6], v[:2, :, :6], lengths=[6, 2])
    some.reorder([1, 0])
    assert cache.k_lengths.tolist() == [0, 6, 0, 2]
    assert some.lengths.tolist() == [2, 6]


def test_pages_are_counted_right_whatever_happens() -> None:
    """Random traffic beside a list of the tokens that each row should hold."""
    generator = torch.Generator().manual_seed(3)

    def draw(top: int) -> int:
        return int(torch.randint(top, (1,), generator=generator))

    cache = PagedCache(14, 3, 5, 1, 2)
    held: list[list[float]] = [[] for _ in range(5)]
    refused = 0
    for step in range(300):
        row, kind = draw(5), draw(10)
        if kind < 6:
            rows = sorted({row, draw(5)})
            k = torch.randn(len(rows), 1, 4, 2, generator=generator)
            counts = [draw(5) for _ in rows]
            before = cache.block_table.clone(), cache.k_lengths.clone(), cache.free_pages
            try:
                cache.select(rows).append(k, k, lengths=counts)
            except OutOfPages:
                refused += 1
                assert torch.equal(before[0], cache.block_table)
                assert torch.equal(before[1], cache.k_lengths)
                assert before[2] == cache.free_pages
                continue
            for i, (r, count) in enumerate(zip(rows, counts)):
                held[r] = held[r] + k[i, 0, :count, 0].tolist()
        elif kind < 8 and not held[row]:
            source = draw(5)
            tokens = draw(len(held[source]) + 1)
            cache.share(source, row, tokens)
            held[row] = held[source][:tokens]
        elif kind == 8:
            order = [draw(5) for _ in range(5)]
            cache.reorder(order)
            held = [held[r] for r in order]
        else:
            cache.free(row)
            held[row] = []
        pages = [set(row[row >= 0].tolist()) for row in cache.block_table]
        assert cache.free_pages == 14 - len(set().union(*pages)), step
        for r, tokens in enumerate(held):
            found = [cache.k[cache.block_table[r, t // 3], t % 3, 0, 0].item() for t in range(len(tokens))]
            assert found == tokens, (step, r)
    assert refused > 5
    cache.reset()
    assert cache.free_pages == 14


def test_beams_share_their_origin() -> None:
    _, k, v = qkv()
    cache = PagedCache(20, 4, B, KV_HEADS, DIM, DIM + 3)
    cache.append(k[:, :, :8], v[:, :, :8])
    assert cache.free_pages == 14
    cache.reorder([2, 2, 2])
    assert cache.free_pages == 18


def test_positions_in_every_append_or_in_none(make: Callable[..., KVCache]) -> None:
    _, k, v = qkv(2)
    cache = make(positions=True)
    cache.append(k, v, positions=torch.tensor([3, 4]))
    keys = cache.append(k, v, positions=torch.tensor([[9, 9]] * B))
    assert keys["k_positions"][:, :4].tolist() == [[3, 4, 9, 9]] * B
    with pytest.raises(ValueError, match="positions: expected them with every append, got none"):
        cache.append(k, v)


KEYS = torch.zeros(B, KV_HEADS, 2, DIM)
VALUES = torch.zeros(B, KV_HEADS, 2, DIM + 3)
WRONG = [
    ("k a list", {"k": [1]}, TypeError, "k: expected a torch.Tensor, got list"),
    ("k's rank", {"k": KEYS[0]}, ValueError, r"k: expected \[B, kv_heads, tokens, dim\], got \[2, 2, 16\]"),
    ("v's tokens", {"v": VALUES[:, :, :1]}, ValueError, r"v: expected \[3, 2, 2\] .* like k, got \[3, 2, 1\]"),
    ("v's dtype", {"v": VALUES.half()}, TypeError, "v: expected torch.float32 on cpu like k, got torch.float16"),
    ("grad", {"k": KEYS.clone().requires_grad_()}, ValueError, "k: expected no gradient.*torch.no_grad"),
    (
        "batch",
        {"k": KEYS[:2], "v": VALUES[:2]},
        ValueError,
        r"k: expected \[3, 2, tokens, 16\] as the cache holds, got",
    ),
    ("width", {"v": VALUES[..., 1:]}, ValueError, r"v: expected \[3, 2, tokens, 19\] as the cache holds"),
    ("dtype", {"k": KEYS.half(), "v": VALUES.half()}, TypeError, "k: expected torch.float32 on cpu as the cache holds"),
    ("lengths", {"lengths": [1, 3, 0]}, ValueError, "lengths: expected numbers from 0 to 2, got 0 to 3"),
    ("lengths' count", {"lengths": [1]}, ValueError, "lengths: expected 3 numbers, one per sequence, got 1"),
    ("lengths' dtype", {"lengths": torch.ones(3)}, TypeError, "lengths: expected int32 or int64, got torch.float32"),
    ("lengths' rank", {"lengths": torch.ones(3, 1).int()}, ValueError, "lengths: expected one dimension"),
    ("lengths a float", {"lengths": [1.0, 1, 1]}, TypeError, "lengths: expected integers"),
    (
        "positions now",
        {"positions": torch.zeros(2).long()},
        ValueError,
        "positions: expected none, as so far, got some",
    ),
    ("positions' dtype", {"positions": torch.zeros(2)}, TypeError, "positions: expected int32 or int64"),
    ("positions' shape", {"positions": torch.zeros(3).long()}, ValueError, r"positions: expected \[2\], \[1, 2\] or"),
]


@pytest.mark.parametrize(("changed", "kind", "message"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_appends(
    make: Callable[..., KVCache], changed: dict[str, object], kind: type[Exception], message: str
) -> None:
    cache = make()
    cache.append(KEYS, VALUES)
    with pytest.raises(kind, match=message):
        cache.append(**{"k": KEYS, "v": VALUES, **changed})
    assert cache.lengths.tolist() == [2, 2, 2]


def test_other_wrong_calls(make: Callable[..., KVCache]) -> None:
    cache = make()
    cache.append(KEYS, VALUES)
    with pytest.raises(ValueError, match="rows: expected rows from 0 to 2, got 3"):
        cache.reorder([0, 1, 3])
    with pytest.raises(ValueError, match="rows: expected 3 numbers"):
        cache.reorder([0, 1])


def test_wrong_sizes() -> None:
    with pytest.raises(ValueError, match="cache: expected tokens in it, got an empty one"):
        DynamicCache().keys()
    with pytest.raises(ValueError, match="tokens: expected a positive int, got 0"):
        StaticCache(1, 1, 0, 8)
    with pytest.raises(TypeError, match="head_dim: expected an int, got float"):
        StaticCache(1, 1, 4, 8.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="page: expected a positive int, got -1"):
        PagedCache(1, -1, 1, 1, 8)
    static = StaticCache(B, KV_HEADS, 3, DIM, DIM + 3)
    static.append(KEYS, VALUES)
    with pytest.raises(ValueError, match="k: expected no more tokens than the cache was made for, 3, got 4"):
        static.append(KEYS, VALUES)
    assert static.append(KEYS[:, :, :1], VALUES[:, :, :1])["k_lengths"].tolist() == [3, 3, 3]
    paged = PagedCache(4, 2, B, KV_HEADS, DIM, DIM + 3, row_tokens=3)
    with pytest.raises(ValueError, match="k: expected no more than 4 tokens a row, got 6 in row 0"):
        paged.append(KEYS.repeat(1, 1, 3, 1), VALUES.repeat(1, 1, 3, 1))
    paged.append(KEYS, VALUES)
    with pytest.raises(OutOfPages, match="3 pages are needed and 1 are free"):
        paged.append(KEYS, VALUES)
    with pytest.raises(ValueError, match="row: expected an empty one"):
        paged.share(0, 1)
    paged.free(1)
    with pytest.raises(ValueError, match="tokens: expected an int from 0 to 2, those of the source, got 3"):
        paged.share(0, 1, 3)
    with pytest.raises(ValueError, match="source, row: expected rows from 0 to 2, got 5"):
        paged.share(0, 5)
    with pytest.raises(ValueError, match="rows: expected each row once"):
        paged.select([0, 0])
