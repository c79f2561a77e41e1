"""nvcc as a second compiler: its PTX of the same specialised sources gives the same results, with no finding."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import posattn
from posattn.backends.cuda import compiler
from tests.ptxsim.seam import behind_launch
from tests.tolerance import assert_forward_parity

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


@pytest.fixture(params=[80, 90])
def by_nvcc(request, tmp_path, monkeypatch):
    """The machine, on PTX by nvcc."""
    pytest.importorskip("cuda.core")

    def compile_(text: str, entry: str, arch: str) -> tuple[bytes, bytes]:
        source, ptx = tmp_path / f"{entry}.cu", tmp_path / f"{entry}.ptx"
        source.write_text(text)
        command = ["nvcc", f"-arch={arch}", "-std=c++17", f"-I{ROOT / 'csrc' / 'cuda'}", "-ptx", "-o", ptx, source]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return b"", ptx.read_bytes()

    monkeypatch.setenv("POSATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "_kernels", {})
    monkeypatch.setattr(compiler, "_compile", compile_)
    with behind_launch(request.param) as machine:
        yield machine


@pytest.mark.parametrize("q_len", [70, 2], ids=["prefill", "decoding"])
def test_forward(q_len, by_nvcc):
    q, k, v = (torch.randn(1, 2, n, 64).to(torch.bfloat16) for n in (q_len, 150, 150))
    position = posattn.ALiBi(2) + posattn.Kerple(2) + posattn.FIRE(2, width=8)
    assert_forward_parity(q, k, v, position, {"causal": True, "sinks": torch.randn(2)}, "cuda")


@pytest.mark.slow
def test_cmake_builds_the_device_code(tmp_path):
    """-DPOSATTN_BUILD_CUDA=ON: the sources that tools.cuda_sources writes, each for every architecture asked for."""
    scripts = sysconfig.get_path("scripts")
    cmake, ninja = (shutil.which(name, path=scripts) or shutil.which(name) or name for name in ("cmake", "ninja"))
    options = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "Python_EXECUTABLE": sys.executable,
        "POSATTN_BUILD_MODULE": "OFF",
        "POSATTN_BUILD_CUDA": "ON",
        "POSATTN_CUDA_ARCHS": "sm_80;sm_90",
        "POSATTN_CUDA_MATCH": "plain, D = 96",
    }
    configure = [cmake, "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *(f"-D{name}={x}" for name, x in options.items())]
    for command in (configure, [cmake, "--build", tmp_path]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    built = sorted(path.name for path in (tmp_path / "cuda").glob("*.cubin"))
    assert built == ["forward_0_sm_80.cubin", "forward_sm90_0_sm_90a.cubin"]
    # A change of any device source, in whatever folder, compiles them again.
    query = subprocess.run(
        [ninja, "-C", tmp_path, "-t", "query", f"cuda/{built[0]}"], check=True, capture_output=True, text=True
    )
    sources = {str(path) for path in (ROOT / "csrc" / "cuda").rglob("*") if path.suffix in (".h", ".cu")}
    assert len(sources) > 10
    assert sources <= {line.strip().removeprefix("| ") for line in query.stdout.splitlines()}
