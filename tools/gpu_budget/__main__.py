"""Compile what the package can launch, for GPUs that need not be here, and hold the machine code to the budget file.

    python -m tools.gpu_budget table --arch sm_80 --match "slope, D = 64, bfloat16"
    python -m tools.gpu_budget check            # exit status 1 on a regression
    python -m tools.gpu_budget update --arch sm_90

Triton's configurations come from shipped.py, CUDA's from the calls in cuda.py. A full run compiles several hundred
kernels: hours on two cores the first time, minutes when the caches hold them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from typing import Any

import torch

from posattn.backends.cuda.compiler import CompileError
from tools.gpu_budget.shipped import Shipped, shipped

from . import budget, cuda
from .cuda import Noted
from .measure import Figures, measure

TRITON_ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
ARCHITECTURES = (*cuda.ARCHITECTURES, "gfx942")


def name_of(launch: Shipped) -> str:
    """A launch's key in the budget file."""
    return f"{launch.arch}, {launch.kernel.__name__}, {launch.label}"


def _argument(arg: Any) -> Any:
    if isinstance(arg, tuple):
        return [_argument(member) for member in arg]
    return str(arg.dtype) if isinstance(arg, torch.Tensor) else repr(arg)


def _what_is_compiled(launch: Shipped) -> str:
    args = [_argument(arg) for arg in launch.args]
    return repr((args, sorted(launch.constexprs.items()), launch.num_warps, launch.num_stages, launch.registers))


def selected(architectures: list[str], match: str) -> list[tuple[str, Shipped]]:
    """The configurations to compile, by name; `match` must be part of the name."""
    found: dict[str, tuple[str, Shipped]] = {}
    for launch in shipped(architectures):
        name, compiled = name_of(launch), _what_is_compiled(launch)
        while name in found and found[name][0] != compiled:  # one call may launch a kernel in several forms
            name += "'"
        if match in name:
            found[name] = compiled, launch
    return [(name, launch) for name, (_, launch) in found.items()]


def _measured(architectures: list[str], match: str, number: int) -> Figures | str:
    """Runs in a worker, which makes the list again: launches hold compiled functions and do not travel."""
    launch = selected(architectures, match)[number][1]
    parts = (launch.kernel, launch.args, launch.constexprs, launch.num_warps, launch.num_stages, launch.registers)
    try:
        return measure(launch.arch, *parts)
    except Exception as error:  # a configuration that does not compile is a finding of this tool, whatever raised it
        return f"{type(error).__name__}: {error}".split("\n")[0]


def measure_all(architectures: list[str], match: str, jobs: int) -> Iterator[tuple[str, Figures | str]]:
    """Figures by name, in order; a string says why a configuration does not compile."""
    names = [name for name, _ in selected(architectures, match)]
    if jobs == 1:
        for i, name in enumerate(names):
            yield name, _measured(architectures, match, i)
        return
    with ProcessPoolExecutor(jobs) as pool:
        work = [pool.submit(_measured, architectures, match, i) for i in range(len(names))]
        for name, future in zip(names, work, strict=True):
            yield name, future.result()


def measure_cuda(architectures: list[str], match: str) -> Iterator[tuple[str, Figures | str]]:
    """The same for the CUDA kernels, forward and backward passes and decoding, on NVIDIA's architectures."""
    for arch in architectures:
        for case in cuda.cases() if arch.startswith("sm_") else ():
            if match not in f"CUDA, {arch}, {case.label}":
                continue
            seen: dict[str, Noted] = {}
            try:
                launches = _cuda_launches(case, arch)
            except CompileError as error:
                yield f"CUDA, {arch}, {case.label}", str(error)
                continue
            for noted in launches:
                name = f"CUDA, {arch}, {case.label}, {noted.kernel.name}"
                while name in seen and seen[name].constants != noted.constants:  # one call may launch several forms
                    name += "'"
                if name not in seen:
                    seen[name] = noted
                    yield name, cuda.figures(noted, arch)


def _cuda_launches(case: cuda.Case, arch: str) -> list[Noted]:
    try:
        return cuda.launches(case, arch, backward=not (case.decode or case.page))
    except ValueError:  # the backward kernel says that it cannot run here; Triton's will
        return cuda.launches(case, arch)


