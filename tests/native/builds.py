"""Builds of the drivers in tests/native, each in a folder of its own, so that the next run compiles what changed."""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
from pybind11 import get_cmake_dir

ROOT = Path(__file__).resolve().parents[2]

# An option for builds whose kernels are on tiles wherever they can be, not only where that is faster.
ALWAYS_TILES = "-DCMAKE_CXX_FLAGS=-DPOSATTN_ALWAYS_TILES"
# Options for a module whose speed is nobody's concern: it takes half as long to compile.
PLAINLY = ("-DCMAKE_BUILD_TYPE=Plainly", "-DCMAKE_CXX_FLAGS_PLAINLY=-O1 -DNDEBUG")


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
    return _built(folder, target, "-DPOSATTN_BUILD_MODULE=OFF", "-DPOSATTN_BUILD_DRIVERS=ON", *options) / (
        f"tests/native/{target}"
    )


def module(folder: str, *options: str) -> ModuleType:
    """The Python module posattn._cpu, built under build/`folder` with CMake's `options` and loaded beside the installed
    one."""
    build = _built(
        folder, "_cpu", f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={get_cmake_dir()}", *options
    )
    path = build / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("_cpu", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def _built(folder: str, target: str, *options: str) -> Path:
    """The folder in which `target` is built now."""
    cmake, ninja = tool("cmake"), tool("ninja")
    build = ROOT / "build" / folder
    build.mkdir(parents=True, exist_ok=True)
    with (build / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be at the same build
        run(cmake, "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *options)
        run(cmake, "--build", build, "--target", target)
    return build
