"""Where each token sits: explicit positions as given, else implicit ones counted inside each sequence.

Shared by the lowering of rotary encodings, which need one angle per token, and by the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_index(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The document of each packed token, int64 [tokens]; cu_seqlens is [documents + 1], from 0 to the token count."""
    token = torch.arange(tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens.long(), token, right=True) - 1


def offset_bounds(offset: int | Tensor | None, known: tuple[int, int] | None) -> tuple[int, int] | None:
    """The least and the greatest offset; those of a tensor are `known`. None for the default, which aligns the ends of
    each sequence's queries and keys."""
    return known if offset is None or isinstance(offset, Tensor) else (offset, offset)


def token_indices(
    q_tokens: int,
    k_tokens: int,
    device: torch.device,
    k_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    k_starts: Tensor | None = None,
    offset: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each query's and key's index in its own sequence, and each query's offset: it sits at key position i + offset.

    All are int64 [B or 1, tokens]. With k_lengths [B] and k_starts [B], sequence b has the keys from k_starts[b] to
    k_lengths[b], and those before have negative indices; with cu_seqlens, sequences are packed documents. `offset` (an
    int, or one a sequence) counts from key 0, or a document's first; it is number of keys - number of queries if None.
    """
    q_index = torch.arange(q_tokens, device=device)[None]
    k_index = q_index if k_tokens == q_tokens else torch.arange(k_tokens, device=device)[None]
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        cu_q, cu_k = cu_seqlens_q.long(), cu_seqlens_k.long()
        q_document, k_document = document_index(cu_q, q_tokens), document_index(cu_k, k_tokens)
        if offset is None:
            offset = cu_k.diff() - cu_q.diff()
        of_query = offset.long()[q_document][None] if isinstance(offset, Tensor) else torch.full_like(q_index, offset)
        return q_index - cu_q[q_document], k_index - cu_k[k_document], of_query
    if offset is None:
        offset = k_tokens - q_tokens if k_lengths is None else k_lengths - q_tokens
    offsets = offset.long()[:, None] if isinstance(offset, Tensor) else torch.full_like(q_index, offset)
    if k_starts is not None:
        starts = k_starts.long()[:, None]
        k_index, offsets = k_index - starts, offsets - starts
    return q_index, k_index, offsets.expand(-1, q_tokens)
