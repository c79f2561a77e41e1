"""Caches of keys and values for generation: what they share, one that grows, and one of a fixed size.

Keys are kept as they were projected, unrotated: attention() turns them by their positions in each call, so a cache
knows no encoding, and one that was filled under one scaling of RoPE serves any other. posattn/paged_cache.py has the
third kind, which may keep them turned.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor

from posattn.attention import Options, attention
from posattn.encodings.base import Encoding
from posattn.errors import ArgumentTypeError, ArgumentValueError
from posattn.validation import check_flag

if TYPE_CHECKING:
    from typing_extensions import Unpack

_INTEGERS = (torch.int32, torch.int64)
_SMALLEST = 16  # tokens that a growing cache begins with; below, it would be copied in each of the first steps


Function = TypeVar("Function", bound=Callable[..., object])


def uncompiled(function: Function) -> Function:
    """What is decided on the host, by Python's numbers, stays out of compiled graphs: they would be made anew."""
    return torch.compiler.disable(function)


class Keys(TypedDict, total=False):
    """What a cache holds, as keywords of attention()."""

    k: Tensor
    v: Tensor
    k_lengths: Tensor
    k_positions: Tensor
    block_table: Tensor
    k_rotated: bool
    offset: Tensor


class Column(NamedTuple):
    """What a cache holds of one kind, keys, values or positions, that new tokens have to fit."""

    batch: int
    heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(buffer: Tensor) -> Column:
        """That of a buffer [B, H, tokens, dim]."""
        return Column(buffer.shape[0], buffer.shape[1], buffer.shape[3], buffer.dtype, buffer.device)


class KVCache(ABC):
    """Keys and values of the tokens that a batch of sequences has seen: [B, Hkv, tokens, D] and [B, Hkv, tokens, Dv].

    For one attention layer. It has no gradients: append under torch.no_grad or torch.inference_mode.
    """

    @abstractmethod
    def append(
        self, k: Tensor, v: Tensor, lengths: Tensor | Sequence[int] | None = None, positions: Tensor | None = None
    ) -> Keys:
        """Put new tokens behind those that are there, and give all of them, as keywords of attention().

            out = attention(q, **cache.append(k, v), position=position, causal=True)

        Args:
            k: [B, Hkv, T, D].
            v: [B, Hkv, T, Dv].
            lengths: [B], how many of the T tokens of each sequence are its own; the rest is padding on the right, which
                is not kept. All T by default.
            positions: [B or 1, T] integers, explicit positions, kept beside the keys: in every append or in none.

        Raises:
            TypeError, ValueError: a tensor that does not fit the cache, or one that requires grad.
        """

    @abstractmethod
    def keys(self) -> Keys:
        """All tokens, as keywords of attention(): for queries that are the last tokens appended, or not among them."""

    @property
    @abstractmethod
    def lengths(self) -> Tensor:
        """Tokens of each sequence, int32 [B]."""

    @abstractmethod
    def reset(self) -> None:
        """Forget every token; memory stays."""

    @abstractmethod
    def reorder(self, rows: Tensor | Sequence[int]) -> None:
        """Make sequence b what sequence rows[b] was, for a beam search. rows: [B] integers."""

    def attend(self, q: Tensor, position: Encoding | None = None, **options: Unpack[Options]) -> Tensor:
        """attention() of queries [B, Hq, Tq, D] over all tokens; the queries are the last ones unless `offset` says
        where they sit."""
        return attention(q, position=position, **{**self.keys(), **options})  # type: ignore[call-overload]