def row(name: str, figures: Figures) -> str:
    """One line of the table."""
    pipes = "/".join(str(figures.pipes[pipe]) for pipe in ("mufu", "fma", "alu", "issue")) if figures.pipes else ""
    modelled = f"{figures.two_phase} ({pipes})" if figures.two_phase else ""
    blocks = "" if figures.blocks is None else figures.blocks
    spills = f"{figures.spills} ({figures.loop_spills})"
    columns = (name, figures.registers, spills, figures.shared, blocks, figures.tensor, modelled, figures.overlap or "")
    return "| " + " | ".join(str(column) for column in columns) + " |"


def print_table(results: Iterator[tuple[str, Figures | str]], architectures: list[str]) -> int:
    columns = "configuration", "registers", "spills (in loops), B", "shared, B", "blocks", "tensor instructions"
    columns += "two-phase (mufu/fma/alu/issue)", "overlap"
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    failed = 0
    for name, figures in results:
        failed += isinstance(figures, str)
        print(f"| {name} | {figures} |" if isinstance(figures, str) else row(name, figures), flush=True)
    for anchor in json.loads(budget.ANCHORS.read_text())["anchors"]:
        if anchor["arch"] in architectures:
            name = f"anchor: {anchor['arch']}, {anchor['kernel']}, D = {anchor['D']}"
            print(f"| {name} | | | | | | {anchor['two_phase']} | |")
    return int(failed > 0)


def check(results: Iterator[tuple[str, Figures | str]], whole: bool = False) -> int:
    """Regressions, and spills in loops that no reason excuses, make the exit status 1; excused ones are counted. With
    `whole`, results are all there is, so that an entry without one is out of date."""
    accepted = budget.load()
    stale = set(accepted)
    failures, count = 0, 0
    excused: Counter[str] = Counter()
    for name, figures in results:
        count += 1
        stale.discard(name)
        if isinstance(figures, str):
            problems = [f"does not compile: {figures}"]
        elif name not in accepted:
            problems = ["is not in the budget file; run update after looking at its figures"]
        else:
            problems = budget.worse(figures, accepted[name])
        if isinstance(figures, Figures):
            reason = accepted.get(name, {}).get("reason")
            found = budget.too_large(name, figures.shared), budget.unexcused(figures, reason)
            problems += [problem for problem in found if problem]
            if figures.loop_spills and not found[1]:
                excused[reason] += 1
        failures += bool(problems)
        for problem in problems:
            print(f"{name}: {problem}", flush=True)
    for reason, times in excused.items():
        print(f"{times} spill in their loops: {budget.reasons()[reason]}")
    for name in sorted(stale) if whole else ():
        print(f"{name}: is in the budget file, but is launched no more")
    print(f"{count - failures} of {count} configurations within budget")
    return int(failures > 0 or (whole and bool(stale)))


def update(results: Iterator[tuple[str, Figures | str]], given: str | None = None) -> int:
    """Accepts what compiles and fits. A configuration that spills in its loops keeps its reason; without one it takes
    the one that is given, or is refused."""
    accepted, failed = budget.load(), 0
    for name, figures in results:
        if isinstance(figures, str):
            failed += 1
            print(f"{name}: does not compile: {figures}", flush=True)
            continue
        reason = accepted.get(name, {}).get("reason", given)
        if problem := budget.too_large(name, figures.shared) or budget.unexcused(figures, reason):
            failed += 1
            print(f"{name}: {problem}", flush=True)
        else:
            budget.accept(name, figures, reason)
    return int(failed > 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_budget", description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("table", "check", "update"))
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="may be repeated (default: all)")
    parser.add_argument("--backend", choices=("triton", "cuda"), help="only its kernels (default: both)")
    parser.add_argument("--match", default="", help="only configurations whose name holds this")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--reason", help="of reasons.json, with update: why configurations without one spill in loops")
    given = parser.parse_args()
    architectures = given.arch or list(ARCHITECTURES)
    results: Iterator[tuple[str, Figures | str]] = iter(())
    if given.backend != "cuda":
        results = measure_all([arch for arch in architectures if arch in TRITON_ARCHITECTURES], given.match, given.jobs)
    if given.backend != "triton":
        results = chain(results, measure_cuda(architectures, given.match))
    if given.action == "table":
        return print_table(results, architectures)
    whole = not (given.arch or given.backend or given.match)
    return check(results, whole) if given.action == "check" else update(results, given.reason)


if __name__ == "__main__":
    sys.exit(main())
