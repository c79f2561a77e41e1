"""Pretrain a small BERT on packed documents: no token is padding, and no document sees another.

python examples/packed_bert.py --steps 500
"""

import argparse
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import posattn
import posattn.nn

MASK, VOCABULARY = 256, 257  # bytes, and one more for what is hidden


class Layer(nn.Module):
    def __init__(self, dim, heads, position):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = posattn.nn.Attention(dim, heads, position=position, bias=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x, bounds):  # x [1, all tokens, dim]
        x = x + self.attention(self.norm1(x), cu_seqlens=bounds)
        return x + self.mlp(self.norm2(x))


class Bert(nn.Module):
    def __init__(self, dim, heads, layers):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, dim), nn.Linear(dim, VOCABULARY)
        position = posattn.T5Bias(heads, bidirectional=True)  # one for all layers
        self.layers = nn.ModuleList(Layer(dim, heads, position) for _ in range(layers))

    def forward(self, tokens, bounds):  # [1, all tokens], [documents + 1]
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, bounds)
        return self.head(x)


def pack(documents, budget):
    """Documents of up to `budget` bytes together, drawn at random: tokens [1, T], bounds [documents + 1]."""
    chosen, room = [], budget
    while room > 0:
        chosen.append(documents[torch.randint(len(documents), ())][:room])
        room -= len(chosen[-1])
    bounds = torch.tensor([0, *(len(d) for d in chosen)]).cumsum(0)
    return torch.tensor([list(b"".join(chosen))]), bounds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    steps, budget, dim, heads = (3, 200, 32, 2) if args.smoke else (args.steps, 4096, 256, 8)
    torch.manual_seed(0)
    source = Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes()
    documents = [part for part in source.split(b"\n\n") if len(part) > 8]  # of 9 to some thousand bytes
    model = Bert(dim, heads, layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        tokens, bounds = pack(documents, budget)
        hidden = torch.rand(tokens.shape) < 0.15
        loss = F.cross_entropy(model(tokens.masked_fill(hidden, MASK), bounds)[hidden], tokens[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5}  {len(bounds) - 1:4} documents, {loss.item():.3f} nats a hidden byte")


if __name__ == "__main__":
    main()
