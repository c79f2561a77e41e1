"""Interleaved timing: A B C A B C ..., so that a machine whose speed drifts slows every contender alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

SHORTEST_SAMPLE = 2e-3  # seconds; a sample of a shorter call repeats it
MIN_ROUNDS = 3
MAX_ROUNDS = 40


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median and the 20th and 80th percentile of `rounds` samples."""

    median: float
    p20: float
    p80: float
    rounds: int

    @staticmethod
    def of(samples: list[float]) -> Timing:
        ordered = sorted(samples)
        at = [ordered[min(int(len(ordered) * share), len(ordered) - 1)] for share in (0.2, 0.8)]
        return Timing(statistics.median(ordered), at[0], at[1], len(ordered))


def interleave(calls: Mapping[str, Callable[[], object]], seconds: float, device: str) -> dict[str, Timing]:
    """Time every call in turn for about `seconds` together. A slow one leaves after three rounds."""
    repeats = {}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        repeats[name] = max(1, math.ceil(SHORTEST_SAMPLE / max(_sample(call, 1, device), 1e-9)))
    start = time.perf_counter()
    share = seconds / len(calls)
    for number in range(MAX_ROUNDS):
        for name, call in calls.items():
            if number < MIN_ROUNDS or sum(samples[name]) * repeats[name] < share:
                samples[name].append(_sample(call, repeats[name], device))
        if number + 1 >= MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
    return {name: Timing.of(values) for name, values in samples.items()}


def _sample(call: Callable[[], object], repeats: int, device: str) -> float:
    """Seconds of one call, averaged over `repeats` in a row; by events on a GPU."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e-3 / repeats
