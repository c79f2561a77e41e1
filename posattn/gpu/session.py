"""A session on a GPU: items in turn, by a worker that is replaced when it dies, within the time given."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from posattn.gpu.items import SHARES, STAGES, Item

DEFAULT_WORKER = (sys.executable, "-m", "posattn.gpu.worker")


class Worker:
    """A process that does items. It is started when there is one to do, and anew after it died or was too slow."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.command, self.log = list(command), log
        self.process: subprocess.Popen[str] | None = None

    def do(self, item: Item, limit: float) -> dict[str, Any]:
        """What it answers, or what became of it, within `limit` seconds."""
        if self.process is None:
            with self.log.open("a") as log:
                self.process = subprocess.Popen(
                    self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
                )
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(item.name + "\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], limit)
            line = process.stdout.readline() if ready else ""
        except BrokenPipeError:
            ready, line = [process.stdout], ""
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        self.close()
        if not ready:
            return {"state": "error", "why": f"no answer within {limit:.0f} s; its process was stopped"}
        return {"state": "error", "why": f"its process ended with {process.returncode}; worker.log says more"}

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class Record:
    """items.jsonl in a folder: what was found, a line an item, so that a session goes on where the last one was."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "items.jsonl"
        self.found: dict[str, dict[str, Any]] = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                one = json.loads(line)
            except json.JSONDecodeError:  # cut short when a machine was taken away
                continue
            self.found[one["item"]] = one

    def add(self, item: Item, found: dict[str, Any], seconds: float) -> None:
        self.found[item.name] = {"item": item.name, **found, "seconds": seconds}
        with self.path.open("a") as file:
            file.write(json.dumps(self.found[item.name]) + "\n")


def in_turn(items: Sequence[Item], seconds: float, clock: Callable[[], float]) -> Iterator[Item]:
    """The items by stage, each stage for its share of `seconds`, then those that are left, until the time is over."""
    start = clock()
    left: list[Item] = []
    used = 0.0
    for stage in STAGES:
        mine = [item for item in items if item.stage == stage]
        used += SHARES[stage] * seconds  # what an earlier stage did not use, this one may
        while mine and clock() - start < used:
            yield mine.pop(0)
        left += mine
    while left and clock() - start < seconds:
        yield left.pop(0)


def run(
    items: Sequence[Item],
    record: Record,
    worker: Worker,
    seconds: float,
    note: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Does what is not in the record yet, for about `seconds`; how many items are left."""
    todo = [item for item in items if item.name not in record.found]
    start = clock()
    try:
        for item in in_turn(todo, seconds, clock):
            began = clock()
            found = worker.do(item, min(item.limit, max(start + seconds - began, 1.0) + 30.0))
            record.add(item, found, clock() - began)
            if found["state"] in ("failed", "error"):
                why = found.get("why") or "; ".join(found.get("wrong", ["see items.jsonl"]))
                note(f"{found['state'].upper()} {item.name}: {why.splitlines()[-1]}\n  again: {again(item)}")
            else:
                note(f"{found['state']:8}{item.name}")
    finally:
        worker.close()
    return sum(item.name not in record.found for item in items)


def again(item: Item) -> str:
    """The command that does an item by itself, with its whole traceback."""
    return f"python -m posattn.gpu --item '{item.name}'"
