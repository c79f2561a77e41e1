"""Put single faults into the CPU kernels and the Python code, one at a time, and see whether a test notices.

    python -m tools.mutation                       # every fault
    python -m tools.mutation --only decode.h       # those whose file or text holds this
    python -m tools.mutation --sample 8 --seed 3   # a few, drawn at random

faults/ lists them. The exit status is 1 if one survived that is not said to be equivalent, 2 if a fault's place is gone
or its tests fail without it.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import run
from .fault import Fault, Stale
from .faults import FAULTS
from .native import build


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.mutation", description=__doc__)
    parser.add_argument("--only", default="", help="only faults whose file, text or tests hold this")
    parser.add_argument("--sample", type=int, help="so many of them, at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (%(default)s)")
    parser.add_argument("--part", default="1/1", help="2/5: the second of five equal parts")
    parser.add_argument("--list", action="store_true", help="print the faults and stop")
    parser.add_argument("--no-baseline", action="store_true", help="trust that the tests pass without a fault")
    options = parser.parse_args(argv)
    chosen = [fault for fault in FAULTS if options.only in f"{fault.name} {' '.join(fault.tests)}"]
    if options.sample is not None:
        tried = [fault for fault in chosen if not fault.equivalent]
        chosen = random.Random(options.seed).sample(tried, min(options.sample, len(tried)))
    part, parts = map(int, options.part.split("/"))
    chosen = chosen[part - 1 :: parts]
    if options.list:
        print("\n".join(fault.name for fault in chosen))
        return 0
    try:
        verdicts = examine(chosen, not options.no_baseline)
    except (Stale, Broken) as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if report(verdicts) else 0


class Broken(Exception):
    """Tests that fail without a fault."""


def examine(chosen: Sequence[Fault], baseline: bool = True) -> list[run.Verdict]:
    """Each chosen fault's verdict, printed as it comes."""
    run.warm_up()
    numbered = [(number, fault) for number, fault in enumerate(FAULTS, 1) if fault.native]
    numbers = {fault: number for number, fault in numbered}
    module = build(numbered) if any(fault.native for fault in chosen) else None
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="posattn-mutation-") as folder:
        tree, log = run.Tree(Path(folder) / "tree", module), Path(folder) / "log"
        selections = sorted({selection for fault in chosen for selection in fault.tests}) if baseline else []
        for selection in selections:
            native = next((f for f in chosen if f.native), None)
            tree.put(native)  # number 0: the module with all faults asleep
            if run.run(tree, [selection], 0, log) != run.SURVIVED:
                raise Broken(f"without a fault: {selection}\n{log.read_text()[-3000:]}")
        for fault in chosen:
            verdict = run.examine(tree, fault, numbers.get(fault, 0), log)
            verdicts.append(verdict)
            print(f"{verdict.result:12s} {verdict.seconds:5.1f} s  {fault.name}", flush=True)
            if verdict.result == run.NO_TESTS:
                raise Broken(f"no tests: {fault.tests}\n{verdict.log}")
    return verdicts


def report(verdicts: Sequence[run.Verdict]) -> list[run.Verdict]:
    """Print the sums and the survivors; those that nobody has explained."""
    caught = [v for v in verdicts if v.result != run.SURVIVED]
    known = [v for v in verdicts if v.result == run.SURVIVED and v.fault.equivalent]
    strangers = [v for v in verdicts if v.result == run.SURVIVED and not v.fault.equivalent]
    print(f"\n{len(caught)} of {len(verdicts)} caught, {len(known)} equivalent, {len(strangers)} survived")
    for verdict in known:
        print(f"equivalent  {verdict.fault.name}: {verdict.fault.equivalent}")
    for verdict in strangers:
        print(f"SURVIVED    {verdict.fault.name}")
    for verdict in caught:
        if verdict.fault.equivalent:
            print(f"caught, though said to be equivalent: {verdict.fault.name}")
    return strangers


if __name__ == "__main__":
    sys.exit(main())
