"""Assembly of AMD kernels as LLVM writes it: control flow, matrix instructions, and what goes to scratch memory.

Scalar registers that do not fit are kept in lanes of vector registers (v_writelane), which costs instructions and no
memory; the count that LLVM gives as sgpr_spill_count is theirs. Only scratch accesses are spills here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .flow import BasicBlock, connect, loops

_BYTES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


@dataclass(frozen=True)
class Counts:
    """Registers of a lane (vector and accumulation registers share one file), bytes that a lane moves to and from
    scratch in the whole kernel and in its matrix loops, matrix instructions."""

    registers: int
    spills: int
    loop_spills: int
    tensor: int


def blocks(text: str) -> list[BasicBlock[str]]:
    """Basic blocks of the one kernel in `text`; instructions are lines without comments."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.split("\n"):
        code = line.split(";")[0].strip()
        if code.startswith(".amdhsa_kernel"):
            break
        if label := re.fullmatch(r"(\.?\w+):", code):
            labels[label[1]] = len(instructions)
        elif re.match(r"[a-z]", code):
            instructions.append(code)
    leaders, jumps = {0}, {}
    for i, code in enumerate(instructions):
        name, *operands = code.split()
        if name == "s_endpgm" or name.startswith(("s_branch", "s_cbranch")):
            jumps[i] = (labels[operands[0]] if operands else None, name.startswith("s_cbranch"))
            leaders |= {i + 1, *([labels[operands[0]]] if operands else [])}
    return connect(instructions, leaders, jumps)


def _scratch(instructions: list[str]) -> int:
    found = (re.match(r"scratch_(?:load|store)_(\w+?)(?:_d16\w*)?\s", code) for code in instructions)
    return sum(_BYTES[re.sub(r"^[us]?(byte|short)$", r"\1", access[1])] for access in found if access)


def _tensor(instructions: list[str]) -> int:
    return sum(code.startswith("v_mfma") for code in instructions)


def read(text: str) -> Counts:
    """The figures of the kernel in `text`."""
    graph = blocks(text)
    bodies = [[code for i in loop.body for code in graph[i].instructions] for loop in loops(graph)]
    whole = [code for block in graph for code in block.instructions]
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    if registers is None:
        raise ValueError("text: expected the assembly of a kernel with its metadata, got no .vgpr_count")
    in_loops = max((_scratch(body) for body in bodies if _tensor(body)), default=0)
    return Counts(int(registers[1]), _scratch(whole), in_loops, _tensor(whole))
