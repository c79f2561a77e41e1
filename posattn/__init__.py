"""Attention with any positional encoding: exact, fused, forward and backward, in O(N) memory."""

from posattn import encodings
from posattn.attention import attention, scaled_dot_product_attention
from posattn.encodings import *  # noqa: F403

__all__ = ["attention", "scaled_dot_product_attention", *encodings.__all__]
