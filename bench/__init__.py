"""`posattn bench`: posattn beside its peers on this machine, parity first, every row with its share of the peak.

results.csv has a row for every variant of every case, targets.csv a row for every figure to reach; the plots are drawn
from the first. On a GPU the same cases time the GPU backends.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

import torch
from tqdm import tqdm

from posattn.arguments import Parser, positive

from . import cases, encodings
from .cases import Case
from .report import Row, Table, Verdict, environment, judge


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="posattn bench", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="all encodings, dtypes, modes and lengths up to 32768; hours")
    size.add_argument("--quick", action="store_true", help="tiny shapes: does everything run?")
    parser.add_argument("--cases", default="*", help="names or patterns, comma between (default: all)")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="on a CPU (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="folder of the results (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a GPU that torch finds, got none (posattn info says more)")
    if not arguments.list:
        parser.folder("--out", arguments.out)
    return run(arguments)


def run(arguments: argparse.Namespace) -> int:
    """The chosen cases; 0 when all were timed, 1 if posattn failed parity, 2 if no case has such a name."""
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = _choose(arguments, device)
    if not chosen:
        print(f"--cases: expected names or patterns of cases (see --list), got {arguments.cases!r}", file=sys.stderr)
        return 2
    if arguments.list:
        print("\n".join(case.name for case in chosen))
        return 0

    from .plots import plot_all  # matplotlib is asked for only here
    from .runner import ParityError, run_case

    start = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    shared = environment(device)
    results = Table(arguments.out / "results.csv", Row, shared)
    targets = Table(arguments.out / "targets.csv", Verdict, shared)
    print(", ".join(f"{key} {value}" for key, value in shared.items() if value))
    verdicts: list[Verdict] = []
    failures: list[str] = []
    bar = tqdm(chosen, unit="case", leave=False, disable=None)  # None: off a terminal, its lines would be a file's
    for case in bar:
        bar.set_description(case.name)
        try:
            rows = run_case(case, device, arguments.threads, tqdm.write)
        except ParityError as error:
            failures.append(str(error))
            tqdm.write(f"PARITY {error}")
            continue
        judged = judge(case, rows)
        for row in rows:
            results.write(row)
        for verdict in judged:
            targets.write(verdict)
        verdicts += judged
        tqdm.write("\n".join([_heading(case), *map(_line, rows), *map(str, judged), ""]))
    plot_all(results.path, arguments.out)
    reached = sum(verdict.reached for verdict in verdicts)
    targets_reached = f"{reached} of {len(verdicts)} targets reached, " if verdicts else ""
    print(f"{targets_reached}{time.perf_counter() - start:.0f} s in all; see {arguments.out}/")
    for failure in failures:
        print(f"PARITY {failure}", file=sys.stderr)
    return 1 if failures else 0


def _choose(arguments: argparse.Namespace, device: str) -> list[Case]:
    every = cases.standard()
    if arguments.quick:
        every = cases.quick()
    if arguments.full:
        every += cases.sweep(encodings.names(), cases.LENGTHS)
    patterns = [pattern.strip() for pattern in arguments.cases.split(",")]
    chosen = [case for case in every if any(fnmatch(case.name, pattern) for pattern in patterns)]
    return [cases.on_gpu(case) for case in chosen] if device == "cuda" else chosen


def _heading(case: Case) -> str:
    heads = f"H={case.heads}" + (f" Hkv={case.kv_heads}" if case.kv_heads else "")
    shape = f"B={case.batch} {heads} Tq={case.q_len} Tk={case.k_len} D={case.head_dim}"
    return f"{case.name}: {case.mode}, {case.dtype}, {shape}, {'causal' if case.causal else 'full'}"


def _line(row: Row) -> str:
    if row.memory == row.memory:
        return f"  {row.variant:32s}{row.memory:10.1f} MB"
    spread = f"({1e3 * row.p20:.3f} to {1e3 * row.p80:.3f}, {row.rounds} rounds)"
    unit = "GB/s" if row.peak_kind == "read" else "GFLOP/s"
    share = f"{100 * row.share:5.1f} % of {row.peak_kind}" if row.share == row.share else ""
    return f"  {row.variant:32s}{1e3 * row.median:10.3f} ms {spread:34s}{1e-9 * row.rate:8.1f} {unit:8s}{share}"
