"""Extrapolation: decoders trained on short inputs and scored on long ones, as in DAPE's main tables.

Every model scores the same tokens at every length: the last `scored` before each of `windows` places of the text that
was held out. Where an input is shorter than what is scored, it comes in several inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from posattn.demo.corpus import Corpus
from posattn.demo.model import BYTES
from posattn.experiments.contestants import DECODERS, Contestant
from posattn.experiments.model import Transformer
from posattn.experiments.presets import Extrapolation
from posattn.experiments.runs import Run
from posattn.experiments.training import train


@dataclass(frozen=True)
class Setting:
    """What is the same for all models of an experiment."""

    out: Path
    text: Corpus
    backend: str
    device: str


def text_loss(text: Tensor, length: int, batch: int, device: str) -> Callable[[nn.Module, torch.Generator], Tensor]:
    """Cross entropy, nats a byte, of the next byte in windows of `length` of `text` [bytes] uint8."""

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        starts = torch.randint(len(text) - length, (batch,), generator=generator)
        window = text[starts[:, None] + torch.arange(length + 1)].long().to(device)
        logits = model(window[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())

    return loss


@torch.no_grad()
def losses_of(
    model: Transformer, text: Tensor, length: int, lengths: Sequence[int], windows: int, scored: int, device: str
) -> list[float]:
    """Nats a byte at each of `windows` places, for inputs of `length`; the places go by the longest of `lengths`."""
    model.eval()
    found = []
    part = min(length, scored)
    for end in torch.linspace(max(max(lengths), scored), len(text) - 1, windows).long().tolist():
        total = 0.0
        for stop in range(end - scored + part, end + 1, part):
            window = text[stop - length : stop + 1].long().to(device)[None]
            logits = model(window[:, :-1], part)[0].float()
            total += F.cross_entropy(logits, window[0, -part:], reduction="sum").item()
        found.append(total / scored)
    return found


def run_of(name: str, length: int, seed: int, given: Extrapolation, setting: Setting) -> Run:
    """The folder of one contestant's model, trained at `length`."""
    settings = {
        "contestant": name,
        "train_length": length,
        "seed": seed,
        "shape": given.shape,
        "training": given.training[length],
        "evaluation": (given.lengths, given.windows, given.scored),
        "text": setting.text.source,
    }
    return Run(setting.out / str(length) / name / f"seed{seed}", settings)


def trained(name: str, contestant: Contestant, given: Extrapolation, setting: Setting, run: Run) -> Transformer:
    """The trained model of a run; read back where it was trained before."""
    length, seed = int(run.settings["train_length"]), int(run.settings["seed"])
    model = Transformer(given.shape, BYTES, None, contestant, length, True, seed, setting.backend).to(setting.device)
    weights = run.weights()
    if weights is None:
        training = given.training[length]
        loss = text_loss(setting.text.train, length, training.batch, setting.device)
        seconds = train(model, loss, training, seed, run, f"{name} at {length}, seed {seed}")
        run.save_weights({"model": model.state_dict(), "seconds": seconds})
    else:
        model.load_state_dict(weights["model"])
    return model


def run_one(
    name: str, length: int, seed: int, given: Extrapolation, setting: Setting, contestants: dict[str, Contestant]
) -> dict[str, Any]:
    """Trains and evaluates one contestant; the result, from its folder where it was finished before."""
    contestant = contestants[name]
    run = run_of(name, length, seed, given, setting)
    if run.result is not None:
        return run.result
    source = contestant.trained_as or name
    its_run = run_of(source, length, seed, given, setting)
    model = trained(source, contestants[source], given, setting, its_run)
    losses: dict[int, list[float]] = {}
    for n in tqdm(given.lengths, desc=f"{name} at {length}, evaluation", unit="length", leave=False, disable=None):
        if contestant.make_longer is not None:
            model.use(partial(contestant.make_longer, given.shape, length, n))
        text = setting.text.held_out
        losses[n] = losses_of(model, text, n, given.lengths, given.windows, given.scored, setting.device)
    weights = its_run.weights()
    assert weights is not None
    return run.finish(
        {
            "contestant": name,
            "train_length": length,
            "seed": seed,
            "parameters": sum(p.numel() for p in model.parameters()),
            "train_seconds": None if contestant.trained_as else weights["seconds"],
            "losses": losses,
        }
    )


def run_all(
    given: Extrapolation, names: Sequence[str], seeds: int, lengths: Sequence[int], setting: Setting
) -> list[dict[str, Any]]:
    """Every contestant, seed and training length; a line each as it is done."""
    results = []
    for length in lengths:
        for seed in range(seeds):
            for name in names:
                result = run_one(name, length, seed, given, setting, DECODERS)
                results.append(result)
                print(f"{name:12s} trained at {length}, seed {seed}: {perplexities(result)}", flush=True)
    return results


def perplexities(result: dict[str, Any]) -> str:
    means = {n: sum(losses) / len(losses) for n, losses in result["losses"].items()}
    return "  ".join(f"{n}: {torch.tensor(mean).exp().item():.2f}" for n, mean in means.items())
