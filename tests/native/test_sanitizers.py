"""The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer, over the edge cases of tests/native."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# In the repository's build folder, so that the next run compiles what changed and no more.
BUILD = ROOT / "build" / f"sanitized-{sysconfig.get_platform()}"


def tool(name: str) -> str:
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here")
    return found


# One instruction set of this machine's, whose vectors are long enough to read past an end; then all that differ.
# (avx512bf16 holds the avx512 code too.)
X86 = platform.machine() in ("x86_64", "AMD64")
ONE, EVERY = ("avx2", "baseline;avx2;avx512bf16") if X86 else ("neon", "neon")


@pytest.mark.skipif(sys.platform != "linux", reason="built with the sanitizers of GCC and Clang on Linux")
@pytest.mark.parametrize("isas", [ONE, pytest.param(EVERY, marks=pytest.mark.slow)], ids=["one", "every"])
def test_kernels_under_sanitizers(isas: str, request: pytest.FixtureRequest) -> None:
    cmake, ninja = tool("cmake"), tool("ninja")
    options = ["-DPOSATTN_BUILD_MODULE=OFF", "-DPOSATTN_BUILD_SANITIZED=ON", f"-DPOSATTN_ISAS={isas}"]
    build = BUILD / request.node.callspec.id
    for command in (
        [cmake, "-S", ROOT, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *options],
        [cmake, "--build", build, "--target", "posattn_sanitize"],
        [build / "tests" / "native" / "posattn_sanitize"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
