"""Every length from one token to three tiles, through Triton's interpreter (triton_sweep.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


# Nine plans take turns, so nine lengths have each of them, on both sides of a tile's edge.
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("first", "last"), [(14, 22), pytest.param(1, 13, marks=SLOW), pytest.param(23, 48, marks=SLOW)]
)
def test_every_length(first: int, last: int) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.backends.triton_sweep", str(first), str(last)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
