"""Attention with any positional encoding: exact, fused, forward and backward, in O(N) memory.

out = attention(q, k, v, RoPE(64) + ALiBi(12), causal=True)             # q [B, Hq, Tq, D]
out = scaled_dot_product_attention(q, k, v, position=FIRE(12))          # torch's signature, with a position
"""

from posattn import encodings
from posattn.attention import attention, scaled_dot_product_attention
from posattn.encodings import *  # noqa: F403 - posattn.encodings.__all__ is the list that tests and benches go by
from posattn.encodings import (
    DynamicNTK,
    LearnedEmbedding,
    Linear,
    Llama3,
    LongRoPE,
    SinusoidalEmbedding,
    YaRN,
    segment_positions,
)

__all__ = [
    "DynamicNTK",
    "LearnedEmbedding",
    "Linear",
    "Llama3",
    "LongRoPE",
    "SinusoidalEmbedding",
    "YaRN",
    "attention",
    "scaled_dot_product_attention",
    "segment_positions",
    *encodings.__all__,
]
