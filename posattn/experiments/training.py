"""The training loop: the same bits whether or not it was interrupted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from posattn.experiments.presets import Training
from posattn.experiments.runs import Run

# A loss, from a model, of the batch that a generator draws.
Loss = Callable[[nn.Module, torch.Generator], Tensor]


def train(model: nn.Module, loss_of: Loss, training: Training, seed: int, run: Run, label: str) -> float:
    """Trains `model` in place, on from the run's checkpoint if it has one; the seconds that the steps took.

    Equal seeds draw equal batches, whatever the model. Losses go to the run's metrics, nats a token.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.rate, betas=(0.9, 0.95), weight_decay=training.weight_decay
    )
    first, seconds = 0, 0.0
    state = run.checkpoint()
    if state is None:
        run.start_anew()
    else:
        first, seconds = state["step"], state["seconds"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        torch.set_rng_state(state["rng"])
    lines: list[dict[str, float]] = []
    model.train()
    began = saved = time.monotonic()
    before = seconds

    def save(step: int) -> None:
        run.append(lines)
        lines.clear()
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        rngs = {"generator": generator.get_state(), "rng": torch.get_rng_state()}
        run.save({"step": step, "seconds": seconds, **states, **rngs})

    with tqdm(initial=first, total=training.steps, desc=label, unit="step", leave=False, disable=None) as bar:
        for step in range(first, training.steps):
            for group in optimizer.param_groups:
                group["lr"] = training.rate * rate(step, training)
            loss = loss_of(model, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            lines.append({"step": step, "loss": loss.item(), "gradient_norm": norm.item()})
            if not math.isfinite(lines[-1]["loss"]):
                raise RuntimeError(f"{label}: the loss of step {step} is {lines[-1]['loss']}")
            bar.update()
            bar.set_postfix(loss=f"{lines[-1]['loss']:.3f}")
            now = time.monotonic()
            seconds = before + now - began
            if now - saved > training.checkpoint_seconds:
                save(step + 1)
                saved = now
    save(training.steps)
    return seconds


def rate(step: int, training: Training) -> float:
    """Of the full learning rate at a step: a linear warm-up, then half a cosine down to a tenth."""
    warm = min(1.0, (step + 1) / max(training.warmup, 1))
    return warm * (0.55 + 0.45 * math.cos(math.pi * step / max(training.steps, 1)))
