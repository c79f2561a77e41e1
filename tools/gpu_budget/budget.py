"""The budget file: what every compiled configuration took when it was accepted, and what counts as worse.

Every figure in it is held. An entry that spills in its loops names its reason, one of reasons.json.
"""

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
REASONS = Path(__file__).with_name("reasons.json")
ANCHORS = Path(__file__).with_name("anchors.json")

# Another release of Triton schedules a loop a little differently; a real regression is larger than this.
_SLACK = 1.03
# By the same cause a thread takes a few registers more; hardware grants them by eight.
_REGISTERS = 8


def load() -> dict[str, Any]:
    """The accepted figures by configuration; empty before the first update."""
    return json.loads(PATH.read_text()) if PATH.exists() else {}


def reasons() -> dict[str, str]:
    """Why configurations may spill in their loops, by the name that entries give."""
    found: dict[str, str] = json.loads(REASONS.read_text())
    return found


def accept(name: str, figures: Figures, reason: str | None = None) -> None:
    """Puts one configuration into the file, with the reason for its spills in loops if it has any. Runs for other
    configurations may do so at the same time: the file is read again for each, and replaced whole. One configuration a
    line, sorted, so that a change of one shows as one line."""
    given = {"reason": reason} if reason is not None and figures.loop_spills else {}
    accepted = {**load(), name: entry(figures) | given}
    lines = [f"  {json.dumps(key)}: {json.dumps(accepted[key])}" for key in sorted(accepted)]
    fresh = PATH.with_suffix(f".{os.getpid()}.tmp")
    fresh.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    fresh.replace(PATH)


def unexcused(figures: Figures, reason: str | None) -> str | None:
    """In words, if a configuration spills in its loops and has no reason for it."""
    if not figures.loop_spills or reason in reasons():
        return None
    found = "its entry names no reason" if reason is None else f"reasons.json has no {reason!r}"
    return f"spills {figures.loop_spills} bytes in its loops, and {found}"


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
    most = {name: accepted[name] for name in ("spills", "loop_spills", "shared")}
    most["registers"] = accepted["registers"] + _REGISTERS
    # More tensor-core instructions for the same work are smaller ones, or work that is done again.
    most |= {name: accepted[name] * _SLACK for name in ("tensor", "two_phase", "overlap") if name in accepted}
    problems = [
        f"{name} {accepted[name]} -> {now[name]}"
        for name, limit in most.items()
        if now[name] is None or now[name] > limit
    ]
    if "blocks" in accepted and (now["blocks"] or 0) < accepted["blocks"]:
        problems.append(f"blocks on a multiprocessor {accepted['blocks']} -> {now['blocks']}")
    if accepted["tensor"] and not now["tensor"]:
        problems.append("no tensor-core instruction is left")
    return problems
