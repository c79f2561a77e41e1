"""Modules on top of `attention`: a layer for models of one's own, drop-ins for torch's; and caches for them."""

from posattn.kv_cache import DynamicCache, KVCache, StaticCache
from posattn.nn.attention import Attention
from posattn.nn.multihead import MultiheadAttention
from posattn.nn.transformer import TransformerEncoderLayer
from posattn.paged_cache import OutOfPages, PagedCache

__all__ = [
    "Attention",
    "DynamicCache",
    "KVCache",
    "MultiheadAttention",
    "OutOfPages",
    "PagedCache",
    "StaticCache",
    "TransformerEncoderLayer",
]
