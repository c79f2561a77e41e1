"""BiPE: a learned embedding of the index inside a segment, and RoPE or ALiBi over segment numbers between segments
(He 2024, "Two Stones Hit One Bird: Bilevel Positional Encoding", arXiv 2401.16421)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from posattn.encodings._checks import check_positive_int
from posattn.encodings.alibi import ALiBi, alibi_slopes
from posattn.encodings.base import Context, Encoding
from posattn.encodings.embeddings import LearnedEmbedding
from posattn.encodings.rope import RoPE
from posattn.errors import described
from posattn.plan import Plan

ALIBI_STRENGTH = 96.0


class BiPE(Encoding):
    """Two levels: `intra`, added to the token embeddings, and an encoding over segment numbers in attention.

        index, segment = bipe.segments(tokens, separators)
        x = embed(tokens) + bipe.intra(index)
        out = attention(q, k, v, bipe, q_positions=segment, k_positions=segment, causal=True)

    `with_rope` and `with_alibi` are the paper's two forms.

    Args:
        inter: the encoding between segments.
        dim: dimension of the token embeddings.
        max_segment_length: a longer segment is cut there.
    """

    needs_positions = True

    def __init__(self, inter: Encoding, dim: int, max_segment_length: int) -> None:
        super().__init__()
        if not isinstance(inter, Encoding):
            raise TypeError(f"inter: expected an Encoding, got {described(inter)}")
        self.inter = inter
        self.intra = LearnedEmbedding(check_positive_int("max_segment_length", max_segment_length), dim)
        self.num_heads = inter.num_heads
        self.has_bias = inter.has_bias
        self.fractional = inter.fractional
        self.sole_operands = inter.sole_operands

    @classmethod
    def with_rope(cls, head_dim: int, dim: int, max_segment_length: int) -> BiPE:
        return cls(RoPE(head_dim), dim, max_segment_length)

    @classmethod
    def with_alibi(cls, num_heads: int, dim: int, max_segment_length: int) -> BiPE:
        """Segments are few and far between, so the authors multiply ALiBi's slopes by 96."""
        slopes = [ALIBI_STRENGTH * m for m in alibi_slopes(num_heads)]
        return cls(ALiBi(num_heads, slopes=slopes), dim, max_segment_length)

    def segments(self, tokens: Tensor, separators: Iterable[int]) -> tuple[Tensor, Tensor]:
        """`segment_positions` with segments cut at max_segment_length."""
        return segment_positions(tokens, separators, self.intra.max_positions)

    def build(self, context: Context) -> Plan:
        if not context.explicit:
            raise ValueError(
                "q_positions, k_positions: BiPE expects the segment number of every token (BiPE.segments), got None"
            )
        return self.inter(context)

    @classmethod
    def examples(cls, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
        dim, length = num_heads * head_dim, max(tokens, 1)
        return {
            "BiPE-RoPE": cls.with_rope(head_dim, dim, length),
            "BiPE-ALiBi": cls.with_alibi(num_heads, dim, length),
        }


def segment_positions(
    tokens: Tensor, separators: Iterable[int], max_segment_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Each token's index in its segment and its segment's number, int64 [..., T], for token ids [..., T].

    A separator ends its segment and belongs to it.

    Args:
        tokens: integers [..., T].
        separators: the token ids that end a segment, such as those of a full stop and of a line's end.
        max_segment_length: a segment of more tokens is cut there; None for no limit.

    Raises:
        TypeError: tokens that are not integers.
        ValueError: a max_segment_length below 1.
    """
    ids = torch.tensor(sorted(set(separators)), dtype=torch.int64, device=tokens.device)
    if tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
        raise TypeError(f"tokens: expected a tensor of integers, got {tokens.dtype}")
    separator = torch.isin(tokens, ids)
    starts = separator.roll(1, dims=-1)
    starts[..., :1] = True
    place = torch.arange(tokens.shape[-1], device=tokens.device).expand(tokens.shape)
    index = place - torch.where(starts, place, 0).cummax(dim=-1).values
    if max_segment_length is not None:
        index = index % check_positive_int("max_segment_length", max_segment_length)
    return index, (index == 0).long().cumsum(dim=-1) - 1
