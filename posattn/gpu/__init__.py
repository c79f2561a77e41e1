"""`posattn gpu`: the first hour on a GPU. Parity of every encoding on both backends, the sanitizer, tuning, times
beside SDPA, FlexAttention and flash-attn, and cycles beside the static model's, into one report.

A session ends after --minutes and the same command goes on with what is left. Whatever fails is reported with the
command that does it again, and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import posattn
from posattn.arguments import Parser
from posattn.backends.common.arch import architecture, processors
from posattn.gpu import report
from posattn.gpu.items import STAGES, Item, every
from posattn.gpu.session import DEFAULT_WORKER, Record, Worker, run
from posattn.gpu.worker import attempt


def main(argv: Sequence[str] | None = None, worker: Sequence[str] = DEFAULT_WORKER) -> int:
    """0 if all that was done is as it should be, 1 if something went wrong. `worker` is the command that does items."""
    parser = Parser(prog="posattn gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path("gpu-report"), help="folder of the report (%(default)s)")
    parser.add_argument("--minutes", type=float, default=25.0, help="of this session (%(default)s)")
    parser.add_argument("--only", help=f"stages or beginnings of items, comma between; stages are {', '.join(STAGES)}")
    parser.add_argument("--seconds", type=float, default=2.0, help="of one timing (%(default)s)")
    parser.add_argument("--retry", action="store_true", help="do again what failed in an earlier session")
    parser.add_argument("--item", help="do this one in this process, print what it finds, and stop")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    items = every()
    if given.item is not None:
        return _one(parser, given, items)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--report: expected a GPU that torch finds, got none (posattn info says more)")
    if given.only is not None:
        wanted = [part.strip() for part in given.only.split(",")]
        items = [item for item in items if any(item.name.startswith(part) for part in wanted)]
        if not items:
            parser.error(f"--only: expected stages ({', '.join(STAGES)}) or beginnings of items, got {given.only!r}")
    folder = parser.folder("--report", given.report)
    # Tiles that tuning chooses, and compiled kernels, stay with the report: the next session finds them.
    os.environ.setdefault("POSATTN_CACHE_DIR", str((folder / "cache").absolute()))
    record = Record(folder)
    if given.retry:
        record.found = {name: one for name, one in record.found.items() if one["state"] in ("done", "skipped")}
    process = Worker([*worker, given.device, str(given.seconds)], folder / "worker.log")
    left = run(items, record, process, 60.0 * given.minutes, lambda text: print(text, flush=True))
    path = report.write(folder, about(given.device), items, record.found)
    bad = [item for item in items if record.found.get(item.name, {}).get("state") in ("failed", "error")]
    rest = f"; {left} items are left, the same command goes on" if left else ""
    print(f"{len(items) - left} of {len(items)} items done, {len(bad)} went wrong{rest}. {path}")
    return 1 if bad else 0


def _one(parser: Parser, given: argparse.Namespace, items: list[Item]) -> int:
    if given.item not in {item.name for item in items}:
        parser.error(f"--item: expected an item of report.json, as in {items[0].name!r}, got {given.item!r}")
    found = attempt(Item(given.item), given.device, given.seconds)
    print(found.pop("traceback", ""), end="")
    print(json.dumps(found, indent=1))
    return 0 if found["state"] in ("done", "skipped") else 1


def about(device: str) -> dict[str, Any]:
    """The GPU, its driver and the versions at hand."""
    found: dict[str, Any] = {}
    if device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found = {"GPU": properties.name, "memory, GiB": round(properties.total_memory / 2**30)}
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    place = torch.device(device)
    return {
        **found,
        "architecture": architecture(place) if found else device,
        "multiprocessors": processors(place) if found else 0,
        "CUDA": torch.version.cuda,
        "posattn": posattn.__version__,
        "torch": torch.__version__,
        "triton": triton,
        "Python": platform.python_version(),
    }
