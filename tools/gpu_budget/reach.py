"""The share of tiles that ALiBi keeps in reach, by the rule of kernels/attention/reach.py, and what finding them takes.

    python -m tools.gpu_budget.reach [longest]

Queries and keys are drawn from the standard normal distribution; causal attention; the figures are in
docs/lab/triton.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from posattn import ALiBi
from posattn.backends.common.reach import CELL

NATS, SLACK = 40.0 * math.log(2.0), 1.01
DIM = 64
BLOCKS = ((128, 64), (128, 128))  # of the forward kernels at D = 64: sm_80, sm_90


def first_keys(q: Tensor, k: Tensor, slope: float, block: int) -> Tensor:
    """The first key in reach of each block of queries of one head, causal, [ceil(T / block)] in multiples of CELL; q
    and k [T, D]."""
    tokens, dim = q.shape
    rows = torch.arange(0, tokens, block)
    last = (rows + block).clamp(max=tokens) - 1
    cells = torch.arange(0, tokens, CELL)
    # The nearest key is the row's own.
    q_norm, k_norm = (_largest(x, size) for x, size in ((q, block), (k, CELL)))
    near = torch.stack([k_norm[int(a) // CELL : int(b) // CELL + 1].amax() for a, b in zip(rows, last)])
    scale = dim**-0.5
    limit = -scale * q_norm * near - NATS - math.log(tokens)
    nearest = (rows[:, None] - cells[None, :] - CELL + 1).clamp(min=0)
    most = scale * q_norm[:, None] * k_norm[None, :] - slope * nearest
    return (most > limit[:, None]).int().argmax(1) * CELL


def _largest(x: Tensor, size: int) -> Tensor:
    """The largest norm of each `size` rows, [ceil(T / size)]."""
    norms = x.float().norm(dim=1) * SLACK
    return torch.nn.functional.pad(norms, (0, -len(norms) % size)).view(-1, size).amax(1)


def share(heads: int, tokens: int, block_m: int, block_n: int) -> float:
    """Tiles in reach over those that causal attention has, all heads together."""
    ends = (torch.arange(0, tokens, block_m) + block_m).clamp(max=tokens).add(block_n - 1) // block_n
    generator = torch.Generator().manual_seed(0)
    kept = 0
    for slope in ALiBi(heads).slopes.tolist():
        q, k = (torch.randn(tokens, DIM, generator=generator) for _ in range(2))
        kept += int((ends - first_keys(q, k, slope, block_m) // block_n).sum())
    return kept / (heads * int(ends.sum()))


def table(longest: int) -> Iterator[str]:
    """Of 12 and 32 heads, by length and tile; beside them the bytes and the comparisons that finding them takes."""
    yield "| keys | " + " | ".join(f"{h} heads, {m} x {n}" for h in (12, 32) for m, n in BLOCKS) + " | prologue |"
    yield "| --- | " + "--- | " * 5
    tokens = 2048
    while tokens <= longest:
        shares = [f"{share(heads, tokens, *block):.1%}" for heads in (12, 32) for block in BLOCKS]
        yield f"| {tokens} | " + " | ".join(shares) + f" | {prologue(tokens):.2%} |"
        tokens *= 2


def prologue(tokens: int, block: int = 128) -> float:
    """Operations of the prologue over those of plain causal attention of a head: 2 D for each row of Q and of K, and 12
    for each pair of a block and a cell; the tiles take 4 D for each visible pair, on tensor cores 16 times as fast."""
    own = 2 * tokens * 2 * DIM + 12 * (tokens / block) * (tokens / CELL)
    return own / (4 * DIM * tokens * tokens / 2 / 16)


if __name__ == "__main__":
    for line in table(int(sys.argv[1]) if len(sys.argv) > 1 else 131072):
        print(line, flush=True)
