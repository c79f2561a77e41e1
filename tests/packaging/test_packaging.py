"""What wheel and sdist hold and the Makefile watches; installs into fresh environments, in isolation and editable.

The two share one copy of the sources, and so its build folder, and build one instruction set: what is proved here is
the packaging. torch is borrowed from the environment that runs the tests.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ISA = "baseline" if platform.machine() in ("x86_64", "AMD64") else "neon"
ROOT = Path(__file__).resolve().parents[2]
NOT_SOURCES = (".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "demo-out", "bench-out")

PROBE = Path(__file__).with_name("wheel.py")


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
    done = subprocess.run([python, PROBE], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.splitlines()]


def modules(folder: Path, prefix: str) -> set[str]:
    return {
        f"{prefix}/{path.relative_to(folder).as_posix()}"
        for path in folder.rglob("*.py")
        if "__pycache__" not in path.parts
    }


def packaged(root: Path) -> set[str]:
    """Every file of the sources that an installed package must hold."""
    folders = {"posattn": "posattn", "kernels": "posattn/kernels", "bench": "posattn/bench"}
    cuda = root / "csrc" / "cuda"
    device = {f"posattn/cuda_source/{path.relative_to(cuda).as_posix()}" for path in cuda.rglob("*") if path.is_file()}
    device = {path for path in device if "__pycache__" not in path}
    assert len(device) > 10
    return {"posattn/py.typed", *device}.union(*(modules(root / name, prefix) for name, prefix in folders.items()))


def test_every_source_is_packaged(tmp_path: Path) -> None:
    """Also those of folders that pyproject.toml would have to name."""
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert packaged(ROOT) - built == set()


def test_make_watches_sources_in_every_folder() -> None:
    done = subprocess.run(["make", "-pnrR", "help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = dict(line.split(" := ", 1) for line in done.stdout.splitlines() if " := " in line)
    for variable, folder, kinds in (
        ("NATIVE", "csrc/cpu", ("*.cpp", "*.h")),
        ("CPP", "csrc/cpu", ("*.cpp", "*.h")),
        ("CPP", "tests/native", ("*.cpp", "*.h")),
        ("CPP", "tests/ptxsim", ("*.cpp", "*.h", "*.c")),
        ("CUDA", "csrc/cuda", ("*.cu", "*.h")),
    ):
        sources = {path.relative_to(ROOT).as_posix() for kind in kinds for path in (ROOT / folder).rglob(kind)}
        assert sources
        assert sources <= set(listed[variable].split()), variable


@pytest.fixture(scope="module")
def sdist(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, as `python -m build --sdist` makes it."""
    folder = tmp_path_factory.mktemp("sdist")
    program = f"import setuptools.build_meta; print(setuptools.build_meta.build_sdist({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=sources, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / done.stdout.splitlines()[-1]


def test_the_sdist_holds_what_builds_it(sources: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    patterns = ("csrc/**/*", "kernels/**/*.py", "bench/*.py", "posattn/**/*.py", "tests/native/*", "tools/**/*.py")
    files = {p.relative_to(sources).as_posix() for pattern in patterns for p in sources.glob(pattern) if p.is_file()}
    files = {name for name in files if not name.endswith((".so", ".pyc"))}
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE", *files} <= held
    assert not [name for name in held if name.endswith((".so", ".pyc")) or "/." in f"/{name}"]


@pytest.mark.slow
def test_install_in_build_isolation(sources: Path, sdist: Path, python: Path, tmp_path: Path) -> None:
    pip_install(python, sdist)
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
    assert packaged(sources) - installed == set()
    assert not any(part.startswith("test") for path in installed for part in path.split("/"))


def interpreters() -> dict[str, str]:
    """Other Pythons of this machine that the package supports, by version."""
    found = {}
    for minor in range(10, 15):
        name = f"python3.{minor}"
        beside = sorted(Path(sys.base_prefix).parent.glob(f"3.{minor}.*/bin/{name}"))  # where pyenv keeps them
        path = str(beside[-1]) if beside else shutil.which(name)
        if path is None or minor == sys.version_info.minor:
            continue
        # A manager's shim may stand for a Python that is not there.
        if subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
            found[f"3.{minor}"] = path
    return found


LOADED = """
import importlib.util, pathlib, sys
(path,) = pathlib.Path(sys.argv[1]).rglob("posattn/_cpu*.so")
spec = importlib.util.spec_from_file_location("_cpu", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(sorted(name for name in dir(module) if not name.startswith("_")))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "version", interpreters() or [pytest.param("", marks=pytest.mark.skip(reason="no other Python"))]
)
def test_install_on_other_pythons(version: str, sdist: Path, tmp_path: Path) -> None:
    """torch is for one Python alone here, so what is proved is the build and that its module loads."""
    subprocess.run([interpreters()[version], "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    interpreter = tmp_path / "venv" / "bin" / "python"
    pip_install(interpreter, sdist)
    done = subprocess.run([interpreter, "-c", LOADED, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "forward" in done.stdout
    assert "backward" in done.stdout


@pytest.mark.slow
def test_editable_install(sources: Path, python: Path, tmp_path: Path) -> None:
    pip_install(python, "--editable", sources)
    assert all(path.is_relative_to(sources) for path in probe(python, tmp_path))
    command = subprocess.run([python.with_name("posattn"), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert command.returncode == 0, command.stderr
    assert all(name in command.stdout for name in ("info", "check", "plot", "demo", "bench"))
