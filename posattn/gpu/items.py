"""What is looked at on a GPU: items, each by a name that says how to do it again, in the order of their turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from posattn.encodings.base import Context, Encoding
from posattn.parity import examples

STAGES = ("parity", "options", "sanitizer", "tuning", "bench", "cycles")
# Of the time, what a stage may take before the next has its turn; what is left goes to whoever is not done.
SHARES = {"parity": 0.35, "options": 0.10, "sanitizer": 0.10, "tuning": 0.15, "bench": 0.20, "cycles": 0.10}
LIMITS = {"parity": 120.0, "options": 120.0, "sanitizer": 240.0, "tuning": 180.0, "bench": 120.0, "cycles": 120.0}

HEADS, HEAD_DIM = 4, 64
QUERIES, KEYS = 200, 333  # several tiles of every configuration, and a remainder
BACKENDS = ("cuda", "triton")
DTYPES = ("bfloat16", "float16", "float32")

# Options beside an encoding that has every operand by distance.
OPTIONS = (
    "full",
    "window",
    "softcap",
    "sinks",
    "dropout",
    "mask",
    "bias",
    "documents",
    "lengths",
    "starts",
    "offset",
    "deterministic",
    "grouped",
    "one query",
    "dim 128",
    "dim 256",
    "values wider",
)
SANITIZED = (("memcheck", "ALiBi"), ("racecheck", "Kerple"), ("memcheck", "DAPE-Kerple"), ("initcheck", "FIRE"))
TUNED = ("none", "ALiBi", "Kerple", "FIRE")
BENCHED = ("none", "RoPE", "ALiBi", "Kerple", "FIRE", "DAPE-Kerple")
LENGTHS = (2048, 8192)
DIMS = (64, 128)


@dataclass(frozen=True)
class Item:
    """One thing to do, in at most `limit` seconds. `name` is stage/part/...; parts hold no slash."""

    name: str

    @property
    def stage(self) -> str:
        return self.name.split("/")[0]

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.name.split("/")[1:])

    @property
    def limit(self) -> float:
        return LIMITS[self.stage]


def every() -> list[Item]:
    """All items, those that are likeliest to be wrong first in each stage."""
    return [Item("/".join((stage, *parts))) for stage in STAGES for parts in _parts(stage)]


def _parts(stage: str) -> Iterator[tuple[str, ...]]:
    if stage == "parity":
        names = sorted(catalogue(), key=lambda name: -risk(catalogue()[name]))
        for dtype in DTYPES:
            for name in names:
                for backend in BACKENDS if dtype != "float32" else BACKENDS[1:]:
                    yield backend, dtype, name
    elif stage == "options":
        yield from ((backend, "bfloat16", option) for option in OPTIONS for backend in BACKENDS)
    elif stage == "sanitizer":
        yield from ((tool, backend, name) for tool, name in SANITIZED for backend in BACKENDS)
    elif stage == "tuning":
        yield from ((mode, str(dim), name) for mode in ("forward", "both") for dim in DIMS for name in TUNED)
    elif stage == "bench":
        for length in LENGTHS:
            for dim in DIMS:
                yield from ((mode, str(length), str(dim), name) for mode in ("forward", "both") for name in BENCHED)
    else:
        operands = ("plain", "slope", "table", "profile", "rotary")
        for backend in BACKENDS:
            for mode in ("forward", "backward"):
                yield from ((backend, mode, str(dim), operand) for dim in DIMS for operand in operands)


def catalogue() -> dict[str, Encoding | None]:
    """ "none" and every encoding's examples, by name."""
    return {"none": None, **examples(HEADS, HEAD_DIM, KEYS)}


def risk(position: Encoding | None) -> int:
    """How much of what is hard to get right a call uses: mixes, profiles, dense biases, tables, slopes, rotations."""
    if position is None:
        return 0
    positions = torch.arange(16)[None] // 3 if position.needs_positions else None
    context = Context(
        q_len=16,
        k_len=16,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        device=torch.device("cpu"),
        dtype=torch.float32,
        q_positions=positions,
        k_positions=positions,
    )
    plan = position.lower(context)
    biases = [plan.bias, *([] if plan.mix is None else [plan.mix.inner])]
    of_operand = {"profile": 8, "dense": 6, "table": 4, "slope": 2}
    found = sum(cost for bias in biases for name, cost in of_operand.items() if getattr(bias, name) is not None)
    return found + 16 * (plan.mix is not None) + (plan.rotary is not None)
