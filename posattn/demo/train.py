"""Train a decoder on short windows and score it on long ones."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from posattn.demo.model import Decoder

TRAIN_LENGTH = 128
EVAL_LENGTHS = (128, 256, 512, 1024, 2048)
SCORED = 256  # bytes at the end of every window
BATCH = 16
LEARNING_RATE = 3e-3
WARMUP_STEPS = 20


def train(model: Decoder, text: Tensor, steps: int, seed: int, label: str) -> list[float]:
    """The loss of every step, in nats a byte. Equal seeds draw equal windows, whatever the model."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    losses: list[float] = []
    model.train()
    with tqdm(total=steps, desc=f"{label:12s} training", unit="step", leave=False, disable=None) as bar:
        for _ in range(steps):
            starts = torch.randint(len(text) - TRAIN_LENGTH, (BATCH,), generator=generator)
            window = text[starts[:, None] + torch.arange(TRAIN_LENGTH + 1)].long()
            loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


@torch.no_grad()
def perplexities(model: Decoder, text: Tensor, windows: int, label: str) -> dict[int, float]:
    """Perplexity of the same bytes at every length: the last 256 before each of `windows` places in the text.

    At 128, shorter than what is scored, the 256 bytes come as two inputs.
    """
    model.eval()
    ends = torch.linspace(max(EVAL_LENGTHS), len(text) - 1, windows).long().tolist()
    result = {}
    for length in tqdm(EVAL_LENGTHS, desc=f"{label:12s} evaluation", unit="length", leave=False, disable=None):
        scored = min(length, SCORED)
        total = 0.0
        for end in ends:
            for stop in range(end - SCORED + scored, end + 1, scored):
                window = text[stop - length : stop + 1].long()[None]
                logits = model(window[:, :-1])[0, -scored:]
                total += F.cross_entropy(logits, window[0, -scored:], reduction="sum").item()
        result[length] = math.exp(total / (SCORED * len(ends)))
    return result


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then a half cosine down to a tenth."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return warm * (0.55 + 0.45 * math.cos(math.pi * step / max(steps, 1)))
