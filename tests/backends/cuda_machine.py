"""The CUDA backend on the PTX machine: a fixture, and the tolerance rule for what a forward pass gives.

Kernels are compiled once in a test run: all workers share one cache, which starts empty.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import posattn
from posattn.encodings.base import Encoding
from posattn.parity import compare
from tests.ptxsim.seam import Machine, behind_launch


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder for compiled kernels; under xdist the parent of a worker's own folder is common to all."""
    base = tmp_path_factory.getbasetemp()
    return str((base.parent if base.name.startswith("popen-") else base) / "compiled")


@pytest.fixture
def cuda_machine(kernel_cache: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """CUDA launches run on the machine, as sm_80; a finding is an error."""
    yield from _machine(80, kernel_cache, monkeypatch)


@pytest.fixture
def sm90_machine(kernel_cache: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """The same as sm_90a."""
    yield from _machine(90, kernel_cache, monkeypatch)


def _machine(arch: int, kernel_cache: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    pytest.importorskip("cuda.core")
    monkeypatch.setenv("POSATTN_CACHE_DIR", kernel_cache)
    with behind_launch(arch) as machine:
        yield machine


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def assert_forward_parity(
    q: Tensor, k: Tensor, v: Tensor, position: Encoding | None = None, options: Mapping[str, Any] | None = None
) -> None:
    """out and lse of the CUDA backend keep the tolerance rule of posattn.parity, and both are written everywhere."""
    options = dict(options or {})
    exact_options = {name: _double(value) for name, value in options.items()}
    exact_position = None if position is None else copy.deepcopy(position).double()

    def run(backend: str, tensors: tuple[Tensor, ...], position: Encoding | None, options: Mapping[str, Any]) -> Any:
        torch.manual_seed(5)  # of dropout
        with torch.no_grad():
            return posattn.attention(*tensors, position, return_lse=True, backend=backend, **options)

    got = run("cuda", (q, k, v), position, options)
    naive = run("reference", (q, k, v), position, options)
    exact = run("reference", (q.double(), k.double(), v.double()), exact_position, exact_options)
    none = torch.zeros(1)
    found = [compare(name, *results, none, q.dtype) for name, *results in zip(("out", "lse"), got, naive, exact)]
    broken = [f"{c.name}: error {c.error:.3g}, allowed {c.allowed:.3g}; {c.worst}" for c in found if not c.ok]
    assert not broken, "\n".join(["outside the tolerance rule", *broken])
