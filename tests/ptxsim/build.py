"""Builds the native half of the PTX machine on first import, into a cache keyed by the content of its sources.

Set POSATTN_PTXSIM_CACHE to choose the cache directory (default: the user's cache directory). A change to any source,
to the interpreter or to the processor's instruction set gives another key, so a stale module is never loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

_HERE = Path(__file__).resolve().parent


def _cache_dir() -> Path:
    named = os.environ.get("POSATTN_PTXSIM_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "posattn-ptxsim"


def _processor() -> str:
    """Identifies the instruction set that -march=native compiles for."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    return next((line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))), "")


def _key() -> str:
    digest = hashlib.sha256()
    for path in sorted([*(_HERE / "machine").iterdir(), _HERE / "CMakeLists.txt"]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(f"{sys.version} {platform.machine()} {_processor()}".encode())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"building the PTX machine failed: {' '.join(command)}\n{done.stdout}{done.stderr}")


def _compile(target: Path) -> None:
    import pybind11

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as build:
        configure = ["cmake", "-S", str(_HERE), "-B", build, "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        _run(configure)
        _run(["cmake", "--build", build, "--parallel", "2"])
        # Parallel test workers may build at once; the rename is atomic, so each of them loads a whole file.
        os.replace(Path(build) / target.name, target)


def load() -> ModuleType:
    """Returns the native module, compiling it if this content has not been compiled before (about 30 s)."""
    target = _cache_dir() / _key() / f"_ptxsim{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not target.exists():
        _compile(target)
    spec = importlib.util.spec_from_file_location("_ptxsim", target)
    if spec is None or spec.loader is None:
        raise ImportError(f"{target} is not an extension module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
