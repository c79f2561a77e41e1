"""Serve many requests from one paged cache: prompts share pages, rows come and go, a step serves all that are there.

The model is small and untrained: what counts is the cache. Every request's tokens are checked against the same model
without one.

    python examples/serve_paged.py --requests 32
"""

import argparse

import torch
from torch import nn

import posattn
import posattn.nn


class Decoder(nn.Module):
    def __init__(self, dim, heads, kv_heads, layers):
        super().__init__()
        position = posattn.RoPE(dim // heads)
        self.embed = nn.Embedding(256, dim)
        self.layers = nn.ModuleList(
            posattn.nn.Attention(dim, heads, kv_heads, position=position, causal=True) for _ in range(layers)
        )
        self.head = nn.Linear(dim, 256)

    def forward(self, tokens, caches=(), lengths=None):  # [B, T], a cache a layer; logits [B, T, 256]
        x = self.embed(tokens)
        for n, layer in enumerate(self.layers):
            x = x + layer(x, cache=caches[n], lengths=lengths) if caches else x + layer(x)
        return self.head(x)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--smoke", action="store_true", help="few and short requests, to see that it runs")
    args = parser.parse_args()
    requests, longest, rows = (4, 6, 3) if args.smoke else (args.requests, 60, 6)
    torch.manual_seed(0)
    model = Decoder(dim=64, heads=4, kv_heads=2, layers=2).eval()
    # Row 0 keeps the system prompt; requests begin with its pages and copy none but the last, when they write to it.
    caches = [posattn.PagedCache(pages=128, page=16, rows=rows + 1, kv_heads=2, head_dim=16) for _ in model.layers]
    system = list(b"You are a careful assistant. ")
    waiting = [(torch.randint(97, 123, (5 + n % 7,)).tolist(), 2 + n % longest) for n in range(requests)]
    model(torch.tensor([system]), [cache.select([0]) for cache in caches])

    running, done, steps = {}, [], 0
    while waiting or running:
        for row in range(1, rows + 1):  # whoever waits takes a free row, and reads its own prompt alone
            if row not in running and waiting:
                prompt, new = waiting.pop()
                for cache in caches:
                    cache.share(0, row)
                logits = model(torch.tensor([prompt]), [cache.select([row]) for cache in caches])
                begun = len(system) + len(prompt)
                running[row] = ([*system, *prompt, int(logits[0, -1].argmax())], begun, begun + new)
        active = sorted(running)
        last = torch.tensor([[running[row][0][-1]] for row in active])
        logits = model(last, [cache.select(active) for cache in caches])  # one token of every row
        steps += 1
        for row, token in zip(active, logits[:, -1].argmax(-1).tolist()):
            tokens, _, end = running[row]
            tokens.append(token)
            if len(tokens) >= end:
                done.append(running.pop(row))
                for cache in caches:
                    cache.free(row)
    for tokens, begun, _ in done:  # every token is the one that the whole text up to it gives
        logits = model(torch.tensor([tokens]))[0, :-1]
        best, chosen = logits.max(-1).values, logits.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
        assert torch.allclose(best[begun - 1 :], chosen[begun - 1 :], atol=1e-4)
    print(f"{len(done)} requests in {steps} steps; {caches[0].free_pages} of 128 pages are free")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
