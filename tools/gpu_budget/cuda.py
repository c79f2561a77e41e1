"""Figures of the CUDA kernels that the package launches, for GPUs that need not be here.

    python -m tools.gpu_budget.cuda --arch sm_80 --match "D = 64"

The package's own host code runs on CPU tensors with a launch that notes the kernel instead of starting it, so sources,
constants and tiles are those that a GPU would get. The exit status is 1 if a loop with tensor-core instructions spills.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

import posattn
from posattn.backends.cuda import compiler
from posattn.backends.cuda import launch as seam
from posattn.backends.cuda.compiler import Kernel
from posattn.backends.cuda.constants import Constant, definitions
from posattn.backends.cuda.operands import HEAD_DIMS
from posattn.encodings.base import Encoding

from .measure import Figures, _nvidia

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
HEADS, TOKENS = 12, 2048


@dataclass(frozen=True)
class Case:
    """A call whose launches are measured: causal self-attention, or one query with `decode`; with `dense`, a bias
    tensor as well; with `page`, over keys in pages of so many tokens, forward alone."""

    label: str
    dim: int
    position: Callable[[int], Encoding | None]
    decode: bool = False
    dense: bool = False
    page: int = 0


def cases() -> Iterator[Case]:
    """Every head dimension and every kind of plan that makes a kernel of its own."""
    none: Callable[[int], Encoding | None] = lambda dim: None  # noqa: E731 - one of a row of lambdas
    slope: Callable[[int], Encoding | None] = lambda dim: posattn.ALiBi(HEADS, learnable=True)  # noqa: E731
    by_tile: Mapping[str, Callable[[int], Encoding | None]] = {
        "plain": none,
        "profile": lambda dim: posattn.FIRE(HEADS),
    }
    plans = {
        **by_tile,
        "slope": slope,
        "table": lambda dim: posattn.Kerple(HEADS),
        "rotary": lambda dim: posattn.RoPE(dim),
    }
    for dim in HEAD_DIMS:
        for name, position in (plans if dim in (64, 128) else by_tile).items():
            yield Case(f"{name}, D = {dim}", dim, position)
        if dim in (64, 128):
            yield Case(f"dense, D = {dim}", dim, none, dense=True)
        yield Case(f"decoding, slope, D = {dim}", dim, slope, decode=True)
        for page in (16, 128) if dim in (64, 128) else ():
            yield Case(f"pages of {page}, plain, D = {dim}", dim, none, page=page)
            yield Case(f"pages of {page}, decoding, slope, D = {dim}", dim, slope, decode=True, page=page)
    inner = {"nothing": lambda: None, "slope": lambda: slope(64), "table": lambda: posattn.Kerple(HEADS)}
    for name, make in inner.items():
        yield Case(f"mixed heads over {name}, D = 64", 64, lambda dim, make=make: posattn.DAPE(make(), HEADS))


@dataclass(frozen=True)
class Noted:
    """One launch: the kernel, the constants it was built with, its warps and its dynamic shared memory."""

    kernel: Kernel
    constants: Mapping[str, Constant]
    warps: int
    shared: int


def launches(case: Case, arch: str, backward: bool = False, dtype: torch.dtype = torch.bfloat16) -> list[Noted]:
    """What the package launches for `case`, forward (and backward)."""
    noted: list[Noted] = []
    constants: dict[int, Mapping[str, Constant]] = {}
    compile_kernel = compiler.compile_kernel

    def compile_(source: str, entry: str, struct: str, given: tuple[Any, ...], arch: str) -> Kernel:
        kernel = compile_kernel(source, entry, struct, given, arch)
        constants[id(kernel)] = dict(definitions(given))
        return kernel

    def launch(kernel: Kernel, grid: Sequence[int], block: Sequence[int], shared: int, arguments: Any) -> None:
        noted.append(Noted(kernel, constants[id(kernel)], block[0] // 32, shared))

    q_len = 1 if case.decode else TOKENS
    q = torch.zeros(1, HEADS, q_len, case.dim, dtype=dtype, requires_grad=backward)
    k, v = (torch.zeros(1, HEADS, TOKENS, case.dim, dtype=dtype, requires_grad=backward) for _ in range(2))
    bias = torch.zeros(1, HEADS, q_len, TOKENS, requires_grad=backward) if case.dense else None
    pages: dict[str, torch.Tensor] = {}
    if case.page:
        k, v = (x.view(HEADS, -1, case.page, case.dim).permute(1, 2, 0, 3) for x in (k, v))
        pages = {"block_table": torch.arange(k.shape[0])[None], "k_lengths": torch.tensor([TOKENS])}
    # One multiprocessor: keys are not split, so a call is one launch of the kernel in question.
    device = {"has_device": lambda _: True, "architecture": lambda _: arch, "processors": lambda _: 1}
    with (
        mock.patch.object(compiler, "compile_kernel", compile_),
        mock.patch.multiple(seam, launch=launch, **device),
    ):
        out = posattn.attention(q, k, v, case.position(case.dim), bias=bias, causal=True, backend="cuda", **pages)
        if backward:
            out.sum().backward()
    return noted


def figures(noted: Noted, arch: str) -> Figures:
    """Registers, spills and modelled cycles of one launch."""
    metadata = SimpleNamespace(name=noted.kernel.name, shared=noted.shared)
    compiled = SimpleNamespace(asm={"cubin": noted.kernel.cubin}, metadata=metadata)
    # The tiles of these, and of no others, are BLOCK_M x BLOCK_N logits of one head.
    one_head = noted.kernel.name in ("attention_forward", "attention_backward")
    tile = noted.constants.get("BLOCK_M", 0) * noted.constants.get("BLOCK_N", 0)
    return _nvidia(compiled, arch, tile if one_head else 0, noted.warps)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_budget.cuda", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="may be repeated (default: all)")
    parser.add_argument("--match", default="", help="only calls whose label holds this")
    parser.add_argument("--backward", action="store_true", help="the backward pass as well")
    given = parser.parse_args()
    print("| architecture | call | kernel | registers | spills (in loops), B | shared, B | two-phase | pipes |")
    print("|" + " --- |" * 8)
    spilling = 0
    for arch in given.arch or ARCHITECTURES:
        for case in cases():
            if given.match not in case.label:
                continue
            for noted in launches(case, arch, given.backward and not case.decode):
                found = figures(noted, arch)
                spilling += found.loop_spills > 0
                pipes = " ".join(f"{name} {cycles}" for name, cycles in found.pipes.items())
                spills = f"{found.spills} ({found.loop_spills})"
                columns = arch, case.label, noted.kernel.name, found.registers, spills, found.shared
                print("| " + " | ".join(map(str, (*columns, found.two_phase or "", pipes))) + " |", flush=True)
    return int(spilling > 0)


if __name__ == "__main__":
    sys.exit(main())
