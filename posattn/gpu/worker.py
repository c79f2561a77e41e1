"""The process that does items: a kernel that faults takes this process with it, and not the report.

It reads a name a line and answers with a line of JSON each.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from posattn.gpu.items import Item
from posattn.gpu.work import Skipped, do


def attempt(item: Item, device: str, seconds: float) -> dict[str, Any]:
    """What an item found, with its state: done, failed, skipped or error."""
    try:
        found = do(item, device, seconds)
    except Skipped as why:
        return {"state": "skipped", "why": str(why)}
    except Exception as error:  # whatever a kernel, a compiler or a driver raises is this item's finding
        short = "".join(traceback.format_exception_only(error)).strip()
        return {"state": "error", "why": short[-2000:], "traceback": traceback.format_exc()[-6000:]}
    return {"state": "done" if found["ok"] else "failed", **found}


def main(argv: Sequence[str]) -> int:
    """`argv`: the device, and seconds of one timing."""
    device, seconds = argv[0], float(argv[1])
    # Answers go out by a copy of stdout; what else is printed (a compiler's remarks) goes to stderr.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            found = attempt(Item(line.rstrip("\n")), device, seconds)
            answers.write(json.dumps(found) + "\n")
            answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
