"""The kernels compile with the oldest Triton that is supported, which is fetched once into a cache of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

OLDEST = "3.6.0"


def _oldest_triton() -> Path:
    """A directory that holds that release and nothing else."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / f"posattn-triton-{OLDEST}"
    if not (cache / "complete").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(cache)]
        subprocess.run([*command, f"triton=={OLDEST}"], check=True, timeout=300)
        (cache / "complete").touch()
    return cache


@pytest.mark.slow
def test_kernels_compile() -> None:
    root = Path(__file__).parents[2]
    oldest = _oldest_triton()
    paths = [str(oldest), str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    compiled = {
        "PYTHONPATH": os.pathsep.join(paths),
        "TRITON_CACHE_DIR": str(oldest / "compiled"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.backends.triton_oldest"]
    done = subprocess.run(command, cwd=root, env={**os.environ, **compiled}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"triton {OLDEST}" in done.stdout
    kernels = {line.split()[1] for line in done.stdout.splitlines()[1:]}
    assert kernels >= {"attention_backward", "headmix_forward", "headmix_backward_q", "headmix_backward_kv"}
