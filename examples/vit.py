"""A ViT with a class token and learned rotations (RoPE-Mixed), on images drawn here: which patch has the spot?

The class token comes first, at position 0, where nothing turns; the patches keep their own cells.

    python examples/vit.py --steps 600

In 200 steps, 11 seconds of one thread, the loss fell from 4.16 to 1.1, 66% found (chance is 1.6%).
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import posattn

SIDE, PATCH, CELLS = 32, 4, 8  # pixels of a side and of a patch's, patches of a side


class ViT(nn.Module):
    def __init__(self, dim, heads, layers=2):
        super().__init__()
        self.heads, self.patches, self.head = heads, nn.Conv2d(1, dim, PATCH, PATCH), nn.Linear(dim, CELLS**2)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        mixed = {"width": CELLS, "mixed": True, "num_heads": heads}
        self.ropes = nn.ModuleList(posattn.AxialRoPE(dim // heads, **mixed) for _ in range(layers))
        self.qkv = nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 3 * dim)) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        self.register_buffer("cells", torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(CELLS**2)]))

    def forward(self, images):  # [B, 1, SIDE, SIDE]
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)  # [B, 1 + cells, dim]
        for rope, qkv, out in zip(self.ropes, self.qkv, self.out):
            q, k, v = qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            y = posattn.attention(q, k, v, rope, q_positions=self.cells, k_positions=self.cells)
            x = x + F.gelu(out(y.transpose(1, 2).flatten(2)))
        return self.head(x[:, 0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    steps, batch = (3, 4) if args.smoke else (args.steps, 32)
    model = ViT(dim=64, heads=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        cell = torch.randint(CELLS**2, (batch,))  # the patch with the spot
        bright = F.one_hot(cell, CELLS**2).view(-1, 1, CELLS, CELLS).float()
        scores = model(F.interpolate(bright, scale_factor=PATCH) + 0.3 * torch.randn(batch, 1, SIDE, SIDE))
        loss = F.cross_entropy(scores, cell)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5}  loss {loss.item():.3f}, found {(scores.argmax(-1) == cell).float().mean():.0%}")


if __name__ == "__main__":
    main()
