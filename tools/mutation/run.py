"""Run the tests of a fault against a tree in which it is.

The tree mirrors the repository by links: its posattn is a folder of links to the sources, but for the one file that has
the fault, or for the native module that holds them all. Each run is a fork of this process, which has imported torch
and pytest already and never posattn, so it costs what its tests cost.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .fault import ROOT, Fault

TIMEOUT = 300.0  # seconds; a fault that makes a task wait for ever is noticed by it
SURVIVED, CAUGHT, NO_TESTS = "survived", "caught", "no tests ran"


@dataclass(frozen=True)
class Verdict:
    fault: Fault
    result: str
    seconds: float
    log: str


class Tree:
    """The mirror, in a folder of one's own."""

    def __init__(self, folder: Path, module: Path | None) -> None:
        self.folder = folder
        links = {"posattn/kernels": "kernels", "posattn/cuda_source": "csrc/cuda", "csrc": "csrc", "tests": "tests"}
        for package, source in (("posattn", "posattn"), ("posattn/bench", "bench")):
            ignore = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / source, folder / package, copy_function=os.symlink, ignore=ignore)
        for name in ("pyproject.toml", "README.md", "docs", "bench", "kernels", "tools", "setup.py", "CMakeLists.txt"):
            links[name] = name
        for name, source in links.items():
            (folder / name).symlink_to(ROOT / source)
        self.own = next((ROOT / "posattn").glob("_cpu*.so"))
        self.module = module

    def put(self, fault: Fault | None) -> None:
        """The tree with this fault in its Python code (a native one is the environment's matter), or with none."""
        native = self.folder / "posattn" / self.own.name
        native.unlink(missing_ok=True)
        native.symlink_to(self.module if self.module is not None and fault is not None and fault.native else self.own)
        if fault is not None and not fault.native:
            path = self._path(fault)
            source = (ROOT / fault.file).read_text()
            path.unlink()
            path.write_text(fault.applied(source))

    def restore(self, fault: Fault) -> None:
        if not fault.native:
            path = self._path(fault)
            path.unlink()
            path.symlink_to(ROOT / fault.file)
            for stale in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
                stale.unlink()

    def _path(self, fault: Fault) -> Path:
        return self.folder / (f"posattn/{fault.file}" if fault.file.startswith("bench/") else fault.file)


def warm_up() -> None:
    """Import what every run needs, so that forks have it; what there is of it is never garbage."""
    for name in ("hypothesis", "pytest", "torch", "torch._dynamo", "torch._inductor", "triton", "triton.language"):
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    gc.freeze()


def run(tree: Tree, tests: Sequence[str], number: int, log: Path, timeout: float = TIMEOUT) -> str:
    """The verdict on one run of `tests`, with fault `number` of the native module turned on (0: none)."""
    process = multiprocessing.get_context("fork").Process(target=_child, args=(tree.folder, tests, number, log))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        return f"{CAUGHT} (no end in {timeout:.0f} s)"
    code = process.exitcode or 0
    if code < 0:
        return f"{CAUGHT} (signal {-code})"
    return {0: SURVIVED, 1: CAUGHT, 2: f"{CAUGHT} (cannot be imported)"}.get(code, NO_TESTS)


def _child(folder: Path, tests: Sequence[str], number: int, log: Path) -> None:
    os.environ["POSATTN_FAULT"] = str(number)
    os.environ.pop("POSATTN_ISA", None)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    for name in [name for name in sys.modules if name.split(".")[0] in ("tools", "tests")]:
        del sys.modules[name]
    import pytest

    for selection in tests:
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *shlex.split(selection)]))
        if code:
            break
    sys.stdout.flush()
    os._exit(code)


def examine(tree: Tree, fault: Fault, number: int, log: Path) -> Verdict:
    start = time.perf_counter()
    tree.put(fault)
    try:
        result = run(tree, fault.tests, number if fault.native else 0, log)
    finally:
        tree.restore(fault)
    tail = "" if result == SURVIVED else log.read_text(errors="replace")[-600:]
    return Verdict(fault, result, time.perf_counter() - start, tail)
