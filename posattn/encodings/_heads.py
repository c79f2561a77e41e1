"""A check of the head dimension, for encodings that hold vectors of it."""

from __future__ import annotations

from posattn.encodings.base import Context, Encoding


def check_head_dim(encoding: Encoding, head_dim: int, context: Context) -> None:
    if context.head_dim is not None and context.head_dim != head_dim:
        raise ValueError(
            f"position: {type(encoding).__name__} was made for head_dim={head_dim}, got {context.head_dim}"
        )
