"""Attention with any positional encoding: exact, fused, forward and backward, in O(N) memory.

out = attention(q, k, v, RoPE(64) + ALiBi(12), causal=True)             # q [B, Hq, Tq, D]
out = scaled_dot_product_attention(q, k, v, position=FIRE(12))          # torch's signature, with a position
"""

from importlib.metadata import PackageNotFoundError as _NotFound
from importlib.metadata import version as _version

from posattn import encodings
from posattn import nn as nn  # not in __all__: `import *` would hide torch's
from posattn.attention import attention, scaled_dot_product_attention
from posattn.checking import check
from posattn.encodings import *  # noqa: F403 - posattn.encodings.__all__ is the list that tests and benches go by
from posattn.encodings import (
    DynamicNTK,
    LearnedEmbedding,
    Linear,
    Llama3,
    LongRoPE,
    Proportional,
    SinusoidalEmbedding,
    YaRN,
    segment_positions,
)
from posattn.encodings.relative_function import relative
from posattn.paged_cache import OutOfPages, PagedCache
from posattn.patch import patch_sdpa
from posattn.weights import weights

try:
    __version__ = _version("posattn")
except _NotFound:  # the sources alone, which nobody installed
    __version__ = "0+unknown"

__all__ = [
    "DynamicNTK",
    "LearnedEmbedding",
    "Linear",
    "Llama3",
    "LongRoPE",
    "OutOfPages",
    "PagedCache",
    "Proportional",
    "SinusoidalEmbedding",
    "YaRN",
    "__version__",
    "attention",
    "check",
    "patch_sdpa",
    "relative",
    "scaled_dot_product_attention",
    "segment_positions",
    "weights",
    *encodings.__all__,
]
