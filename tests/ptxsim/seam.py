"""The machine behind the package's launch seam: GPU backends run on CPU tensors, their wrappers unchanged.

    with behind_launch(arch=80) as machine:
        out = posattn.attention(q, k, v, position, backend="triton")
    machine.launches  # one per kernel start, with its report

Every launch compiles the kernel for the chosen architecture (once per specialisation and process) and runs the PTX that
a GPU would get. A finding of the machine is an error at the launch that caused it, with the kernel's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch

from .cuda_run import CompiledCuda, parsed, ptx_alone, run_cuda
from .kernel import Findings, Options, Report
from .triton_run import Compiled, compile_triton

# Multiprocessors of an A100, an H100 and a B200 (SXM): what wrappers see when they choose how to split work.
_PROCESSORS = {80: 108, 90: 132, 100: 148}


@dataclass(frozen=True)
class Launched:
    """One kernel start and what it did. A CUDA kernel has no constexprs: they are in its source."""

    kernel: str
    grid: tuple[int, ...]
    constexprs: Mapping[str, Any]
    compiled: Compiled | CompiledCuda
    report: Report


@dataclass
class Machine:
    """Stands in for a GPU of architecture `arch` (80, 90 or 100). ignore: kinds of findings that are let through."""

    arch: int
    options: Options = field(default_factory=lambda: Options(stats=False))
    ignore: Sequence[str] = ()
    launches: list[Launched] = field(default_factory=list)

    def launch(
        self,
        kernel: Any,
        grid: Sequence[int],
        args: Sequence[Any],
        constexprs: Mapping[str, Any],
        num_warps: int,
        num_stages: int,
        registers: int | None = None,
    ) -> None:
        compiled, passed = compile_triton(
            kernel,
            args,
            arch=self.arch,
            num_warps=num_warps,
            num_stages=num_stages,
            registers=registers,
            constexprs=constexprs,
        )
        report = compiled.launch(grid, passed, self.options)
        self._note(Launched(kernel.__name__, tuple(grid), dict(constexprs), compiled, report))

    def launch_cuda(
        self, kernel: Any, grid: Sequence[int], block: Sequence[int], shared_bytes: int, arguments: Any
    ) -> None:
        """Takes the place of posattn.backends.cuda.launch.launch."""
        if re.sub(r"\D", "", kernel.arch) != str(self.arch):
            raise ValueError(f"kernel.arch: expected sm_{self.arch}, got {kernel.arch!r}")
        report = run_cuda(kernel, grid, block, shared_bytes, arguments, self.options)
        self._note(Launched(kernel.name, tuple(grid), {}, parsed(kernel.ptx, kernel.name), report))

    def _note(self, launched: Launched) -> None:
        self.launches.append(launched)
        try:
            launched.report.check(self.ignore)
        except Findings as error:
            raise Findings(f"{launched.kernel}{launched.grid} on sm_{self.arch}: {error}") from None

    def has_device(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def architecture(self, device: torch.device) -> str:
        return f"sm_{self.arch}"

    def processors(self, device: torch.device) -> int:
        return _PROCESSORS[self.arch]


@contextmanager
def behind_launch(arch: int = 80, options: Options | None = None, ignore: Sequence[str] = ()) -> Iterator[Machine]:
    """Puts the machine in the place of the GPU for everything that goes through the launch seams of the backends,
    posattn.backends.triton.launch (Triton) and posattn.backends.cuda.launch (CUDA)."""
    from posattn.backends.cuda import launch as cuda_launch
    from posattn.backends.triton import launch as triton_launch

    if arch not in _PROCESSORS:
        raise ValueError(f"arch: expected one of {sorted(_PROCESSORS)}, got {arch!r}")
    machine = Machine(arch, options or Options(stats=False), tuple(ignore))
    device = {name: getattr(machine, name) for name in ("has_device", "architecture", "processors")}
    with (
        mock.patch.multiple(triton_launch, launch=machine.launch, **device),
        mock.patch.multiple(cuda_launch, launch=machine.launch_cuda, **device),
        ptx_alone(),
    ):
        yield machine


@pytest.fixture(params=(80, 90), ids=lambda arch: f"sm_{arch}")
def ptx_machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A test that asks for this runs its GPU launches on the machine, once for each architecture."""
    with behind_launch(request.param) as machine:
        yield machine
