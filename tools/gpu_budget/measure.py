"""Compiles one launch for an architecture that need not be present, and reads its figures from the machine code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.ptxsim.triton_run import launch_options, specialise

from . import amdgcn, sass
from .flow import loops
from .pipes import GPUS, TENSOR, cycles, occupancy, steady_state

_TILE = 64 * 64


@dataclass(frozen=True)
class Figures:
    """Of one compiled kernel. spills: bytes a thread stores to and loads from local memory, whole kernel and inside
    its tensor-core loops. tensor: tensor-core instructions. two_phase, overlap and pipes: modelled cycles of the
    leanest tensor-core loop for 64 x 64 logits of one head (None where no model or no such loop exists)."""

    registers: int
    spills: int
    loop_spills: int
    shared: int
    blocks: int | None
    tensor: int
    two_phase: float | None = None
    overlap: float | None = None
    pipes: Mapping[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compile_for(
    arch: str,
    kernel: Any,
    args: Sequence[Any],
    constexprs: Mapping[str, Any],
    warps: int,
    stages: int,
    registers: int | None,
) -> Any:
    """Triton's compiled kernel for "sm_80", ..., or "gfx942"."""
    signature, constants, attrs, _ = specialise(kernel, args, constexprs)
    target = GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=target, options=launch_options(warps, stages, registers))


def _spilled(instructions: Sequence[sass.Instruction]) -> int:
    # LOCAL of the resource table also counts arrays; the instructions are what costs.
    return sum(4 * sass.width(x.opcode) for x in instructions if x.name in ("STL", "LDL"))


def _nvidia(compiled: Any, arch: str, tile: int, warps: int) -> Figures:
    resources, instructions, labels = sass.read(compiled.asm["cubin"], compiled.metadata.name)
    graph = sass.blocks(instructions, labels)
    shared = compiled.metadata.shared
    gpu = GPUS.get(arch)
    resident = occupancy(gpu, resources.registers, shared, warps) if gpu else None
    loop_spills, best = 0, None
    for loop in loops(graph):
        body = [x for i in loop.body for x in graph[i].instructions]
        if not any(x.name in TENSOR for x in body):
            continue
        loop_spills = max(loop_spills, _spilled(body))
        if not gpu or not resident or not tile:
            continue
        found = cycles(steady_state(loop, graph), gpu, warps * resident)
        if found.tensor_instructions and (best is None or found.two_phase < best.two_phase):
            best = found
    tensor = sum(x.name in TENSOR for x in instructions)
    spills = _spilled(instructions)
    if best is None or not resident:
        return Figures(resources.registers, spills, loop_spills, shared, resident, tensor)
    scale = _TILE / (tile * resident)
    pipes = {name: round(value * scale) for name, value in best.pipes.items()}
    two_phase, overlap = round(best.two_phase * scale), round(best.overlap * scale)
    return Figures(resources.registers, spills, loop_spills, shared, resident, tensor, two_phase, overlap, pipes)


def _amd(compiled: Any) -> Figures:
    found = amdgcn.read(compiled.asm["amdgcn"])
    return Figures(found.registers, found.spills, found.loop_spills, compiled.metadata.shared, None, found.tensor)


def measure(
    arch: str,
    kernel: Any,
    args: Sequence[Any],
    constexprs: Mapping[str, Any],
    warps: int,
    stages: int,
    registers: int | None = None,
) -> Figures:
    """The figures of one launch. Its tile is BLOCK_M x BLOCK_N logits, for HeadMix of all (padded) heads."""
    compiled = compile_for(arch, kernel, args, constexprs, warps, stages, registers)
    if not arch.startswith("sm_"):
        return _amd(compiled)
    tile = constexprs.get("BLOCK_M", 0) * constexprs.get("BLOCK_N", 0)
    tile *= getattr(constexprs.get("CONFIG"), "heads", 1)
    return _nvidia(compiled, arch, tile, compiled.metadata.num_warps)
