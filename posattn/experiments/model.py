"""The transformer that all experiments train: a decoder of text, or an encoder with an answer at each placeholder."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import posattn
from posattn.encodings.base import Encoding
from posattn.experiments.contestants import Contestant
from posattn.experiments.presets import Shape


class Attention(nn.Module):
    """Self-attention whose only knowledge of order is `encoding`."""

    def __init__(self, shape: Shape, causal: bool, backend: str) -> None:
        super().__init__()
        self.shape, self.causal, self.backend = shape, causal, backend
        self.project_in = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.project_out = nn.Linear(shape.width, shape.width, bias=False)
        self.encoding: Encoding | None = None

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, H, T, D] of x [B, T, width]."""
        qkv = self.project_in(x).unflatten(-1, (3, self.shape.heads, self.shape.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        out = posattn.attention(q, k, v, self.encoding, causal=self.causal, backend=self.backend, deterministic=True)
        return self.project_out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then a network of four times the width, each behind a norm and beside a residual."""

    def __init__(self, shape: Shape, causal: bool, backend: str) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(shape.width)
        self.attention = Attention(shape, causal, backend)
        self.norm_mlp = nn.LayerNorm(shape.width)
        self.mlp = nn.Sequential(
            nn.Linear(shape.width, 4 * shape.width), nn.GELU(), nn.Linear(4 * shape.width, shape.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))


class Transformer(nn.Module):
    """Logits [B, T, answers] of tokens [B, T] int64.

    Args:
        shape: its sizes.
        symbols: of the tokens that it reads; placeholders count.
        answers: classes of a logit; with None the embedding's own weights give them, one a symbol.
        contestant: what it knows of order.
        train_length: handed to the contestant.
        causal: whether a token sees those after it.
        seed: of all weights. Those of the encodings are drawn last, so that the others begin equal for all contestants.
        backend: posattn's.
    """

    def __init__(
        self,
        shape: Shape,
        symbols: int,
        answers: int | None,
        contestant: Contestant,
        train_length: int,
        causal: bool,
        seed: int,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.shape, self.train_length = shape, train_length
        self.embedding = nn.Embedding(symbols, shape.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(shape, causal, backend) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.answer = None if answers is None else nn.Linear(shape.width, answers)
        self.sines = posattn.SinusoidalEmbedding(shape.width) if contestant.sinusoidal else None
        self.use(lambda: contestant.make(shape, train_length))

    def layers(self) -> Iterator[Block]:
        return (block for block in self.blocks if isinstance(block, Block))

    def use(self, make: Callable[[], Encoding | None]) -> None:
        """Gives each layer a new encoding, on the device of the other weights."""
        for block in self.layers():
            encoding = make()
            block.attention.encoding = None if encoding is None else encoding.to(self.embedding.weight.device)

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, T, width], what the first layer reads."""
        x = self.embedding(tokens)
        if self.sines is not None:
            # Of a size like the embeddings', which begin small.
            x = x + 0.02 * self.sines(tokens.shape[-1], x.dtype, x.device)
        return x

    def forward(self, tokens: Tensor, last: int | None = None) -> Tensor:
        """With `last`, the logits of that many last tokens alone."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x if last is None else x[:, -last:])
        return F.linear(x, self.embedding.weight) if self.answer is None else self.answer(x)
