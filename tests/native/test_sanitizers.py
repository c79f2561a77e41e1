"""The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer, over the edge cases of tests/native."""

from __future__ import annotations

import platform
import sys
import sysconfig

import pytest

from tests.native.builds import ALWAYS_TILES, driver, run

# One instruction set of this machine's, whose vectors are long enough to read past an end; then all that differ.
# (avx512bf16 holds the avx512 code too.) Emulated tiles, of which the sanitizers see what they touch, are slow.
X86 = platform.machine() in ("x86_64", "AMD64")
ONE, EVERY = ("avx2", "baseline;avx2;avx512bf16") if X86 else ("neon", "neon")


@pytest.mark.skipif(sys.platform != "linux", reason="built with the sanitizers of GCC and Clang on Linux")
@pytest.mark.parametrize("isas", [ONE, pytest.param(EVERY, marks=pytest.mark.slow)], ids=["one", "every"])
def test_kernels_under_sanitizers(isas: str, request: pytest.FixtureRequest) -> None:
    folder = f"sanitized-{sysconfig.get_platform()}-{request.node.callspec.id}"
    run(driver(folder, "posattn_sanitize", f"-DPOSATTN_ISAS={isas}"))


@pytest.mark.skipif(sys.platform != "linux" or not X86, reason="as above, for x86-64")
@pytest.mark.parametrize(
    "step", [pytest.param("31", marks=pytest.mark.slow), pytest.param("9", marks=pytest.mark.sweep)]
)
def test_tiles_under_sanitizers(step: str) -> None:
    folder = f"sanitized-{sysconfig.get_platform()}-tiles"
    run(driver(folder, "posattn_sanitize", "-DPOSATTN_ISAS=baseline;amx_emulated", ALWAYS_TILES), step)
