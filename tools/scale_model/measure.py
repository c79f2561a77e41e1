"""The model against processes of gloo on this machine: rates and links from single calls and messages, and what whole
calls take beside what the model says of them."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import posattn
from posattn import distributed
from posattn.distributed.cost import METHODS, Link, Machine, Work, cost
from posattn.distributed.group import Ring, group_of

ROOT = Path(__file__).resolve().parents[2]
HEADS, DIM = 4, 64


def check(ranks: int, lengths: list[int], rounds: int) -> list[dict[str, Any]]:
    """Rows of measured and modelled seconds, forward and backward, one thread a process."""
    with tempfile.TemporaryDirectory() as folder:
        job = json.dumps({"lengths": lengths, "rounds": rounds})
        own = [sys.executable, "-m", "tools.scale_model.measure", folder, str(ranks), job]
        processes = [subprocess.Popen([*own, str(rank)], cwd=ROOT) for rank in range(ranks)]
        codes = [process.wait(timeout=1200) for process in processes]
        if any(codes):
            raise RuntimeError(f"processes ended with {codes}")
        rows: list[dict[str, Any]] = json.loads((Path(folder) / "rows.json").read_text())
    return rows


def _leaves(tokens: int) -> list[torch.Tensor]:
    torch.manual_seed(tokens)
    return [torch.randn(1, HEADS, tokens, DIM, requires_grad=True) for _ in range(3)]


def _seconds(run: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    run()
    # What the slowest rank takes, as the model has it.
    took = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return took.item()


def _both(function: Callable[..., Any], tokens: int, **options: Any) -> Callable[[], None]:
    leaves = _leaves(tokens)

    def run() -> None:
        function(*leaves, None, **options).sum().backward()

    return run


def _forward(tokens: int) -> Callable[[], None]:
    leaves = _leaves(tokens)

    def run() -> None:
        with torch.no_grad():
            posattn.attention(*leaves)

    return run


def _message(size: int) -> Callable[[], None]:
    """As a ring's step: every rank sends `size` bytes to the next."""
    data = torch.zeros(max(size // 4, 1))
    ring = Ring(group_of(None))

    def run() -> None:
        ring.start([data]).wait()

    return run


def _rank(folder: Path, ranks: int, job: dict[str, Any], rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    rows = []
    for tokens in job["lengths"]:
        shard = tokens // ranks
        runs: dict[str, Callable[[], None]] = {
            "small": _both(posattn.attention, 16),
            # The shape of a ring's blocks: a piece of queries against a piece of keys, all of which they see.
            "forward": _forward(shard // 2),
            "both": _both(posattn.attention, shard // 2),
            "latency": _message(1),
            "message": _message(shard * HEADS * 2 * DIM * 4),
        }
        for method in METHODS:
            function = getattr(distributed, f"{method}_attention")
            runs[method] = _both(function, shard, causal=True)
        alone = _both(posattn.attention, tokens, causal=True)
        runs["one process"] = alone if rank == 0 else lambda: None
        for run in runs.values():
            _seconds(run)  # pages, thread pools, connections
        found: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(job["rounds"]):
            for name, run in runs.items():
                found[name].append(_seconds(run))
        # What other work on the machine adds is no part of the model: the least.
        took = {name: min(times) for name, times in found.items()}
        piece = 2.0 * (shard // 2) ** 2 * HEADS * 2 * DIM
        call = took["small"] / 2
        size = shard * HEADS * 2 * DIM * 4
        machine = Machine(
            rate=piece / max(took["forward"] - call, 1e-9),
            call=call,
            backward_rate=2.5 * piece / max(took["both"] - took["forward"] - call, 1e-9),
        )
        link = Link(took["latency"], size / max(took["message"] - took["latency"], 1e-9))
        for method in METHODS:
            work = Work(ranks, 1, HEADS, HEADS, tokens, DIM, DIM, element=4)
            modelled = cost(method, work, link, machine)
            row = {"ranks": ranks, "tokens": tokens, "method": method, "measured": took[method]}
            row |= {"modelled": modelled.seconds, "links": modelled.links, "one process": took["one process"]}
            row |= {"gflops": machine.rate / 1e9, "MB/s": link.bandwidth / 1e6}
            rows.append(row)
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4]))
