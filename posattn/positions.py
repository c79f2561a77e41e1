"""Where each token sits: explicit positions as given, else implicit ones counted inside each sequence.

Shared by the lowering of rotary encodings, which need one angle per token, and by the reference.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


def document_index(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The document of each packed token, int64 [tokens]; cu_seqlens is [documents + 1], from 0 to the token count."""
    token = torch.arange(tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens.long(), token, right=True) - 1


def offset_bounds(offset: int | Tensor | None, known: tuple[int, int] | None) -> tuple[int, int] | None:
    """The least and the greatest offset; those of a tensor are `known`. None for the default, which aligns the ends of
    each sequence's queries and keys."""
    return known if offset is None or isinstance(offset, Tensor) else (offset, offset)


class Alignment(Protocol):
    """What says to which sequence a token belongs and where it sits there: a Mask, or what an encoding knows of it."""

    @property
    def offset(self) -> int | Tensor | None: ...
    @property
    def k_lengths(self) -> Tensor | None: ...
    @property
    def k_starts(self) -> Tensor | None: ...
    @property
    def cu_seqlens_q(self) -> Tensor | None: ...
    @property
    def cu_seqlens_k(self) -> Tensor | None: ...
    @property
    def q_segments(self) -> Tensor | None: ...
    @property
    def k_segments(self) -> Tensor | None: ...


def token_indices(q_tokens: int, k_tokens: int, device: torch.device, of: Alignment) -> tuple[Tensor, Tensor, Tensor]:
    """Each query's and key's index in its own sequence, and each query's offset: it sits at key position i + offset.

    All are int64 [B or 1, tokens]. With k_lengths [B] and k_starts [B], sequence b has the keys from k_starts[b] to
    k_lengths[b], and those before have negative indices; with cu_seqlens or segments, sequences are documents. `offset`
    (an int, or one a sequence) counts from key 0, or a document's first; it is number of keys - number of queries if
    None.
    """
    q_index = torch.arange(q_tokens, device=device)[None]
    k_index = q_index if k_tokens == q_tokens else torch.arange(k_tokens, device=device)[None]
    offset = of.offset
    if of.cu_seqlens_q is not None and of.cu_seqlens_k is not None:
        cu_q, cu_k = of.cu_seqlens_q.long(), of.cu_seqlens_k.long()
        q_document, k_document = document_index(cu_q, q_tokens), document_index(cu_k, k_tokens)
        if offset is None:
            offset = cu_k.diff() - cu_q.diff()
        of_query = offset.long()[q_document][None] if isinstance(offset, Tensor) else torch.full_like(q_index, offset)
        return q_index - cu_q[q_document], k_index - cu_k[k_document], of_query
    if of.q_segments is not None and of.k_segments is not None:
        q_start, q_count = segment_runs(of.q_segments, of.q_segments)
        if of.k_segments is of.q_segments:
            return q_index - q_start, q_index - q_start, torch.zeros_like(q_start)
        # One look at the keys' documents, for the keys and for the queries.
        start, count = segment_runs(of.k_segments, torch.cat([of.k_segments, of.q_segments], 1))
        return q_index - q_start, k_index - start[:, :k_tokens], count[:, k_tokens:] - q_count
    if offset is None:
        offset = k_tokens - q_tokens if of.k_lengths is None else of.k_lengths - q_tokens
    offsets = offset.long()[:, None] if isinstance(offset, Tensor) else torch.full_like(q_index, offset)
    if of.k_starts is not None:
        starts = of.k_starts.long()[:, None]
        k_index, offsets = k_index - starts, offsets - starts
    return q_index, k_index, offsets.expand(-1, q_tokens)


def segment_runs(segments: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """For each of `ids` [B, n]: where its run begins in `segments` [B, T], and how long it is (0 if it has none)."""
    if segments.shape[1] == 0:
        return torch.zeros_like(ids, dtype=torch.int64), torch.zeros_like(ids, dtype=torch.int64)
    ordered, order = segments.sort(dim=1, stable=True)
    ids = ids.contiguous()
    first = torch.searchsorted(ordered, ids)
    count = torch.searchsorted(ordered, ids, right=True) - first
    return order.gather(1, first.clamp(max=segments.shape[1] - 1)), count


def segment_greatest(segments: Tensor, values: Tensor) -> Tensor:
    """The greatest of `values` [B, T] in each token's segment, [B, T]."""
    ordered, order = segments.sort(dim=1, stable=True)
    number = F.pad(ordered.diff(dim=1) != 0, (1, 0)).cumsum(1)
    least = torch.finfo(values.dtype).min if values.is_floating_point() else torch.iinfo(values.dtype).min
    greatest = torch.full_like(values, least)
    greatest = greatest.scatter_reduce(1, number, values.gather(1, order), "amax").gather(1, number)
    return torch.zeros_like(values).scatter(1, order, greatest)
