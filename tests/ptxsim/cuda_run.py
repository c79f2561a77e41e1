"""Runs a CUDA kernel that takes one by-value parameter struct, as the CUDA backend launches its kernels.

    arguments = Arguments(struct.pack("QQi4x", q.data_ptr(), out.data_ptr(), n), tensors=(q, out), read_only=(q,))
    run_cuda(kernel, grid, block, shared_bytes, arguments).check()

The struct holds device pointers as 64-bit integers, which say nothing about what they point to; so the bytes travel
with the tensors (posattn.backends.cuda.params.Arguments). Of each tensor, what lies between its first and its last
element may be touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol
from unittest import mock

from posattn.backends.cuda import compiler
from posattn.backends.cuda.params import Arguments

from .kernel import Kernel, Options, Report


class CudaKernel(Protocol):
    """What a compiled kernel says of itself: PTX, the name of its entry, the architecture ("sm_90a")."""

    ptx: str
    name: str
    arch: str


@dataclass
class CompiledCuda:
    """A kernel ready to launch. Mutation tests replace `kernel`."""

    kernel: Kernel
    ptx: str


@cache
def parsed(ptx: str, name: str) -> CompiledCuda:
    """The entry `name` of a PTX module, parsed once in a process."""
    return CompiledCuda(Kernel(ptx, name), ptx)


def run_cuda(
    kernel: CudaKernel,
    grid: Sequence[int],
    block: Sequence[int],
    shared_bytes: int,
    arguments: Arguments,
    options: Options | None = None,
) -> Report:
    """Runs `kernel` on CPU tensors."""
    if not isinstance(arguments, Arguments):
        raise TypeError(f"arguments: expected bytes that carry their tensors, got {type(arguments).__name__}")
    kept = {id(tensor) for tensor in arguments.read_only}
    return parsed(kernel.ptx, kernel.name).kernel.launch(
        grid,
        block,
        [bytes(arguments)],
        shared=shared_bytes,
        options=options,
        buffers=[tensor for tensor in arguments.tensors if id(tensor) not in kept],
        read_only_buffers=arguments.read_only,
    )


_ptx_alone: dict[Any, compiler.Kernel] = {}


@contextmanager
def ptx_alone() -> Iterator[None]:
    """CUDA kernels compiled meanwhile have no machine code, which takes as long as all the rest and which the machine
    does not run. (tools/gpu_budget and its tests compile it.)"""
    if compiler.missing() is not None:
        yield
        return
    from cuda import core

    options, key = core.ProgramOptions, compiler._key

    def virtual(arch: str, **given: Any) -> Any:
        return options(arch=arch.replace("sm_", "compute_"), **given)

    with (
        mock.patch.object(core, "ProgramOptions", virtual),
        mock.patch.object(compiler, "_key", lambda *parts: f"{key(*parts)}-ptx"),
        mock.patch.object(compiler, "_kernels", _ptx_alone),
    ):
        yield


@contextmanager
def source_lines() -> Iterator[None]:
    """CUDA kernels compiled meanwhile say in their PTX which source line an instruction comes from. The instructions
    are the same, but the text is not, so it is kept in the disk cache under a name of its own."""
    if compiler.missing() is not None:
        yield
        return
    from cuda import core

    key = compiler._key
    with (
        mock.patch.object(core, "ProgramOptions", partial(core.ProgramOptions, lineinfo=True)),
        mock.patch.object(compiler, "_key", lambda *parts: f"{key(*parts)}-lines"),
        mock.patch.dict(compiler._kernels, clear=True),
        mock.patch.dict(_ptx_alone, clear=True),
    ):
        yield
