"""`pip install .` in build isolation and `pip install -e .`, each into a fresh environment.

Both share one copy of the sources, and so its build folder, and build one instruction set: what is proved here is the
packaging. torch is borrowed from the environment that runs the tests.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ISA = "baseline" if platform.machine() in ("x86_64", "AMD64") else "neon"
ROOT = Path(__file__).resolve().parents[2]
NOT_SOURCES = (".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "demo-out", "bench-out")

PROBE = """
import posattn, posattn._cpu, posattn.bench, posattn.demo, posattn.kernels, torch
q = torch.randn(1, 2, 5, 8)
out = posattn.attention(q, q, q, posattn.ALiBi(2), causal=True, backend="cpu")
expected = posattn.attention(q, q, q, posattn.ALiBi(2), causal=True, backend="reference")
torch.testing.assert_close(out, expected)
print(posattn.__file__, posattn._cpu.__file__, posattn.bench.__file__, posattn.kernels.__file__, sep="\\n")
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("packaging") / "posattn"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    return copy


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of a fresh environment. A path file brings in torch alone: it runs no path files in turn, so an
    editable posattn installed beside that torch stays out of sight."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    interpreter = tmp_path / "venv" / "bin" / "python"
    purelib = subprocess.run(
        [interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    Path(purelib, "torch.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    return interpreter


def pip_install(python: Path, *arguments: str | Path) -> None:
    environment = {**os.environ, "CMAKE_ARGS": f"-DPOSATTN_ISAS={ISA}", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", *arguments]
    done = subprocess.run(pip, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def probe(python: Path, folder: Path) -> list[Path]:
    """Run PROBE away from the sources; the files of the package, the native module, the bench and the kernels."""
    done = subprocess.run([python, "-c", PROBE], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.splitlines()]


def modules(folder: Path, prefix: str) -> set[str]:
    return {
        f"{prefix}/{path.relative_to(folder).as_posix()}"
        for path in folder.rglob("*.py")
        if "__pycache__" not in path.parts
    }


def test_install_in_build_isolation(sources: Path, python: Path, tmp_path: Path) -> None:
    pip_install(python, sources)
    files = probe(python, tmp_path)
    site = files[0].parent.parent
    assert site.is_relative_to(tmp_path)
    assert all(path.is_relative_to(site) for path in files)

    installed = {
        path.relative_to(site).as_posix()
        for path in site.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != "torch.pth"
    }
    tops = {path.split("/")[0].split("-")[0] for path in installed}
    assert tops == {"posattn"}, "the wheel must hold the package and its metadata, no tests and no top-level kernels"
    expected = modules(sources / "posattn", "posattn")
    expected |= modules(sources / "kernels", "posattn/kernels") | modules(sources / "bench", "posattn/bench")
    cuda = sources / "csrc" / "cuda"
    expected |= {
        f"posattn/cuda_source/{path.relative_to(cuda).as_posix()}" for path in cuda.rglob("*") if path.is_file()
    }
    expected.add("posattn/py.typed")
    missing = expected - installed
    assert not missing
    assert not any(part.startswith("test") for path in installed for part in path.split("/"))


def test_editable_install(sources: Path, python: Path, tmp_path: Path) -> None:
    pip_install(python, "--editable", sources)
    assert all(path.is_relative_to(sources) for path in probe(python, tmp_path))
    command = subprocess.run([python.with_name("posattn"), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert command.returncode == 0, command.stderr
    assert all(name in command.stdout for name in ("info", "check", "plot", "demo", "bench"))
