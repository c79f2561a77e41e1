"""Rows of results, their CSV, and the targets judged against them."""

from __future__ import annotations

import csv
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import torch

from .cases import Case, Target


@dataclass(frozen=True)
class Row:
    """One variant of one case. Seconds of one call, `rate` in FLOP/s (bytes/s if `peak_kind` is read) beside `peak`,
    megabytes; nan where a row has no such figure."""

    case: str
    variant: str
    encoding: str
    peer: str
    mode: str
    dtype: str
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    causal: bool
    threads: int
    median: float = float("nan")
    p20: float = float("nan")
    p80: float = float("nan")
    rounds: int = 0
    rate: float = float("nan")
    peak_kind: str = ""
    peak: float = float("nan")
    share: float = float("nan")
    memory: float = float("nan")
    digest: str = ""


@dataclass(frozen=True)
class Verdict:
    case: str
    measure: str
    variant: str
    against: str
    value: float
    bound: float
    reached: bool

    def __str__(self) -> str:
        beside = f" beside {self.against}" if self.against else ""
        figure = f"{_figure(self.measure, self.value)}; wanted {_wanted(self.measure, self.bound)}"
        return f"{'reached' if self.reached else 'MISSED':9s}{self.variant}{beside}: {figure}"


def _figure(measure: str, value: float) -> str:
    """What was measured, in words: a time saved is no negative time."""
    if measure == "speed":
        return f"{value:.2f} times as fast"
    if measure == "cost":
        return f"{value:.2f} times the time"
    if measure == "share":
        return f"{100.0 * value:.1f} % of the measured peak"
    if measure == "overhead":
        return f"{1e6 * abs(value):.1f} us {'more' if value >= 0.0 else 'less'} a call"
    if measure == "growth":
        return f"{100.0 * value:.1f} % off the law"
    if measure == "bits":
        return "the same bits" if value else "other bits"
    return f"{value:.1f} MB"


def _wanted(measure: str, bound: float) -> str:
    if measure == "bits":
        return "the same bits"
    scale, unit = {
        "overhead": (1e6, " us more"),
        "share": (100.0, " %"),
        "memory": (1.0, " MB"),
        "growth": (100.0, " %"),
    }.get(measure, (1.0, ""))
    at_least = Target(measure, "", 0.0).at_least  # type: ignore[arg-type]
    return f"{'at least' if at_least else 'at most'} {scale * bound:g}{unit}"


def judge(case: Case, rows: Iterable[Row]) -> list[Verdict]:
    """A verdict for every target of `case` whose variants have rows."""
    by_name = {row.variant: row for row in rows}
    verdicts = []
    for target in case.targets:
        row, other = by_name.get(target.variant), by_name.get(target.against)
        if row is None or (target.against and other is None):
            continue
        value = _value(target, row, other)
        if value != value:  # no such figure here, as the share of a peak that could not be measured
            continue
        reached = value >= target.bound if target.at_least else value <= target.bound
        verdicts.append(
            Verdict(case.name, target.measure, target.variant, target.against, value, target.bound, reached)
        )
    return verdicts


def _value(target: Target, row: Row, other: Row | None) -> float:
    if target.measure == "share":
        return row.share
    if target.measure == "memory":
        return row.memory
    assert other is not None
    if target.measure == "speed":
        return other.median / row.median
    if target.measure == "cost":
        return row.median / other.median
    if target.measure == "overhead":
        return row.median - other.median
    if target.measure == "bits":
        return float(row.digest == other.digest)
    # growth: time goes with the square of the length, memory with the length
    ratio = row.q_len / other.q_len
    if row.memory == row.memory:
        return abs(row.memory / other.memory / ratio - 1.0)
    return abs(row.median / other.median / ratio**2 - 1.0)


def environment(device: str) -> dict[str, str]:
    """Columns that every row of a run shares: device, versions and commit."""
    return {
        "device": processor_name() if device == "cpu" else torch.cuda.get_device_name(),
        "posattn": version("posattn"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def processor_name() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def _commit() -> str:
    """The checkout's commit, with a plus sign if it was changed since; empty outside a checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


class Table:
    """A CSV that grows by a row at a time, so that a run cut short keeps what it has."""

    def __init__(self, path: Path, columns: type, shared: dict[str, str]) -> None:
        self.path, self.shared = path, shared
        with path.open("w", newline="") as file:
            csv.writer(file).writerow([*(field.name for field in fields(columns)), *shared])

    def write(self, row: Row | Verdict) -> None:
        values = [f"{v:.6g}" if isinstance(v, float) else v for v in asdict(row).values()]
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow([*values, *self.shared.values()])
