"""Specialised kernels from csrc/cuda, compiled with NVRTC through cuda.core at first use and cached.

A specialisation is a source file, the kernel in it, and the compile-time constants it is built with; the constants
become `constexpr` definitions ahead of the file. The result is kept in memory, and on disk under the hash of the source
tree, the constants, the options, the architecture and NVRTC's version.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posattn.backends.cuda import cache, params
from posattn.backends.cuda.constants import definitions

if TYPE_CHECKING:
    if sys.version_info >= (3, 11):
        from importlib.resources.abc import Traversable
    else:
        from importlib.abc import Traversable

OLDEST = 80
OLDEST_CUDA_CORE = (1, 0)
OLDEST_NVRTC = (12, 1)  # the first that adds vectors to global memory
_STANDARD = "c++17"


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: its entry point, the architecture it was compiled for ("sm_80"), and its code."""

    name: str
    arch: str
    ptx: str
    cubin: bytes


class CompileError(RuntimeError):
    """NVRTC refused a source of ours."""


_kernels: dict[tuple[object, ...], Kernel] = {}
_locks: dict[tuple[object, ...], threading.Lock] = {}
_guard = threading.Lock()


@functools.cache
def missing() -> str | None:
    """Why nothing can be compiled on this machine; None if it can."""
    install = "pip install 'cuda-core[cu13]'"  # what posattn[cuda] asks for
    try:
        core, nvrtc = _cuda_core_version(), _nvrtc_version()
    except Exception as error:  # cuda.core, its bindings, or NVRTC itself: each fails in its own way when absent
        return f"it needs cuda.core and NVRTC, {install} ({(str(error).splitlines() or [repr(error)])[0]})"
    for name, found, oldest in (("cuda.core", core, OLDEST_CUDA_CORE), ("NVRTC", nvrtc, OLDEST_NVRTC)):
        if found < oldest:
            needed, got = (".".join(map(str, version)) for version in (oldest, found))
            return f"it needs {name} {needed} or later, got {got}, {install}"
    return None


def unsupported(arch: str) -> str | None:
    """Why the kernels cannot be compiled for `arch`; None if they can."""
    number = int(arch.removeprefix("sm_").rstrip("af"))
    if number < OLDEST:
        return f"it needs compute capability 8.0 or later, got {number // 10}.{number % 10}"
    if number not in _known_architectures():
        major, minor = _nvrtc_version()
        return f"NVRTC {major}.{minor} does not know sm_{number}; a later nvidia-cuda-nvrtc may"
    return None


def compile_kernel(source: str, entry: str, struct: str, constants: tuple[Any, ...], arch: str) -> Kernel:
    """The kernel `entry` of csrc/cuda/`source`, which takes one `struct` by value, built with the constants of its
    family (see constants.py)."""
    key = (source, entry, arch, constants)  # every launch asks, so the text is not made for it
    if key in _kernels:
        return _kernels[key]
    with _guard:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:  # another thread may be compiling the same kernel
        if key not in _kernels:
            _kernels[key] = _load(specialised(source, struct, constants), entry, arch)
    return _kernels[key]


def specialised(source: str, struct: str, constants: tuple[Any, ...]) -> str:
    """The text that is compiled: the constants, the source file, and a check of the parameters' layout."""
    lines = ["namespace posattn {"]
    for name, value in sorted(definitions(constants)):
        if isinstance(value, bool):
            lines.append(f"constexpr bool {name} = {str(value).lower()};")
        else:
            lines.append(f"constexpr int {name} = {value};")
    lines += ["}", f'#include "{source}"']
    lines += [f"static_assert(sizeof(posattn::{struct}) == {params.size(struct)});", ""]
    return "\n".join(lines)


def _texts(folder: Traversable, prefix: str) -> Iterator[tuple[str, bytes]]:
    """The device sources below `folder`, by their path."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _texts(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith((".h", ".cu")):
            yield prefix + entry.name, entry.read_bytes()


@functools.cache
def _sources() -> bytes:
    """All device sources, so that no cached kernel outlives a change of a header."""
    return b"\0".join(
        name.encode() + b"\0" + content for name, content in sorted(_texts(files("posattn.cuda_source"), ""))
    )


def _cuda_core_version() -> tuple[int, int]:
    import cuda.core

    major, minor = cuda.core.__version__.split(".")[:2]
    return int(major), int(minor)


@functools.cache
def _nvrtc_version() -> tuple[int, int]:
    from cuda.bindings import nvrtc

    error, major, minor = nvrtc.nvrtcVersion()
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC: {error.name}")
    return int(major), int(minor)


@functools.cache
def _known_architectures() -> frozenset[int]:
    from cuda.bindings import nvrtc

    return frozenset(nvrtc.nvrtcGetSupportedArchs()[1])


@functools.cache
def _source_hash() -> bytes:
    return hashlib.sha256(_sources()).digest()


def _key(text: str, entry: str, arch: str) -> str:
    parts = (text, entry, arch, _STANDARD, *map(str, _nvrtc_version()))
    return hashlib.sha256(_source_hash() + "\0".join(parts).encode()).hexdigest()


def _load(text: str, entry: str, arch: str) -> Kernel:
    key = _key(text, entry, arch)
    parts = cache.load(key)
    if parts is None or len(parts) != 2:
        parts = list(_compile(text, entry, arch))
        cache.store(key, parts)
    cubin, ptx = parts
    return Kernel(entry, arch, ptx.decode(), cubin)


def _compile(text: str, entry: str, arch: str) -> tuple[bytes, bytes]:
    """Machine code and PTX, from one run of NVRTC."""
    from cuda.bindings import nvrtc
    from cuda.core import Program, ProgramOptions

    folder = files("posattn.cuda_source")
    place = nullcontext(folder) if isinstance(folder, Path) else as_file(folder)
    with place as include:
        options = ProgramOptions(name=f"specialised_{entry}", arch=arch, std=_STANDARD, include_path=str(include))
        program = Program(text, "c++", options)
        try:
            cubin = program.compile("cubin").code
        except Exception as error:  # NVRTCError, whose module is private
            raise CompileError(f"{entry} for {arch} does not compile: {error}") from error
    # cuda.core gives PTX only where there is a driver to check it against; NVRTC has it beside the machine code.
    handle = program.handle
    ptx = bytearray(nvrtc.nvrtcGetPTXSize(handle)[1])
    nvrtc.nvrtcGetPTX(handle, ptx)
    return bytes(cubin), bytes(ptx).rstrip(b"\0")
