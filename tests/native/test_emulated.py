"""The kernels for ARM, cross-built and run by an emulator: every check of tests/native, and the numbers of x86."""

from __future__ import annotations

import platform
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.native.builds import driver, run, tool
from tests.native.test_sanitizers import ONE

# What the sums of two instruction sets may differ by, in roundings of one and of the result's largest value: twice what
# gradients that sum over a whole call were seen to differ by, and one step of a result that is rounded to half.
LIMITS = {
    "float32": 32.0 * torch.finfo(torch.float32).eps,
    "bfloat16": torch.finfo(torch.bfloat16).eps,
    "float16": torch.finfo(torch.float16).eps,
}


def results(path: Path) -> dict[str, Tensor]:
    """What `posattn_cases STEP FILE` wrote."""
    data, at, found = bytearray(path.read_bytes()), 0, {}
    while at < len(data):
        end = data.index(b"\n", at)
        name, _, count = data[at:end].decode().rpartition(" ")
        at = end + 1 + 4 * int(count)
        found[name] = torch.frombuffer(data[end + 1 : at] or bytearray(4), dtype=torch.float32)[: int(count)].double()
    return found


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="compares ARM with x86-64")
@pytest.mark.parametrize("step", [13, pytest.param(3, marks=pytest.mark.sweep)], ids=["some", "more"])
def test_arm_computes_what_x86_does(step: int, tmp_path: Path) -> None:
    compiler, emulator = tool("aarch64-linux-gnu-g++"), tool("qemu-aarch64")
    target = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={compiler}")
    arm = driver("emulated-aarch64", "posattn_cases", *target, "-DCMAKE_EXE_LINKER_FLAGS=-static")
    # The build of test_sanitizers.py: one of its own would take as long again.
    x86 = driver(f"sanitized-{sysconfig.get_platform()}-one", "posattn_sanitize", f"-DPOSATTN_ISAS={ONE}")
    run(emulator, arm, str(step), tmp_path / "arm")
    run(x86, str(step), tmp_path / "x86")

    got, expected = results(tmp_path / "arm"), results(tmp_path / "x86")
    assert list(got) == list(expected)
    assert len(got) > 200
    for name, values in expected.items():
        if name.startswith("far-products") and name.endswith(("dq", "dk")):
            continue  # where one key has all the weight, these are the rounding of zero times the scale
        finite = values.isfinite()
        assert torch.equal(got[name][~finite], values[~finite]), name
        if finite.any():
            scale, error = values[finite].abs().max().item(), (got[name] - values)[finite].abs().max().item()
            assert error <= LIMITS[name.split()[1]] * (1.0 + scale), f"{name}: {error:.3g} at a scale of {scale:.3g}"
