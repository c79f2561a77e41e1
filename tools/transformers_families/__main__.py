"""Run every family of the installed transformers and write docs/guide/transformers-families.md.

python -m tools.transformers_families                 # all of them: 10 to 20 minutes on two cores
python -m tools.transformers_families llama t5 bloom  # some, to the screen
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from pathlib import Path

import transformers

from tools.transformers_families.run import families, findings
from tools.transformers_families.sweep import TOLERANCE, Finding

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "transformers-families.md"

INTRODUCTION = """# Families of transformers

What `attn_implementation="posattn"` does in each of the {count} model families of transformers {version}, as
`python -m tools.transformers_families` found it: a tiny model of each, with eager attention and with posattn, on the
same weights and inputs, with left padding where the family takes a mask. The largest difference of any output from
eager's, over the largest value, was {worst:.0e}. [The guide](transformers.md) says how to use it.

`recurrent_gemma` is compared without padding: its recurrence reads the rows of padding, where eager attention averages
keys that nothing sees, and sdpa and posattn give zeros.
"""
MEANINGS = {
    "fused": "Every attention ran in posattn, and no mask [Tq, Tk] was made.",
    "fused and dense": "Every attention ran in posattn; some layers with a mask or bias [Tq, Tk] that the model made "
    "itself.",
    "dense": "Every attention ran in posattn, with a mask or bias [Tq, Tk] of the model's, O(N²) memory. T5 and those "
    "like it are fused after `convert(model)`.",
    "fused; own attention too": "Layers by the interface are fused; the family also computes with masks by itself and "
    "got eager attention's.",
    "fused and dense; own attention too": "As above, some layers with a mask [Tq, Tk].",
    "dense; own attention too": "Layers by the interface ran with a mask [Tq, Tk] of the model's; it also computes "
    "with masks by itself and got eager attention's.",
    "own attention, from the mask": "The family asks transformers for a mask and runs attention of its own. It got "
    "eager attention's mask and computes what it computes with eager attention; posattn is not used.",
    "own attention or none": "No attention by the interface and no mask from it: attention of its own, or none "
    "(convolutions, recurrences). As with eager attention; posattn is not used.",
    "refuses the name": "The family picks its attention from a list of names and raises KeyError for others. Load it "
    "with its default. (Falcon and GPT-Neo too are such: load, then `convert(model)`.)",
    "not made": "The tool found no tiny config and inputs that the family runs with under eager attention, so nothing "
    "was compared: parts of composite models that are called otherwise, families that need packages that are not "
    "installed, sizes that must fit one another.",
}


def page(found: list[Finding]) -> str:
    by_way: dict[str, list[Finding]] = defaultdict(list)
    for finding in found:
        by_way[finding.way].append(finding)
    worst = max(finding.error for finding in found if finding.error is not None)
    lines = [INTRODUCTION.format(count=len(found), version=transformers.__version__, worst=worst)]
    for way in [*MEANINGS, *sorted(set(by_way) - set(MEANINGS))]:
        if way in by_way:
            names = ", ".join(f"`{finding.family}`" for finding in sorted(by_way[way], key=lambda f: f.family))
            lines += [f"## {way[0].upper()}{way[1:]}: {len(by_way[way])}\n", f"{MEANINGS.get(way, '')}\n", f"{names}\n"]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    found = findings(options.families or families(), options.jobs)
    wrong = [f for f in found if f.way == "fails" or (f.error is not None and not f.error < TOLERANCE)]
    for finding in wrong:
        print("WRONG:", finding.family, finding.way, finding.error)
    if not options.families:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(page(found))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
