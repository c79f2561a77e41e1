"""Mutation testing of GPU kernels: break a kernel's PTX in small ways and see whether anything notices.

    python -m tests.ptxsim.mutate attention --arch 80
    python -m tests.ptxsim.mutate forward_slope --arch 90 --kinds sync,mask --limit 60

A scenario (tests/ptxsim/scenarios.py) is run once to see which kernels it launches; then once for every mutant of them.
A mutant is caught by the machine (a finding or a fault) or by the numbers; the others are listed, for a person to show
equivalent (survivors.json) or to write the missing test. The exit status is 1 if one survived that is not listed there.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from .cuda_run import CompiledCuda, source_lines
from .kernel import Fault, Findings, Kernel, Options, Unsupported
from .mutants import KINDS, Mutant, mutants
from .scenarios import SCENARIOS, Scenario
from .seam import Launched, Machine, behind_launch
from .survivors import Signature, signature, unexplained
from .triton_run import Compiled

_SEEDS = (1, 3, 4)
_BLOCKS_WAIT = re.compile(r"\b(?:ld\.acquire|ld\.volatile|atom\.)")


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: caught by "machine" or "numbers", or "survived"."""

    kernel: str
    mutant: Mutant
    caught_by: str
    detail: str
    signature: Signature


@contextmanager
def _in_place(compiled: Compiled | CompiledCuda, ptx: str) -> Iterator[None]:
    original = compiled.kernel
    compiled.kernel = Kernel(ptx, original.name)
    try:
        yield
    finally:
        compiled.kernel = original


def _judge(
    scenario: Scenario, compiled: Compiled | CompiledCuda, mutant: Mutant, arch: int, options: Options
) -> tuple[str, str]:
    # Races inside a block are found on any schedule; whether one block catches up with another depends on it.
    for seed in _SEEDS if _BLOCKS_WAIT.search(mutant.ptx) else _SEEDS[:1]:
        try:
            with (
                _in_place(compiled, mutant.ptx),
                behind_launch(arch, dataclasses.replace(options, seed=seed)) as machine,
            ):
                scenario.run(machine)
        except (Findings, Fault, Unsupported) as error:
            return "machine", str(error)
        except AssertionError as error:
            return "numbers", str(error)
    return "survived", ""


def _subjects(scenario: Scenario, machine: Machine) -> list[Launched]:
    """One launch of each kernel: of its specialisations, the one that meets most of the scenario's cases."""
    launches = [launched for launched in machine.launches if re.match(scenario.kernels, launched.kernel)]
    counts = Counter((launched.kernel, id(launched.compiled)) for launched in launches)
    often = dict(sorted(counts, key=counts.__getitem__))
    found = {launched.kernel: launched for launched in launches if often[launched.kernel] == id(launched.compiled)}
    return list(found.values())


def run(scenario: Scenario, arch: int, kinds: tuple[str, ...] = KINDS, limit: int = 0) -> Iterator[Verdict]:
    """Judges every mutant of every kernel that the scenario launches; `limit` samples each kind of each kernel."""
    with source_lines():
        with behind_launch(arch) as machine:
            scenario.run(machine)
        # A broken loop may not end; nothing sound runs ten times as long as the original.
        longest = max(launched.report.counters["warp_instructions"] for launched in machine.launches)
        options = Options(stats=False, limit=10 * longest)
        for launched in _subjects(scenario, machine):
            for kind in kinds:
                for mutant in mutants(launched.compiled.ptx, kind, limit):
                    caught_by, detail = _judge(scenario, launched.compiled, mutant, arch, options)
                    found = signature(mutant, launched.compiled.ptx)
                    yield Verdict(launched.kernel, mutant, caught_by, detail, found)


def strangers(verdicts: Sequence[Verdict], scenario: str, arch: int) -> list[str]:
    """In words, the survivors that survivors.json does not account for."""
    found = []
    for kernel in dict.fromkeys(verdict.kernel for verdict in verdicts):
        survived = [v.signature for v in verdicts if v.kernel == kernel and v.caught_by == "survived"]
        for (kind, change, place), count in unexplained(scenario, arch, kernel, survived).items():
            found.append(f"{kernel}: {count} x {kind}: {change} ({place or 'no source line'})")
    return found


def table(verdicts: Sequence[Verdict]) -> str:
    """Counts by kind."""
    counts = Counter((verdict.mutant.kind, verdict.caught_by) for verdict in verdicts)
    lines = [f"{'kind':10} {'mutants':>8} {'machine':>8} {'numbers':>8} {'survived':>9}"]
    for kind in dict.fromkeys(verdict.mutant.kind for verdict in verdicts):
        row = [counts[kind, how] for how in ("machine", "numbers", "survived")]
        lines.append(f"{kind:10} {sum(row):8} {row[0]:8} {row[1]:8} {row[2]:9}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptxsim.mutate", description=__doc__.split("\n")[0])
    parser.add_argument("scenario", choices=sorted(SCENARIOS))
    parser.add_argument("--arch", type=int, choices=(80, 90), default=80)
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated, of " + ", ".join(KINDS))
    parser.add_argument("--limit", type=int, default=0, help="mutants of each kind and kernel (0: all)")
    given = parser.parse_args()
    kinds = tuple(given.kinds.split(","))
    unknown = set(kinds) - set(KINDS)
    if unknown:
        parser.error(f"--kinds: expected some of {', '.join(KINDS)}, got {', '.join(sorted(unknown))}")
    verdicts = []
    for verdict in run(SCENARIOS[given.scenario], given.arch, kinds, given.limit):
        verdicts.append(verdict)
        if verdict.caught_by == "survived":
            mutant = verdict.mutant
            print(f"survived: {mutant.kind}, {verdict.kernel}, PTX line {mutant.line}: {mutant.change}", flush=True)
    print(table(verdicts))
    new = strangers(verdicts, given.scenario, given.arch)
    for text in new:
        print(f"not in survivors.json: {text}")
    return int(bool(new))


if __name__ == "__main__":
    sys.exit(main())
