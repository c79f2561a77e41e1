"""Time and peak memory of one attention call, fused or naive, on the model's shape, in a process of its own.

Run as `python -m posattn.demo.measure '<json>'`; it prints one line of JSON. The parent calls `measure`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import posattn
from posattn.bench.memory import extra_peak
from posattn.demo.contestants import CONTESTANTS
from posattn.demo.model import Shape

REPEATS = 5
PATIENCE = 2.0  # seconds after which no further repeat of a slow call begins


@dataclass(frozen=True)
class Request:
    encoding: str
    length: int
    threads: int
    backend: str  # "reference" for the naive side


@dataclass(frozen=True)
class Cost:
    """Median seconds of a forward and of a forward with backward; megabytes over the inputs at the latter's peak."""

    forward: float
    both: float
    memory: float


def measure(request: Request) -> Cost:
    """Measure in a fresh process, whose peak memory is this call's alone."""
    command = [sys.executable, "-m", "posattn.demo.measure", json.dumps(asdict(request))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the measurement of {request.encoding} failed:\n{done.stderr}")
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def _run(request: Request) -> Cost:
    torch.manual_seed(0)
    torch.set_num_threads(request.threads)
    shape = Shape()
    encoding = CONTESTANTS[request.encoding](shape)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return posattn.attention(q, k, v, encoding, causal=True, backend=request.backend)

    def inputs(length: int) -> list[Tensor]:
        return [torch.randn(1, shape.heads, length, shape.head_dim, requires_grad=True) for _ in range(3)]

    def both(q: Tensor, k: Tensor, v: Tensor) -> None:
        attend(q, k, v).sum().backward()

    @torch.no_grad()
    def forward(q: Tensor, k: Tensor, v: Tensor) -> None:
        attend(q, k, v)

    both(*inputs(16))  # imports and first-call work stay out of what follows
    long = inputs(request.length)
    memory = extra_peak(lambda: both(*long))
    return Cost(_median_seconds(forward, long), _median_seconds(both, long), memory)


def _median_seconds(function: Callable[..., None], inputs: list[Tensor]) -> float:
    seconds: list[float] = []
    while len(seconds) < REPEATS and sum(seconds) < PATIENCE:
        start = time.perf_counter()
        function(*inputs)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    print(json.dumps(asdict(_run(Request(**json.loads(sys.argv[1]))))))
