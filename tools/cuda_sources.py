"""Writes specialised CUDA sources, for compilers other than NVRTC.

    python -m tools.cuda_sources FOLDER --arch sm_80 --match "D = 64"

Each is one kernel that the package launches for a call of tools.gpu_budget.cuda, as `<source>_<number>_<arch>.cu`; it
compiles with csrc/cuda on the include path.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from unittest import mock

from posattn.backends.cuda import compiler
from posattn.backends.cuda.compiler import Kernel

from .gpu_budget.cuda import ARCHITECTURES, cases, launches


def sources(arch: str, match: str) -> dict[str, str]:
    """Name -> text of every kernel launched for the calls whose label holds `match`. Nothing is compiled."""
    texts: dict[str, str] = {}

    def note(source: str, entry: str, struct: str, constants: tuple[Any, ...], arch: str) -> Kernel:
        text = compiler.specialised(source, struct, constants)
        texts.setdefault(text, f"{Path(source).stem}_{len(texts)}_{arch}")
        return Kernel(entry, arch, "", b"")

    with mock.patch.object(compiler, "compile_kernel", note):
        for case in cases():
            if match in case.label:
                launches(case, arch)
    return {name: text for text, name in texts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.cuda_sources", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="may be repeated (default: sm_80)")
    parser.add_argument("--match", default="", help="only calls whose label holds this")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    for arch in given.arch or ["sm_80"]:
        for name, text in sources(arch, given.match).items():
            (given.folder / f"{name}.cu").write_text(text)


if __name__ == "__main__":
    main()
