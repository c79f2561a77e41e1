"""Tokens a second of training steps and of long evaluations, fused and eager, interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from posattn.demo.model import BYTES
from posattn.experiments.contestants import DECODERS
from posattn.experiments.model import Transformer
from posattn.experiments.presets import Extrapolation

REPEATS = 5
PATIENCE = 20.0  # seconds after which no further repeat of a pair begins


def tokens_per_second(
    given: Extrapolation, train_length: int, long: int, names: Sequence[str], backend: str, device: str
) -> list[dict[str, Any]]:
    """For each contestant, medians of a training step at `train_length` and of reading `long` tokens, by posattn and by
    plain PyTorch ("eager"), whose calls take turns."""
    rows = []
    for name in names:
        if DECODERS[name].trained_as is not None:
            continue
        row: dict[str, Any] = {"contestant": name}
        models = {
            side: Transformer(given.shape, BYTES, None, DECODERS[name], train_length, True, seed=0, backend=choice).to(
                device
            )
            for side, choice in (("fused", backend), ("eager", "reference"))
        }
        batch = given.training[train_length].batch
        for what, n, tokens in (("train", train_length, batch), ("read", long, 1)):
            given_tokens = torch.randint(BYTES, (tokens, n + 1), device=device)
            seconds = interleaved({side: _work(model, given_tokens, what) for side, model in models.items()}, device)
            row |= {f"{what} {side}": tokens * n / value for side, value in seconds.items()}
        rows.append(row)
    return rows


def _work(model: Transformer, tokens: torch.Tensor, what: str) -> Callable[[], None]:
    def train() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()

    @torch.no_grad()
    def read() -> None:
        model(tokens[:, :-1], 1)

    return train if what == "train" else read


def interleaved(work: dict[str, Callable[[], None]], device: str) -> dict[str, float]:
    """Median seconds of each, one after the other in turns, after one call of each that is not counted."""
    seen: dict[str, list[float]] = {side: [] for side in work}
    began = time.perf_counter()
    for repeat in range(REPEATS + 1):
        for side, function in work.items():
            start = time.perf_counter()
            function()
            if device != "cpu":
                torch.cuda.synchronize()
            if repeat:
                seen[side].append(time.perf_counter() - start)
        if repeat and time.perf_counter() - began > PATIENCE:
            break
    return {side: statistics.median(values) for side, values in seen.items()}
