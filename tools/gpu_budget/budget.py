"""The budget file: what every compiled configuration took when it was accepted, and what counts as worse."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posattn.backends.common.arch import shared_memory

from .measure import Figures

PATH = Path(__file__).with_name("budget.json")
DEBTS = Path(__file__).with_name("debts.json")
ANCHORS = Path(__file__).with_name("anchors.json")

# Another release of Triton schedules a loop a little differently; a real regression is larger than this.
_SLACK = 1.03
_MODELLED = ("two_phase", "overlap")


def load() -> dict[str, Any]:
    """The accepted figures by configuration; empty before the first update."""
    return json.loads(PATH.read_text()) if PATH.exists() else {}


def accept(name: str, figures: Figures) -> None:
    """Puts one configuration into the file. Runs for other configurations may do so at the same time: the file is read
    again for each, and replaced whole. One configuration a line, sorted, so that a change of one shows as one line."""
    accepted = {**load(), name: entry(figures)}
    lines = [f"  {json.dumps(key)}: {json.dumps(accepted[key])}" for key in sorted(accepted)]
    fresh = PATH.with_suffix(f".{os.getpid()}.tmp")
    fresh.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    fresh.replace(PATH)


def debt(name: str) -> str | None:
    """Why a configuration may spill in its loops: the reason of the first pattern of debts.json that its name holds."""
    for pattern, reason in json.loads(DEBTS.read_text()).items():
        if re.search(pattern, name):
            return str(reason)
    return None


def too_large(name: str, shared: int) -> str | None:
    """In words, if a block of this configuration needs more shared memory than its architecture has."""
    arch = re.search(r"\b(sm_\d+|gfx\w+)\b", name)
    limit = shared_memory(arch[0] if arch else name).block
    return f"needs {shared} bytes of shared memory, and a block can have {limit}" if shared > limit else None


def entry(figures: Figures) -> dict[str, Any]:
    """What is kept of a measurement."""
    return {name: value for name, value in figures.as_json().items() if name != "pipes" and value is not None}


def worse(figures: Figures, accepted: Mapping[str, Any]) -> list[str]:
    """In words, everything that got worse than what was accepted."""
    now = figures.as_json()
    problems = []
    for name in ("spills", "loop_spills", "shared"):
        if now[name] > accepted[name]:
            problems.append(f"{name} {accepted[name]} -> {now[name]}")
    if "blocks" in accepted and (now["blocks"] or 0) < accepted["blocks"]:
        problems.append(f"blocks on a multiprocessor {accepted['blocks']} -> {now['blocks']}")
    if accepted["tensor"] and not now["tensor"]:
        problems.append("no tensor-core instruction is left")
    for name in _MODELLED:
        if name in accepted and (now[name] is None or now[name] > accepted[name] * _SLACK):
            problems.append(f"{name} {accepted[name]} -> {now[name]}")
    return problems
