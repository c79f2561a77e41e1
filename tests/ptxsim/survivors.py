"""The mutants that no test can notice, and why: survivors.json, against which mutate.py holds what it finds.

A survivor is known by its kernel, its change (with the registers' numbers left out) and the line of the package's
source that its instruction comes from (the caller's, for what only wraps an instruction), so the table outlives a
change of other lines; a count says how many mutants look so. Each names one of the table's reasons, which a person
found by reading the PTX around it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from .mutants import Mutant

_PATH = Path(__file__).with_name("survivors.json")
_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = (_ROOT / "kernels", _ROOT / "csrc" / "cuda")
_FILE = re.compile(r"\s*\.file\s+(\d+)\s+\"([^\"]*)\"")
_LOCATION = re.compile(r"\s*\.loc\s+(\d+) (\d+) \d+(?:,.*inlined_at (\d+) (\d+))?")

Signature = tuple[str, str, str]


def _place(ptx: list[str], line: int) -> str:
    """The text of the kernel's source line that a PTX line comes from; "" where the PTX does not say."""
    files = {found[1]: Path(found[2]) for found in map(_FILE.match, ptx) if found}
    for text in reversed(ptx[:line]):
        found = _LOCATION.match(text)
        for file, number in ((found[1], found[2]), (found[3], found[4])) if found else ():
            source = files.get(file, Path())
            folder = next((folder for folder in _SOURCES if source.is_relative_to(folder)), None)
            if folder and folder / "ptx" not in source.parents and int(number) > 0:
                written = source.read_text().splitlines()[int(number) - 1].strip()
                return f"{source.relative_to(folder).as_posix()}: {written}"
    return ""


def signature(mutant: Mutant, ptx: str) -> Signature:
    """How the table knows a mutant of `ptx`: kind, change, place."""
    change = re.sub(r"%(\w+?)\d+", r"%\1", re.sub(r"\s+", " ", mutant.change))
    return mutant.kind, change, _place(ptx.split("\n"), mutant.line)


def _name(scenario: str, arch: int, kernel: str) -> str:
    return f"{scenario}, sm_{arch}, {kernel}"


def _load() -> dict[str, dict[str, object]]:
    return json.loads(_PATH.read_text())  # type: ignore[no-any-return]


def scenarios() -> list[tuple[str, int]]:
    """The (scenario, architecture) pairs whose survivors have been examined."""
    names = [name.split(", ") for name in _load()["kernels"]]
    return sorted({(scenario, int(arch.removeprefix("sm_"))) for scenario, arch, _ in names})


def known(scenario: str, arch: int, kernel: str) -> dict[Signature, tuple[int, str]]:
    """The examined survivors of a kernel: how many of each, and the reason in words."""
    table = _load()
    rows: Iterable[list[str]] = table["kernels"].get(_name(scenario, arch, kernel), [])  # type: ignore[assignment]
    reasons = table["reasons"]
    return {(kind, change, place): (int(count), str(reasons[why])) for kind, change, place, count, why in rows}


def unexplained(scenario: str, arch: int, kernel: str, found: Iterable[Signature]) -> Counter[Signature]:
    """The survivors that the table does not account for."""
    accepted = Counter({signature: count for signature, (count, _) in known(scenario, arch, kernel).items()})
    return Counter(found) - accepted
