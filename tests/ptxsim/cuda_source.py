"""CUDA source to PTX, by nvcc if it is on PATH, else by NVRTC from NVIDIA's PyPI package (nvidia-cuda-nvrtc)."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import tempfile
from pathlib import Path

MISSING = "compiling CUDA needs nvcc on PATH or `pip install nvidia-cuda-nvrtc`"


def _nvrtc() -> Path | None:
    spec = importlib.util.find_spec("nvidia")
    places = list(spec.submodule_search_locations or []) if spec else []
    found = sorted(path for place in places for path in Path(place).glob("*/lib/libnvrtc.so.*"))
    return found[0] if found else None


def available() -> bool:
    """Whether this machine can compile CUDA."""
    return shutil.which("nvcc") is not None or _nvrtc() is not None


def _by_nvcc(source: str, arch: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cu"
        path.write_text(source)
        command = ["nvcc", f"-arch=sm_{arch}", "--ptx", "-std=c++17", "-o", str(path.with_suffix(".ptx")), str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc: {done.stderr}")
        return path.with_suffix(".ptx").read_text()


def _by_nvrtc(library: Path, source: str, arch: int) -> str:
    nvrtc = ctypes.CDLL(str(library))
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    options = (ctypes.c_char_p * 2)(f"--gpu-architecture=compute_{arch}".encode(), b"--std=c++17")
    status = nvrtc.nvrtcCompileProgram(program, 2, options)
    text = "PTX" if status == 0 else "ProgramLog"
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{text}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{text}")(program, buffer)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if status:
        raise RuntimeError(f"NVRTC: {buffer.value.decode()}")
    return buffer.value.decode()


def compile_cuda(source: str, arch: int = 80) -> str:
    """The PTX of `source` (extern "C" kernels, no headers); RuntimeError with the compiler's words if it fails."""
    if shutil.which("nvcc"):
        return _by_nvcc(source, arch)
    library = _nvrtc()
    if library is None:
        raise RuntimeError(MISSING)
    return _by_nvrtc(library, source, arch)
