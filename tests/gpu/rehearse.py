"""The worker of `posattn gpu` with the PTX machine in the GPU's place: run as its command, with small sizes."""

from __future__ import annotations

import sys

from posattn.gpu import items, work, worker
from tests.ptxsim.seam import behind_launch


def small() -> None:
    """Sizes that a machine in software does in seconds, and a clock that it does not have."""
    items.HEADS = work.HEADS = 2
    items.QUERIES = work.QUERIES = 40
    items.KEYS = work.KEYS = 70
    work.BATCH, work.TIMED_HEADS, work.TIMED_LENGTH = 1, 2, 64
    work.clock = lambda device: 1e9


if __name__ == "__main__":
    small()
    with behind_launch(90):
        sys.exit(worker.main(["cpu", "0.01"]))
