"""A ViT with a class token and learned rotations (RoPE-Mixed), on images drawn here: which patch has the spot?

q and k are turned in front of attention, in plain PyTorch: the kernels' own rotation tables take no gradient.

    python examples/vit.py --steps 200
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import posattn

SIDE, PATCH, CELLS = 32, 4, 8  # pixels of a side and of a patch's, patches of a side


class MixedRoPE(nn.Module):
    """The angle of pair c of head h at (row, column) is f0[h, c] * row + f1[h, c] * column (Heo 2024)."""

    def __init__(self, heads, head_dim):
        super().__init__()
        pairs = 10.0 ** -torch.linspace(0, 1, head_dim // 4)
        turn = torch.rand(heads, 1) * 2 * torch.pi  # the paper's start: axial, turned by one random angle a head
        x = torch.cat([pairs * turn.cos(), -pairs * turn.sin()], 1)  # [H, D / 2]
        y = torch.cat([pairs * turn.sin(), pairs * turn.cos()], 1)
        self.frequencies = nn.Parameter(torch.stack([x, y])[:, :, None])  # [2, H, 1, D / 2]

    def forward(self, x, cells):  # x [B, H, T, D], cells [2, T]
        angle = (self.frequencies * cells[:, None, :, None]).sum(0)  # [H, T, D / 2]
        (a, b), cos, sin = x.chunk(2, -1), angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class ViT(nn.Module):
    def __init__(self, dim, heads, layers=2):
        super().__init__()
        self.heads, self.patches, self.head = heads, nn.Conv2d(1, dim, PATCH, PATCH), nn.Linear(dim, CELLS**2)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.ropes = nn.ModuleList(MixedRoPE(heads, dim // heads) for _ in range(layers))
        self.qkv = nn.ModuleList(nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 3 * dim)) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        grid = torch.stack(torch.meshgrid(torch.arange(CELLS), torch.arange(CELLS), indexing="ij")).flatten(1)
        # The class token comes first, and at (0, 0) it does not turn; the patches keep their own cells.
        self.register_buffer("cells", torch.cat([torch.zeros(2, 1), grid], 1))

    def forward(self, images):  # [B, 1, SIDE, SIDE]
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)  # [B, 1 + cells, dim]
        for rope, qkv, out in zip(self.ropes, self.qkv, self.out):
            q, k, v = qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            y = posattn.attention(rope(q, self.cells), rope(k, self.cells), v)
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
