"""A cache in pages: sequences come, grow, share their beginnings and go, in memory that is allocated once.

The layout is that of Kwon 2023 ("Efficient memory management for large language model serving with PagedAttention",
2309.06180): a sequence is a list of pages of one pool; pages that several sequences hold are counted, and copied when
one of them is about to write there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from posattn.appending import append
from posattn.encodings.rope import RoPE
from posattn.errors import ArgumentTypeError, ArgumentValueError
from posattn.kv_cache import (
    Column,
    Keys,
    KVCache,
    check_columns,
    check_lengths,
    check_rows,
    check_size,
    token_places,
    uncompiled,
)
from posattn.paging import gathered
from posattn.validation import check_flag

NO_PAGE = -1


class OutOfPages(RuntimeError):
    """The pool has fewer free pages than an append needs; nothing was changed. Free a sequence and append again."""


class PagedCache(KVCache):
    """Keys and values of up to `rows` sequences in a pool of pages; `attention(..., block_table=)` reads it.

        cache = posattn.PagedCache(pages=512, page=16, rows=8, kv_heads=4, head_dim=64)
        out = posattn.attention(q, **cache.append(k, v), causal=True)                   # all rows
        out = posattn.attention(q, **cache.select([2, 5]).append(k, v), causal=True)    # two of them
        cache.share(2, 3)       # row 3 begins as row 2 is, in the same pages
        cache.free(2)

    The bookkeeping is on the host; each append copies what changed to the device.

    Args:
        pages: pages in the pool.
        page: tokens a page.
        rows: sequences that the block table has room for.
        kv_heads: key and value heads.
        head_dim: dimension D of a key.
        value_dim: dimension Dv of a value; head_dim by default.
        row_tokens: the most tokens that a sequence may come to; all the pool's by default.
        positions: keep explicit positions too.
        rotation: a RoPE by which keys are turned as they are appended, once, instead of in every step. It turns them by
            their positions alone, so not one that learns, or whose scaling goes by the length. attention() is told
            (`k_rotated`), and takes the same RoPE, or a sum with it, as its position.
        dtype, device: of keys and values.

    Attributes:
        k, v: the pool, [pages, page, Hkv, D] and [pages, page, Hkv, Dv].
        block_table: int32 [rows, entries], the pages of each row; -1 where there is none.
        k_lengths: int32 [rows], the tokens of each row.
    """

    def __init__(
        self,
        pages: int,
        page: int,
        rows: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        row_tokens: int | None = None,
        positions: bool = False,
        rotation: RoPE | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {"pages": pages, "page": page, "rows": rows, "kv_heads": kv_heads, "head_dim": head_dim}
        for name, size in {**sizes, "value_dim": value_dim}.items():
            check_size(name, size)
        row_tokens = pages * page if row_tokens is None else check_size("row_tokens", row_tokens)
        check_flag("positions", positions)
        self.page = page
        self.rotation = None if rotation is None else _checked_rotation(rotation, head_dim)
        self.k = torch.zeros(pages, page, kv_heads, head_dim, dtype=dtype, device=device)
        self.v = self.k.new_zeros(pages, page, kv_heads, value_dim)
        self._pools = [self.k, self.v]
        if positions:
            self._pools.append(torch.zeros(pages, page, 1, 1, dtype=torch.int64, device=device))
        entries = min(-(-row_tokens // page), pages)
        # The host's copy is what decides; the device's is what kernels read.
        self._table = torch.full((rows, entries), NO_PAGE, dtype=torch.int32)
        self.block_table = self._table if self.k.device.type == "cpu" else self._table.to(self.k.device)
        self.k_lengths = torch.zeros(rows, dtype=torch.int32, device=self.k.device)
        self._lengths = [0] * rows
        self._holders = [0] * pages  # rows that hold each page
        self._free = list(range(pages - 1, -1, -1))

    @property
    def rows(self) -> int:
        """Sequences that the block table has room for."""
        return len(self._lengths)

    @property
    def free_pages(self) -> int:
        """Pages that no row holds."""
        return len(self._free)

    @property
    def lengths(self) -> Tensor:
        return self.k_lengths.clone()

    def append(
        self, k: Tensor, v: Tensor, lengths: Tensor | Sequence[int] | None = None, positions: Tensor | None = None
    ) -> Keys:
        """As KVCache.append, for all rows. OutOfPages, with nothing changed, if the pool cannot hold the tokens."""
        return self.select(range(self.rows)).append(k, v, lengths, positions)

    def keys(self) -> Keys:
        return self.select(range(self.rows)).keys()

    def reset(self) -> None:
        self.free(range(self.rows))

    def reorder(self, rows: Tensor | Sequence[int]) -> None:
        """As KVCache.reorder; beams of one origin share its pages."""
        self.select(range(self.rows)).reorder(rows)

    def select(self, rows: Tensor | Sequence[int]) -> PagedRows:
        """Some rows, in that order, as a cache of their own in this one's memory: the sequences of one step."""
        found = check_rows("rows", rows, None, self.rows)
        if len(set(found)) < len(found):
            raise ArgumentValueError(f"rows: expected each row once, got {found}")
        return PagedRows(self, found)

    @uncompiled
    def share(self, source: int, row: int, tokens: int | None = None) -> None:
        """Begin the empty `row` with the first tokens of `source`, in the same pages. All of its tokens by default.

        No key is copied; a page that is partly filled is, when either row appends to it.
        """
        source, row = check_rows("source, row", [source, row], 2, self.rows)
        if self._lengths[row]:
            raise ArgumentValueError(f"row: expected an empty one (free it first), got {self._lengths[row]} tokens")
        tokens = self._lengths[source] if tokens is None else tokens
        if isinstance(tokens, bool) or not isinstance(tokens, int) or not 0 <= tokens <= self._lengths[source]:
            raise ArgumentValueError(
                f"tokens: expected an int from 0 to {self._lengths[source]}, those of the source, got {tokens!r}"
            )
        self._hold(row, self._pages(source)[: -(-tokens // self.page)], tokens)
        self._publish([row])

    @uncompiled
    def free(self, rows: int | Tensor | Sequence[int]) -> None:
        """Empty these rows. Their pages are free where no other row holds them."""
        found = check_rows("rows", [rows] if isinstance(rows, int) else rows, None, self.rows)
        self._release(found)
        self._publish(found)

    def _pages(self, row: int) -> list[int]:
        pages: list[int] = self._table[row, : -(-self._lengths[row] // self.page)].tolist()
        return pages

    def _hold(self, row: int, pages: list[int], tokens: int) -> None:
        for page in pages:
            self._holders[page] += 1
        self._table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        self._lengths[row] = tokens

    def _release(self, rows: Sequence[int]) -> None:
        for row in rows:
            for page in self._pages(row):
                self._let_go(page)
            self._table[row] = NO_PAGE
            self._lengths[row] = 0

    def _let_go(self, page: int) -> None:
        self._holders[page] -= 1
        if self._holders[page] == 0:
            self._free.append(page)

    def _take(self, row: int, entry: int) -> int:
        page = self._free.pop()
        self._holders[page] = 1
        self._table[row, entry] = page
        return page

    def _publish(self, rows: Sequence[int], table: bool = True) -> None:
        """Bring what changed in these rows to the device."""
        index = torch.tensor(rows, dtype=torch.int64)
        there = index.to(self.k.device)
        self.k_lengths[there] = torch.tensor([self._lengths[row] for row in rows], dtype=torch.int32).to(there.device)
        if table and self.block_table is not self._table:
            self.block_table[there] = self._table[index].to(there.device)

    def _reserve(self, rows: Sequence[int], new: Sequence[int]) -> bool:
        """Pages for that many more tokens of each row, the one that is written next its own. Whether any is new."""
        room = self._table.shape[1] * self.page
        for row, more in zip(rows, new):
            if self._lengths[row] + more > room:
                raise ArgumentValueError(
                    f"k: expected no more than {room} tokens a row, got {self._lengths[row] + more} in row {row}"
                )
        copied: list[tuple[int, int]] = []  # rows whose last page others hold too, and its entry
        left: dict[int, int] = {}
        fresh: list[tuple[int, int]] = []
        for row, more in zip(rows, new):
            entry, filled = divmod(self._lengths[row], self.page)
            if more and filled:
                page = int(self._table[row, entry])
                holders = left.get(page, self._holders[page])
                if holders > 1:
                    left[page] = holders - 1
                    copied.append((row, entry))
            begun = -(-self._lengths[row] // self.page)
            fresh += [(row, entry) for entry in range(begun, -(-(self._lengths[row] + more) // self.page))]
        if len(copied) + len(fresh) > len(self._free):
            raise OutOfPages(f"{len(copied) + len(fresh)} pages are needed and {len(self._free)} are free")
        if copied:
            before = [int(self._table[row, entry]) for row, entry in copied]
            after = [self._take(row, entry) for row, entry in copied]
            source, target = (torch.tensor(pages, device=self.k.device) for pages in (before, after))
            for pool in self._pools:
                pool[target] = pool[source]
            for page in before:
                self._let_go(page)
        for row, entry in fresh:
            self._take(row, entry)
        return bool(copied or fresh)


def _checked_rotation(rotation: RoPE, head_dim: int) -> RoPE:
    if not isinstance(rotation, RoPE):
        raise ArgumentTypeError(
            f"rotation: expected a RoPE, which turns a key by its position alone, got {type(rotation).__name__}"
        )
    if rotation.learnable:
        raise ArgumentValueError("rotation: expected a RoPE that does not learn, for keys are turned once")
    if rotation.scaling is not None and rotation.scaling.dynamic:
        raise ArgumentValueError(
            f"rotation: expected a scaling that does not go by the length (length= fixes it), got {rotation.scaling!r}"
        )
    if rotation.head_dim != head_dim:
        raise ArgumentValueError(f"rotation: expected head_dim {head_dim} like the cache, got {rotation.head_dim}")
    return rotation


class PagedRows(KVCache):
    """Some rows of a PagedCache; `PagedCache.select` makes one."""

    def __init__(self, cache: PagedCache, rows: list[int]) -> None:
        self.cache = cache
        self.rows = rows

    @uncompiled
    def append(
        self, k: Tensor, v: Tensor, lengths: Tensor | Sequence[int] | None = None, positions: Tensor | None = None
    ) -> Keys:
        cache, rows = self.cache, self.rows
        held = [Column(len(rows), pool.shape[2], pool.shape[3], pool.dtype, pool.device) for pool in cache._pools]
        columns = check_columns(k, v, positions, held)
        new = check_lengths(lengths, len(rows), k.shape[2])
        past = [cache._lengths[row] for row in rows]
        changed = cache._reserve(rows, new)
        index, places, sources = token_places(past, new)
        pages = cache._table[torch.tensor(rows, dtype=torch.int64)[index], places // cache.page].long()
        slots = pages * cache.page + places % cache.page
        where = torch.stack([index, sources, slots])
        for number, (pool, column) in enumerate(zip(cache._pools, columns)):
            tables, interleaved = None, False
            if number == 0 and cache.rotation is not None:
                at = places if positions is None else columns[2].cpu()[index, 0, sources, 0]
                tables = cache.rotation.tables(at.to(k.device))
                interleaved = cache.rotation.layout == "interleaved"
            append(column, pool, where, tables, interleaved)
        for row, more in zip(rows, new):
            cache._lengths[row] += more
        cache._publish(rows, changed)
        found = self.keys()
        if lengths is not None:
            found["offset"] = torch.tensor(past, dtype=torch.int32, device=k.device)
        return found

    @uncompiled
    def keys(self) -> Keys:
        cache = self.cache
        longest = max((cache._lengths[row] for row in self.rows), default=0)
        index = torch.tensor(self.rows, dtype=torch.int64, device=cache.k.device)
        k_lengths = cache.k_lengths[index]
        table = cache.block_table[index, : -(-longest // cache.page)]
        found: Keys = {"k": cache.k, "v": cache.v, "block_table": table, "k_lengths": k_lengths}
        if cache.rotation is not None:
            found["k_rotated"] = True
        if len(cache._pools) == 3:
            found["k_positions"] = gathered(cache._pools[2], table, k_lengths)[:, 0, :, 0]
        return found

    @property
    def lengths(self) -> Tensor:
        return self.cache.k_lengths[torch.tensor(self.rows, dtype=torch.int64, device=self.cache.k.device)]

    def reset(self) -> None:
        self.cache.free(self.rows)

    @uncompiled
    def reorder(self, rows: Tensor | Sequence[int]) -> None:
        cache = self.cache
        sources = [self.rows[row] for row in check_rows("rows", rows, len(self.rows), len(self.rows))]
        lengths, pages = [cache._lengths[row] for row in sources], [cache._pages(row) for row in sources]
        for page in chain.from_iterable(pages):
            cache._holders[page] += 1
        cache._release(self.rows)
        for row, held, tokens in zip(self.rows, pages, lengths):
            cache._hold(row, held, tokens)
        for page in chain.from_iterable(pages):
            cache._holders[page] -= 1
        cache._publish(self.rows)
