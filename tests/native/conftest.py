"""Instruction sets as a fixture."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from posattn import _cpu


@pytest.fixture(params=_cpu.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the native module that this processor can run, in use."""
    chosen = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(chosen)
