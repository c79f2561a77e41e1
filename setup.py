"""Builds posattn._cpu by calling CMake, which describes the whole native build. The rest is in pyproject.toml."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configure, build and install the CMake project into the place where setuptools expects the extension."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        # One place for every kind of build, so that each is incremental: pip's editable ones have a new build_temp.
        build = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        cmake = _tool("cmake")
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            # Given anew each time: an isolated build leaves paths in the cache that are gone at the next build.
            f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        for command in (
            configure,
            [cmake, "--build", str(build), *(["--parallel", str(self.parallel)] if self.parallel else [])],
            [cmake, "--install", str(build), "--prefix", str(destination)],
        ):
            subprocess.run(command, check=True)

    def copy_extensions_to_source(self) -> None:
        # A new file in place of the old: writing over the module would crash the processes that have it loaded.
        for ext in self.extensions:
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()


def _tool(name: str) -> str:
    """A build tool: on the path, as build isolation puts it, or beside the interpreter of a venv not activated."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts")) or name


setup(ext_modules=[Extension("posattn._cpu", sources=[])], cmdclass={"build_ext": CMakeBuild})
