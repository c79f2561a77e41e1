"""A small byte-level decoder whose only knowledge of order is the encoding given to its attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import posattn
from posattn.encodings.base import Encoding

BYTES = 256


@dataclass(frozen=True)
class Shape:
    """The model's sizes. Eight heads, since DAPE has something to mix only where there are several."""

    layers: int = 3
    heads: int = 8
    head_dim: int = 16

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


class Attention(nn.Module):
    def __init__(self, shape: Shape, encoding: Encoding, backend: str) -> None:
        super().__init__()
        self.shape, self.backend = shape, backend
        self.project_in = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.project_out = nn.Linear(shape.width, shape.width, bias=False)
        self.encoding = encoding

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, H, T, D] of x [B, T, width]."""
        qkv = self.project_in(x).unflatten(-1, (3, self.shape.heads, self.shape.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        out = posattn.attention(q, k, v, self.encoding, causal=True, backend=self.backend)
        return self.project_out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, shape: Shape, encoding: Encoding, backend: str) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(shape.width)
        self.attention = Attention(shape, encoding, backend)
        self.norm_mlp = nn.LayerNorm(shape.width)
        self.mlp = nn.Sequential(
            nn.Linear(shape.width, 4 * shape.width), nn.GELU(), nn.Linear(4 * shape.width, shape.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))


class Decoder(nn.Module):
    """Logits [B, T, 256] of the next byte, from bytes [B, T] int64. Each layer has an encoding of its own."""

    def __init__(self, shape: Shape, make_encoding: Callable[[], Encoding], seed: int, backend: str = "auto") -> None:
        super().__init__()
        self.shape = shape
        # The encodings draw after everything else, so that all other weights begin equal whatever the encoding.
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(BYTES, shape.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(shape, Encoding(), backend) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        for block in self.layers():
            block.attention.encoding = make_encoding()

    def layers(self) -> list[Block]:
        return [module for module in self.modules() if isinstance(module, Block)]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)