class DynamicCache(KVCache):
    """A cache that grows: where it is full its memory doubles, so that T tokens are copied O(T) times in all.

    It takes its sizes, dtype and device from the first tokens. Lengths are kept on the host.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []  # k, v and, if they are kept, positions [B, 1, capacity, 1]
        self._lengths: list[int] = []

    @uncompiled
    def append(
        self, k: Tensor, v: Tensor, lengths: Tensor | Sequence[int] | None = None, positions: Tensor | None = None
    ) -> Keys:
        columns = check_columns(k, v, positions, [Column.of(buffer) for buffer in self._buffers])
        batch, tokens = k.shape[0], k.shape[2]
        new = check_lengths(lengths, batch, tokens)
        past = self._lengths or [0] * batch
        total = [before + more for before, more in zip(past, new)]
        self._reserve(columns, max(total, default=0))
        if len(set(past)) <= 1 and len(set(new)) <= 1:
            start, count = (past[0], new[0]) if batch else (0, 0)
            for buffer, column in zip(self._buffers, columns):
                buffer[:, :, start : start + count] = column[:, :, :count].detach()
        else:
            rows, places, sources = (index.to(k.device) for index in token_places(past, new))
            for buffer, column in zip(self._buffers, columns):
                buffer[rows, :, places] = column.detach()[rows, :, sources]
        self._lengths = total
        found = self.keys()
        if new != [tokens] * batch:
            found["offset"] = torch.tensor(past, dtype=torch.int32, device=k.device)
        return found

    @uncompiled
    def keys(self) -> Keys:
        if not self._buffers:
            raise ArgumentValueError("cache: expected tokens in it, got an empty one")
        longest = max(self._lengths, default=0)
        k, v, *rest = (buffer[:, :, :longest] for buffer in self._buffers)
        found: Keys = {"k": k, "v": v}
        if rest:
            found["k_positions"] = rest[0][:, 0, :, 0]
        if len(set(self._lengths)) > 1:
            found["k_lengths"] = self.lengths
        return found

    @property
    def lengths(self) -> Tensor:
        device = self._buffers[0].device if self._buffers else None
        return torch.tensor(self._lengths, dtype=torch.int32, device=device)

    @property
    def capacity(self) -> int:
        """Tokens a sequence that memory is there for."""
        return self._buffers[0].shape[2] if self._buffers else 0

    def reset(self) -> None:
        self._lengths = [0] * len(self._lengths)

    def reorder(self, rows: Tensor | Sequence[int]) -> None:
        order = check_rows("rows", rows, len(self._lengths), len(self._lengths))
        index = torch.tensor(order, device=self._buffers[0].device) if self._buffers else None
        self._buffers = [buffer[index] for buffer in self._buffers]
        self._lengths = [self._lengths[row] for row in order]

    def _reserve(self, columns: list[Tensor], tokens: int) -> None:
        if self._buffers and tokens <= self.capacity:
            return
        capacity = max(tokens, 2 * self.capacity, _SMALLEST)
        held = max(self._lengths, default=0)
        grown = [c.new_zeros(*c.shape[:2], capacity, c.shape[3]) for c in columns]
        for old, new in zip(self._buffers, grown):
            new[:, :, :held] = old[:, :, :held]
        self._buffers = grown


class StaticCache(KVCache):
    """A cache of a fixed size, allocated at once, whose tensors never change shape: for torch.compile and CUDA graphs.

    Lengths are a tensor on the device, so that one graph serves every step; attention goes by them.

    Args:
        batch: sequences B.
        kv_heads: key and value heads.
        tokens: the most tokens that a sequence may come to.
        head_dim: dimension D of a key.
        value_dim: dimension Dv of a value; head_dim by default.
        positions: keep explicit positions too.
        dtype, device: of keys and values.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        tokens: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        positions: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = {"batch": batch, "kv_heads": kv_heads, "tokens": tokens, "head_dim": head_dim}
        for name, size in {**sizes, "value_dim": head_dim if value_dim is None else value_dim}.items():
            check_size(name, size)
        check_flag("positions", positions)
        self.tokens = tokens
        # One slot more than tokens: what is not kept goes there, so that shapes do not depend on lengths.
        k = torch.zeros(batch, kv_heads, tokens + 1, head_dim, dtype=dtype, device=device)
        self._buffers = [k, k.new_zeros(batch, kv_heads, tokens + 1, head_dim if value_dim is None else value_dim)]
        if positions:
            self._buffers.append(torch.zeros(batch, 1, tokens + 1, 1, dtype=torch.int64, device=device))
        self._lengths = torch.zeros(batch, dtype=torch.int32, device=device)

    def append(
        self, k: Tensor, v: Tensor, lengths: Tensor | Sequence[int] | None = None, positions: Tensor | None = None
    ) -> Keys:
        columns = check_columns(k, v, positions, [Column.of(buffer) for buffer in self._buffers])
        batch, tokens = k.shape[0], k.shape[2]
        past = self._lengths.clone()
        if lengths is None:
            new = torch.full_like(past, tokens)
        elif isinstance(lengths, Tensor) and (torch.compiler.is_compiling() or lengths.device.type != "cpu"):
            # Nobody can look at them here.
            new = lengths.to(past).clamp(0, tokens)
        else:
            new = torch.tensor(check_lengths(lengths, batch, tokens), dtype=torch.int32, device=past.device)
        total = past + new
        self._check_room(total)
        token = torch.arange(tokens, device=past.device)
        places = torch.where(token < new[:, None], past[:, None] + token, self.tokens).long()
        rows = torch.arange(batch, device=past.device)[:, None]
        for buffer, column in zip(self._buffers, columns):
            buffer.transpose(1, 2)[rows, places] = column.detach().transpose(1, 2)
        self._lengths.copy_(total)
        found = self.keys()
        found["k_lengths"] = total
        if lengths is not None:
            found["offset"] = past
        return found

    def keys(self) -> Keys:
        k, v, *rest = (buffer[:, :, : self.tokens] for buffer in self._buffers)
        found: Keys = {"k": k, "v": v, "k_lengths": self._lengths.clone()}
        if rest:
            found["k_positions"] = rest[0][:, 0, :, 0]
        return found

    @property
    def lengths(self) -> Tensor:
        return self._lengths.clone()

    def reset(self) -> None:
        self._lengths.zero_()

    def reorder(self, rows: Tensor | Sequence[int]) -> None:
        batch = self._lengths.shape[0]
        index = torch.tensor(check_rows("rows", rows, batch, batch), device=self._lengths.device)
        for buffer in (*self._buffers, self._lengths):
            buffer.copy_(buffer[index])

    def _check_room(self, total: Tensor) -> None:
        fits = (total <= self.tokens).all()
        if torch.compiler.is_compiling() or total.device.type != "cpu":
            torch._assert_async(fits, "StaticCache: more tokens appended than it was made for")
        elif not fits:
            raise ArgumentValueError(
                f"k: expected no more tokens than the cache was made for, {self.tokens}, "
                f"got {int(total.max())} with those that are there"
            )


