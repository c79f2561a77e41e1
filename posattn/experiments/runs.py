"""Runs that go on where they were: a folder with the settings, a line of JSON a step, checkpoints, and the result."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch


class OtherSettings(ValueError):
    """A folder that holds a run with other settings."""


class Run:
    """One model's training and evaluation, in `folder`.

    settings.json says what was asked, metrics.jsonl what was seen of each step, checkpoint.pt where training stands,
    weights.pt is the trained model, and result.json is there when all is done. A file is there whole or not at all.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        asked = json.loads(json.dumps({key: plain(value) for key, value in settings.items()}))
        self.settings = asked
        path = folder / "settings.json"
        if path.exists():
            held = json.loads(path.read_text())
            different = sorted(key for key in held.keys() | asked.keys() if held.get(key) != asked.get(key))
            if different:
                raise OtherSettings(
                    f"out: expected a folder without runs or with runs of these settings, got {folder}, whose "
                    f"{', '.join(different)} is different; choose another --out, or remove it"
                )
        else:
            _write(path, json.dumps(asked, indent=1).encode())

    @property
    def result(self) -> dict[str, Any] | None:
        """What `finish` was given, or None."""
        path = self.folder / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        _write(self.folder / "result.json", json.dumps(plain(result), indent=1).encode())
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)
        done = self.result
        assert done is not None
        return done

    def checkpoint(self) -> dict[str, Any] | None:
        """The last one saved, on the CPU, or None. Metrics of later steps are dropped: they will be made again."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        kept = [line for line in self.metrics() if line["step"] < state["step"]]
        _write(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept).encode())
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Keep `state`, which has a "step", to go on from."""
        self._save("checkpoint.pt", state)

    def save_weights(self, state: dict[str, Any]) -> None:
        self._save("weights.pt", state)

    def weights(self) -> dict[str, Any] | None:
        path = self.folder / "weights.pt"
        return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None

    def append(self, lines: list[dict[str, Any]]) -> None:
        """More lines of metrics, each with its "step"."""
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def start_anew(self) -> None:
        (self.folder / "metrics.jsonl").unlink(missing_ok=True)

    def metrics(self) -> Iterator[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:  # the last one, when it was being written
                return

    def _save(self, name: str, state: dict[str, Any]) -> None:
        partial = self.folder / f"{name}.partial"
        torch.save(state, partial)
        os.replace(partial, self.folder / name)


def plain(value: Any) -> Any:
    """What JSON can hold of it."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(data)
    os.replace(partial, path)
