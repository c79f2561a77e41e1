"""The encodings to time: every form that the exported classes show as examples, by name."""

from __future__ import annotations

import torch

from posattn.encodings.base import Context, Encoding
from posattn.parity import examples


def names() -> tuple[str, ...]:
    """ "none", and every example that runs in O(N) memory on positions 0 .. T-1."""
    return ("none", *(name for name, encoding in examples(2, 8, 16).items() if _is_linear(encoding)))


def build(name: str, heads: int, head_dim: int, tokens: int) -> Encoding | None:
    """The encoding of that name for q [B, heads, T <= tokens, head_dim], or None for "none"."""
    if name == "none":
        return None
    found = examples(heads, head_dim, tokens)
    if name not in found:
        raise ValueError(f"encoding: expected one of none, {', '.join(found)}, got {name!r}")
    return found[name]


def _is_linear(encoding: Encoding) -> bool:
    if encoding.needs_positions:
        return False
    context = Context(q_len=16, k_len=16, num_heads=2, head_dim=8, device=torch.device("cpu"), dtype=torch.float32)
    return encoding.lower(context).bias.dense is None