def check_size(name: str, size: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int):
        raise ArgumentTypeError(f"{name}: expected an int, got {type(size).__name__}")
    if size < 1:
        raise ArgumentValueError(f"{name}: expected a positive int, got {size}")
    return size


def check_columns(k: Tensor, v: Tensor, positions: Tensor | None, held: Sequence[Column]) -> list[Tensor]:
    """k, v and positions [B, 1, T, 1], if they are given, of one append, each fit to stand behind `held`,
    which is empty where the cache takes its sizes from the first tokens."""
    for name, tensor in (("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise ArgumentTypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ArgumentValueError(f"{name}: expected [B, kv_heads, tokens, dim], got {list(tensor.shape)}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ArgumentValueError(
                f"{name}: expected no gradient, for a cache keeps none (append under torch.no_grad), "
                "got a tensor that requires grad"
            )
    if v.shape[:3] != k.shape[:3]:
        raise ArgumentValueError(
            f"v: expected {list(k.shape[:3])} [B, kv_heads, tokens] like k, got {list(v.shape[:3])}"
        )
    if (v.dtype, v.device) != (k.dtype, k.device):
        raise ArgumentTypeError(f"v: expected {k.dtype} on {k.device} like k, got {v.dtype} on {v.device}")
    columns = [k, v]
    if positions is not None:
        columns.append(_check_positions(positions, k))
    if not held:
        return columns
    if len(columns) != len(held):
        expected, got = ("them with every append", "none") if len(held) == 3 else ("none, as so far", "some")
        raise ArgumentValueError(f"positions: expected {expected}, got {got}")
    for name, tensor, like in zip(("k", "v"), columns, held):
        if (tensor.shape[0], tensor.shape[1], tensor.shape[3]) != like[:3]:
            wanted = f"[{like.batch}, {like.heads}, tokens, {like.dim}]"
            raise ArgumentValueError(f"{name}: expected {wanted} as the cache holds, got {list(tensor.shape)}")
        if (tensor.dtype, tensor.device) != (like.dtype, like.device):
            raise ArgumentTypeError(
                f"{name}: expected {like.dtype} on {like.device} as the cache holds, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    return columns


def _check_positions(positions: Tensor, k: Tensor) -> Tensor:
    batch, tokens = k.shape[0], k.shape[2]
    if not isinstance(positions, Tensor):
        raise ArgumentTypeError(f"positions: expected a torch.Tensor, got {type(positions).__name__}")
    if positions.dtype not in _INTEGERS:
        raise ArgumentTypeError(f"positions: expected int32 or int64, got {positions.dtype}")
    rows = positions[None] if positions.dim() == 1 else positions
    if rows.dim() != 2 or rows.shape[0] not in (1, batch) or rows.shape[1] != tokens:
        raise ArgumentValueError(
            f"positions: expected [{tokens}], [1, {tokens}] or [{batch}, {tokens}], got {list(positions.shape)}"
        )
    return rows.to(k.device, torch.int64).expand(batch, tokens)[:, None, :, None]


def check_lengths(lengths: Tensor | Sequence[int] | None, batch: int, tokens: int) -> list[int]:
    """Each within 0 .. tokens; `tokens` for all where None."""
    if lengths is None:
        return [tokens] * batch
    found = _integers("lengths", lengths, batch)
    if found and not 0 <= min(found) <= max(found) <= tokens:
        raise ArgumentValueError(f"lengths: expected numbers from 0 to {tokens}, got {min(found)} to {max(found)}")
    return found


def check_rows(name: str, rows: Tensor | Sequence[int], count: int | None, batch: int) -> list[int]:
    """`count` rows (any number for None), each one of `batch`."""
    found = _integers(name, rows, count)
    wrong = [row for row in found if not 0 <= row < batch]
    if wrong:
        raise ArgumentValueError(f"{name}: expected rows from 0 to {batch - 1}, got {wrong[0]}")
    return found


def _integers(name: str, values: Tensor | Sequence[int], count: int | None) -> list[int]:
    if isinstance(values, Tensor):
        if values.dtype not in _INTEGERS:
            raise ArgumentTypeError(f"{name}: expected int32 or int64, got {values.dtype}")
        if values.dim() != 1:
            raise ArgumentValueError(f"{name}: expected one dimension, got {list(values.shape)}")
        found: list[int] = values.tolist()
    else:
        if not isinstance(values, (list, tuple, range)) or any(
            isinstance(x, bool) or not isinstance(x, int) for x in values
        ):
            raise ArgumentTypeError(f"{name}: expected integers, got {values!r}")
        found = list(values)
    if count is not None and len(found) != count:
        raise ArgumentValueError(f"{name}: expected {count} numbers, one per sequence, got {len(found)}")
    return found


def token_places(past: list[int], new: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """For every token that is kept: its row, its place there, and its place among the new ones; int64 on the CPU."""
    counts = torch.tensor(new, dtype=torch.int64)
    rows = torch.repeat_interleave(torch.arange(len(new)), counts)
    sources = torch.arange(rows.shape[0]) - (counts.cumsum(0) - counts)[rows]
    return rows, torch.tensor(past, dtype=torch.int64)[rows] + sources, sources
