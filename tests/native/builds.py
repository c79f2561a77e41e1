"""Builds of the drivers in tests/native, each in a folder of its own, so that the next run compiles what changed."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str) -> str:
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here")
    return found


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]


def driver(folder: str, target: str, *options: str) -> Path:
    """The driver `target`, built under build/`folder` with CMake's `options`."""
    cmake, ninja = tool("cmake"), tool("ninja")
    build = ROOT / "build" / folder
    build.mkdir(parents=True, exist_ok=True)
    options = ("-DPOSATTN_BUILD_MODULE=OFF", "-DPOSATTN_BUILD_DRIVERS=ON", *options)
    with (build / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be at the same build
        run(cmake, "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *options)
        run(cmake, "--build", build, "--target", target)
    return build / "tests" / "native" / target
