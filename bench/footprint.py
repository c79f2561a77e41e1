"""The peak memory of one variant, in a process of its own: run as `python -m posattn.bench.footprint '<json>'`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from .cases import Case, Variant
from .memory import extra_peak
from .peers import contender

WARM_UP = 16  # tokens of a first call, so that imports and buffers that stay do not count


def measure(variant: Variant, case: Case, device: str, threads: int) -> float:
    """Megabytes that a call of `variant` adds at its peak, its results included. RuntimeError if it fails."""
    request = {"variant": asdict(variant), "case": _as_json(case), "device": device, "threads": threads}
    command = [sys.executable, "-m", "posattn.bench.footprint", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {variant.name} failed:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def _as_json(case: Case) -> dict[str, object]:
    return {key: value for key, value in asdict(case).items() if key not in ("variants", "targets")}


def _run(variant: Variant, case: Case, device: str, threads: int) -> float:
    torch.set_num_threads(threads)

    def prepared(shape: Case) -> Callable[[], None]:
        ready = contender(replace(variant, length=None), shape, device)

        def call() -> None:
            with torch.set_grad_enabled(shape.mode != "forward"):
                out = ready.forward()
                if shape.mode != "forward":
                    ready.backward(out)

        return call

    prepared(replace(case, q_len=WARM_UP, k_len=WARM_UP))()
    return extra_peak(prepared(case.shaped(variant)), device)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    shape = Case(variants=(), **asked["case"])
    print(_run(Variant(**asked["variant"]), shape, asked["device"], asked["threads"]))
