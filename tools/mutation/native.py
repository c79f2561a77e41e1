"""One build of the CPU module with every fault in it, of which the environment variable POSATTN_FAULT turns on one.

A copy of csrc/cpu has each faulty expression as `(::posattn::fault == 7 ? (faulty) : (right))`, each statement as an
`if`. The variable is read once, when the module is loaded; 0 is none.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from .fault import ROOT, Fault

BUILD = ROOT / "build" / "mutation"
SOURCES = ROOT / "csrc" / "cpu"
# The widest instruction set that this processor has runs the most of the code: bfloat16 has paths of its own.
ISAS = ("avx512bf16", "avx512", "avx2", "baseline", "neon")

_SWITCH = """#pragma once
#include <cstdlib>
namespace posattn {
inline const int fault = [] {
  const char* number = std::getenv("POSATTN_FAULT");
  return number ? std::atoi(number) : 0;
}();
}
"""


def switched(text: str, faults: Sequence[tuple[int, Fault]]) -> str:
    """The source with every fault in it, each behind its number."""
    spans: dict[tuple[int, int], list[tuple[int, Fault]]] = {}
    for number, fault in faults:
        spans.setdefault(fault.span(text), []).append((number, fault))

    def render(begin: int, end: int, inside: list[tuple[int, int]]) -> str:
        at, parts = begin, []
        while inside:
            outer = min(inside, key=lambda span: (span[0], -span[1]))
            nested = [span for span in inside if span != outer and span[1] <= outer[1]]
            inside = [span for span in inside if span[0] >= outer[1]]
            parts.append(text[at : outer[0]])
            parts.append(_choice(render(*outer, nested), spans[outer]))
            at = outer[1]
        return "".join([*parts, text[at:end]])

    order = sorted(spans)
    for (_, end), (begin, other) in pairwise(order):
        if begin < end < other:
            raise ValueError(f"expected faults beside or inside one another, got crossing ones: {text[begin:end]!r}")
    return render(0, len(text), order)


def _choice(right: str, faults: Sequence[tuple[int, Fault]]) -> str:
    if right.rstrip().endswith((";", "}")):
        cases = "".join(f"if (::posattn::fault == {number}) {{ {fault.after} }} else " for number, fault in faults)
        return f"{cases}{{ {right} }}"
    return (
        "(" + "".join(f"::posattn::fault == {number} ? ({fault.after}) : " for number, fault in faults) + f"({right}))"
    )


def build(faults: Sequence[tuple[int, Fault]]) -> Path:
    """The module with these numbered faults; compiled anew where they or the sources changed."""
    root = BUILD / "source"
    files = {path.relative_to(ROOT): path.read_text() for path in sorted(SOURCES.rglob("*")) if path.is_file()}
    files[Path("CMakeLists.txt")] = (ROOT / "CMakeLists.txt").read_text().replace('"-O3 -DNDEBUG"', '"-O2 -DNDEBUG -w"')
    for path in list(files):
        own = [(number, fault) for number, fault in faults if Path(fault.file) == path]
        if own:
            files[path] = switched(files[path], own)
    folder = SOURCES.relative_to(ROOT)
    first = folder / "kernels.h"  # every file that depends on the instruction set, and the module, begin with it
    files[first] = files[first].replace("#pragma once\n", '#pragma once\n#include "fault.h"\n', 1)
    files[folder / "fault.h"] = _SWITCH
    stamp = hashlib.sha256("".join(f"{path}\n{text}" for path, text in files.items()).encode()).hexdigest()
    module = BUILD / "module" / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.exists() and (BUILD / "stamp").exists() and (BUILD / "stamp").read_text() == stamp:
        return module
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    module.parent.mkdir(exist_ok=True)
    tools = {name: _tool(name) for name in ("cmake", "ninja")}
    import pybind11

    options = [
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPOSATTN_ISAS={_isa()}",
        f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    for command in (
        [tools["cmake"], "-S", str(root), "-B", str(BUILD / "cmake"), "-G", "Ninja", *options],
        [tools["cmake"], "--build", str(BUILD / "cmake"), "--target", "_cpu"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-8000:]}{done.stderr[-8000:]}")
    (BUILD / "stamp").write_text(stamp)
    return module


def _isa() -> str:
    """The widest of ISAS that the installed module runs here. Asked for in another process: see run.py."""
    command = [sys.executable, "-c", "from posattn import _cpu; print(*_cpu.isas())"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return next(name for name in ISAS if name in done.stdout.split())


def _tool(name: str) -> str:
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name}: expected it beside Python or on the path {os.environ.get('PATH')}, found none")
    return found
