"""The Chomsky hierarchy tasks: encoders trained on short strings, their accuracy on long ones (Deletang 2022; DAPE's
table of them, Zheng 2024).

An encoder reads the string and behind it a placeholder for each symbol of the answer, and answers there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from posattn.experiments.chomsky_tasks import TASKS, Task, sample
from posattn.experiments.contestants import ENCODERS
from posattn.experiments.model import Transformer
from posattn.experiments.presets import Chomsky
from posattn.experiments.runs import Run
from posattn.experiments.training import train

AT_ONCE = 1 << 14  # symbols of an evaluated batch


def with_placeholders(task: Task, inputs: Tensor, length: int) -> Tensor:
    """[n, T + A] of inputs [n, T]; the placeholder is the symbol after the task's own."""
    return F.pad(inputs, (0, task.answer_length(length)), value=task.symbols)


def task_loss(task: Task, longest: int, batch: int, device: str) -> Callable[[nn.Module, torch.Generator], Tensor]:
    """Cross entropy of the scored answers, nats a symbol; each batch has one length, up to `longest`."""

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        length = int(torch.randint(task.shortest, longest + 1, (), generator=generator))
        drawn = sample(task, batch, length, generator)
        logits = model(with_placeholders(task, drawn.inputs, length).to(device), drawn.answers.shape[1])
        scored = drawn.scored.to(device)
        return F.cross_entropy(logits.float()[scored], drawn.answers.to(device)[scored])

    return loss


@torch.no_grad()
def accuracy(model: nn.Module, task: Task, length: int, tested: int, device: str) -> float:
    """The share of scored symbols that are right, over `tested` strings, the same ones for every model."""
    model.eval()
    generator = torch.Generator().manual_seed(length)
    at_once = max(1, AT_ONCE // (length + task.answer_length(length)))
    right = scored = 0
    while tested > 0:
        drawn = sample(task, min(tested, at_once), length, generator)
        tested -= at_once
        logits = model(with_placeholders(task, drawn.inputs, length).to(device), drawn.answers.shape[1])
        right += int(((logits.argmax(-1).cpu() == drawn.answers) & drawn.scored).sum())
        scored += int(drawn.scored.sum())
    return right / scored


def run_one(
    task_name: str, name: str, seed: int, given: Chomsky, out: Path, backend: str, device: str
) -> dict[str, Any]:
    """Trains and tests one encoder on one task; the result, from its folder where it was finished before."""
    task = TASKS[task_name]
    settings = {"task": task_name, "contestant": name, "seed": seed, "preset": given}
    run = Run(out / task_name / name / f"seed{seed}", settings)
    if run.result is not None:
        return run.result
    contestant, longest = ENCODERS[name], given.train_length
    model = Transformer(
        given.shape, task.symbols + 1, task.answers, contestant, longest, causal=False, seed=seed, backend=backend
    ).to(device)
    label = f"{task_name}, {name}, seed {seed}"
    loss = task_loss(task, longest, given.training.batch, device)
    seconds = train(model, loss, given.training, seed, run, label)
    accuracies = {
        length: accuracy(model, task, length, given.tested, device)
        for length in tqdm(given.lengths, desc=f"{label}, test", unit="length", leave=False, disable=None)
    }
    return run.finish(
        {
            "task": task_name,
            "contestant": name,
            "seed": seed,
            "train_seconds": seconds,
            "trained": accuracy(model, task, longest, given.tested, device),
            "accuracies": accuracies,
        }
    )


def run_all(
    given: Chomsky, tasks: Sequence[str], names: Sequence[str], seeds: int, out: Path, backend: str, device: str
) -> list[dict[str, Any]]:
    """Every task, seed and contestant; a line each as it is done."""
    results = []
    for task in tasks:
        for name in names:
            for seed in range(seeds):
                result = run_one(task, name, seed, given, out, backend, device)
                results.append(result)
                print(f"{task:28s} {name:12s} seed {seed}: {100 * mean_accuracy(result):5.1f}%", flush=True)
    return results


def mean_accuracy(result: dict[str, Any]) -> float:
    """Over all lengths beyond training, as the papers' tables have it."""
    return sum(result["accuracies"].values()) / len(result["accuracies"])
