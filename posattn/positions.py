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


def token_indices(
    q_tokens: int,
    k_tokens: int,
    device: torch.device,
    k_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each query's and key's index in its own sequence, and each query's offset, number of keys - number of queries.

    All are int64 [B or 1, tokens]. With k_lengths [B], sequence b has k_lengths[b] keys; with cu_seqlens, sequences
    are packed documents. Query i of a sequence sits at key position i + offset.
    """
    q_index = torch.arange(q_tokens, device=device)[None]
    k_index = q_index if k_tokens == q_tokens else torch.arange(k_tokens, device=device)[None]
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        cu_q, cu_k = cu_seqlens_q.long(), cu_seqlens_k.long()
        q_document, k_document = document_index(cu_q, q_tokens), document_index(cu_k, k_tokens)
        offsets = cu_k.diff() - cu_q.diff()
        return q_index - cu_q[q_document], k_index - cu_k[k_document], offsets[q_document][None]
    if k_lengths is not None:
        return q_index, k_index, (k_lengths.long()[:, None] - q_tokens).expand(-1, q_tokens)
    return q_index, k_index, torch.full_like(q_index, k_tokens - q_tokens)
