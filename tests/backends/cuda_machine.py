"""The CUDA backend on the PTX machine: a fixture for each architecture. Compiled kernels are shared (conftest.py)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ptxsim.seam import Machine, behind_launch


@pytest.fixture
def cuda_machine() -> Iterator[Machine]:
    """CUDA launches run on the machine, as sm_80; a finding is an error."""
    yield from _machine(80)


@pytest.fixture
def sm90_machine() -> Iterator[Machine]:
    """The same as sm_90a."""
    yield from _machine(90)


def _machine(arch: int) -> Iterator[Machine]:
    pytest.importorskip("cuda.core")
    with behind_launch(arch) as machine:
        yield machine
