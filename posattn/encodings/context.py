"""What an encoding is told of a call: sizes, positions, device and dtype, and what follows from them for its tables."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from posattn.plan import Mask
from posattn.positions import document_index, offset_bounds, segment_greatest, segment_runs, token_indices

MAX_TABLE_ENTRIES = 2**27


@dataclass(frozen=True)
class Context:
    """What a lowering may know of a call: its sizes and positions, never the values of q, k and v.

    Args:
        q_len, k_len: queries and keys of the longest sequence.
        num_heads: query heads.
        head_dim: D; None where it does not matter.
        device, dtype: q's.
        q_positions, k_positions: explicit positions, int64 [B or 1, tokens], or None for implicit ones.
        batch: B.
        q_tokens, k_tokens: length of the q and k tensors: not q_len and k_len where documents are packed.
        k_lengths, k_starts, cu_seqlens_q, cu_seqlens_k, q_segments, k_segments, causal, offset: as in
            `posattn.plan.Mask`.
        position_range: where given, it holds all explicit positions.
        offset_range: every offset of a tensor, as far as it is known.
        kv_heads: key heads; None for num_heads.
        k_rotated: the keys are turned already: nothing reads what a plan says of their rotation.
    """

    q_len: int
    k_len: int
    num_heads: int
    head_dim: int | None
    device: torch.device
    dtype: torch.dtype
    q_positions: Tensor | None = None
    k_positions: Tensor | None = None
    batch: int = 1
    q_tokens: int | None = None
    k_tokens: int | None = None
    k_lengths: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    position_range: tuple[int, int] | None = None
    causal: bool = False
    offset: int | Tensor | None = None
    offset_range: tuple[int, int] | None = None
    k_starts: Tensor | None = None
    q_segments: Tensor | None = None
    k_segments: Tensor | None = None
    kv_heads: int | None = None
    k_rotated: bool = False

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        mask: Mask,
        q_positions: Tensor | None = None,
        k_positions: Tensor | None = None,
        position_range: tuple[int, int] | None = None,
    ) -> Context:
        """The context of a checked call, q [B, Hq, Tq, D] and k [B, Hkv, Tk, D]."""
        return Context(
            q_len=mask.max_q or q.shape[2],
            k_len=mask.max_k or k.shape[2],
            num_heads=q.shape[1],
            head_dim=q.shape[3],
            device=q.device,
            dtype=q.dtype,
            q_positions=q_positions,
            k_positions=k_positions,
            batch=q.shape[0],
            q_tokens=q.shape[2],
            k_tokens=k.shape[2],
            k_lengths=mask.k_lengths,
            cu_seqlens_q=mask.cu_seqlens_q,
            cu_seqlens_k=mask.cu_seqlens_k,
            position_range=position_range,
            causal=mask.causal,
            offset=mask.offset,
            offset_range=mask.offset_range,
            k_starts=mask.k_starts,
            q_segments=mask.q_segments,
            k_segments=mask.k_segments,
            kv_heads=k.shape[1],
        )

    @property
    def explicit(self) -> bool:
        return self.q_positions is not None and self.k_positions is not None

    @property
    def plain(self) -> bool:
        """Whether there is nothing but sizes to know: no tensor."""
        places = self.q_positions, self.k_positions, self.k_lengths, self.k_starts, self.cu_seqlens_q, self.q_segments
        return all(place is None for place in places) and not isinstance(self.offset, Tensor)

    @property
    def tokens(self) -> tuple[int, int]:
        """The length of the q and of the k tensor."""
        return (
            self.q_len if self.q_tokens is None else self.q_tokens,
            self.k_len if self.k_tokens is None else self.k_tokens,
        )

    def token_positions(self) -> tuple[Tensor, Tensor]:
        """The position of every query and key, int64 [B or 1, tokens] each; the same tensor where they agree."""
        if self.q_positions is not None and self.k_positions is not None:
            return self.q_positions, self.k_positions
        q_tokens, k_tokens = self.tokens
        q_index, k_index, offset = token_indices(
            q_tokens,
            k_tokens,
            self.device,
            self,
        )
        # The same number of each, and nothing that moves the ones against the others: then they sit in the same places.
        plain = self.k_lengths is None and self.offset is None and q_tokens == k_tokens
        if self.cu_seqlens_q is None and self.q_segments is self.k_segments and plain:
            return k_index, k_index
        return q_index + offset, k_index

    def sequence_lengths(self) -> tuple[Tensor, Tensor]:
        """The length of the sequence that each query and each key belongs to, int64 [B or 1, tokens or 1] each.

        It is the largest position in use and one: never the size of a buffer that k_lengths leaves partly empty (or a
        causal mask whose offset ends before it), nor that of a neighbour in the batch or in a pack. No look at the
        device.
        """
        longest: Tensor
        if self.cu_seqlens_q is not None and self.cu_seqlens_k is not None:
            q_tokens, k_tokens = self.tokens
            q_document = document_index(self.cu_seqlens_q, q_tokens)
            k_document = document_index(self.cu_seqlens_k, k_tokens)
            longest = self._longest(self.cu_seqlens_q.long().diff(), self.cu_seqlens_k.long().diff())
            if self.q_positions is not None and self.k_positions is not None:
                longest = torch.zeros_like(longest)
                for document, positions in ((q_document, self.q_positions), (k_document, self.k_positions)):
                    longest = longest.scatter_reduce(0, document, positions[0] + 1, "amax")
            return longest[q_document][None], longest[k_document][None]
        if self.q_segments is not None and self.k_segments is not None:
            if self.q_positions is None or self.k_positions is None:
                return (
                    segment_runs(self.k_segments, self.q_segments)[1],
                    segment_runs(self.k_segments, self.k_segments)[1],
                )
            batch, split = self.q_segments.shape
            both = [x.expand(batch, -1) for x in (self.q_positions, self.k_positions)]
            longest = segment_greatest(torch.cat([self.q_segments, self.k_segments], 1), torch.cat(both, 1)) + 1
            return longest[:, :split], longest[:, split:]
        if self.q_positions is not None and self.k_positions is not None:
            k_positions = self.k_positions
            if self.k_lengths is not None:
                slot = torch.arange(k_positions.shape[1], device=self.device)
                k_positions = torch.where(slot < self.k_lengths[:, None], k_positions, -1)
            if self.k_starts is not None:
                slot = torch.arange(k_positions.shape[1], device=self.device)
                k_positions = torch.where(slot >= self.k_starts[:, None], k_positions, -1)
            # The pad gives a row of no tokens the length 0.
            q_last, k_last = (F.pad(p, (0, 1), value=-1).amax(1) for p in (self.q_positions, k_positions))
            longest = torch.maximum(q_last, k_last) + 1
        else:
            last = torch.full((1,), self.k_len, dtype=torch.int64, device=self.device)
            longest = self._longest(self.q_len, last if self.k_lengths is None else self.k_lengths.long())
        lengths = longest[:, None]
        return lengths, lengths

    def _longest(self, q_len: int | Tensor, k_end: Tensor) -> Tensor:
        """One more than the largest implicit position in use, of sequences whose keys end at k_end."""
        start = 0 if self.k_starts is None else self.k_starts.long()
        if self.offset is None:
            return k_end - start
        after = self.offset + q_len
        after = after.long() if isinstance(after, Tensor) else torch.full_like(k_end, after)
        return (after if self.causal else torch.maximum(after, k_end)) - start

    @property
    def position_bounds(self) -> tuple[int, int, int, int]:
        """First and last query position, first and last key position. Explicit positions cost one device sync.

        For implicit ones the bounds hold for sequences of any length up to k_len.
        """
        if self.explicit and self.position_range is not None:
            first, last = self.position_range
            return first, last, first, last
        if self.explicit:
            return self._explicit_bounds
        if (offsets := self._offsets) is not None:
            least = offsets[0] if self.k_starts is None else offsets[0] - self.k_len
            return least, offsets[1] + self.q_len - 1, 0, self.k_len - 1
        return 1 - self.q_len, self.k_len - 1, 0, self.k_len - 1

    @property
    def _offsets(self) -> tuple[int, int] | None:
        return offset_bounds(self.offset, self.offset_range)

    @cached_property
    def _explicit_bounds(self) -> tuple[int, int, int, int]:
        # Under vmap the bounds are those of all examples.
        q_positions, k_positions = (_unbatched(positions) for positions in self.token_positions())
        if q_positions.numel() == 0 or k_positions.numel() == 0:
            return 0, 0, 0, 0
        bounds = [*q_positions.aminmax(), *k_positions.aminmax()]
        q_first, q_last, k_first, k_last = torch.stack(bounds).tolist()
        return q_first, q_last, k_first, k_last

    @property
    def distance_range(self) -> tuple[int, int]:
        """First distance and number of distances that a table has to cover."""
        if not self.explicit:
            pairs = max(self.q_len + self.k_len - 1, 1)
            if (offsets := self._offsets) is None:
                return 1 - self.q_len, pairs
            least, greatest = offsets
            return least - max(self.k_len - 1, 0), _check_range("distances", greatest - least + pairs, self.num_heads)
        q_first, q_last, k_first, k_last = self.position_bounds
        return q_first - k_last, _check_range("distances", (q_last - q_first) + (k_last - k_first) + 1, self.num_heads)

    @property
    def query_range(self) -> tuple[int, int]:
        """First query position and number of query positions that a row scale has to cover."""
        if not self.explicit and self._offsets is None:
            return self.distance_range
        q_first, q_last, _, _ = self.position_bounds
        return q_first, _check_range("query positions", q_last - q_first + 1, 1)

    def distances(self) -> Tensor:
        """The distances that a table has to cover, int64 [L], ascending by one."""
        first, count = self.distance_range
        return torch.arange(first, first + count, device=self.device)

    def table_dtype(self, *parameters: Tensor) -> torch.dtype:
        """float64 if q or a parameter is float64, else float32, whatever narrower type they have."""
        wide = any(t.dtype == torch.float64 for t in parameters) or self.dtype == torch.float64
        return torch.float64 if wide else torch.float32


def _unbatched(x: Tensor) -> Tensor:
    while torch._C._functorch.is_batchedtensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def _check_range(what: str, count: int, heads: int) -> int:
    if count * heads > MAX_TABLE_ENTRIES:
        raise ValueError(
            f"q_positions, k_positions, offset: expected at most {MAX_TABLE_ENTRIES} table entries (heads x {what}), "
            f"got {heads} x {count}; are they what you meant?"
        )
    return count
