"""Train a decoder on sequences that are cut over processes: each holds a part of every sequence.

    torchrun --nproc-per-node 4 examples/long_context.py             # 16384 tokens
    torchrun --nproc-per-node 2 examples/long_context.py --smoke

Losses are those of one process, whatever the number of processes (python examples/long_context.py --smoke).
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import posattn
from posattn.demo import corpus
from posattn.distributed import attention, shard

HEADS, DIM = 8, 16
WIDTH = HEADS * DIM


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.position = posattn.DAPE(posattn.Kerple(HEADS), HEADS)

    def forward(self, x):  # [B, T / P, WIDTH]
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        # Gradients of all parameters are summed over the processes below, those of the encoding among them.
        out = attention(q, k, v, self.position, causal=True, method="ring", sum_gradients=False)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    tokens, steps, layers = (512, 3, 1) if given.smoke else (16384, 30, 3)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29511")):
        os.environ.setdefault(name, value)
    dist.init_process_group("gloo")

    torch.manual_seed(0)
    embedding, head = nn.Embedding(256, WIDTH), nn.Linear(WIDTH, 256)
    model = nn.Sequential(embedding, *(Block() for _ in range(layers)), head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    text = corpus.load(None, shortest=tokens + 1).train.long()
    losses = []
    for _ in range(steps):
        start = int(torch.randint(len(text) - tokens, ()))  # the same on every process
        window = text[start : start + tokens + 1]
        x, y = (shard(part[None], dim=1) for part in (window[:-1], window[1:]))
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") / tokens
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        total = loss.detach()
        dist.all_reduce(total)
        losses.append(total.item())
        if dist.get_rank() == 0:
            print(f"loss {losses[-1]:.4f}", flush=True)
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
