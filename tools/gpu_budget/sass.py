"""Machine code of NVIDIA kernels: disassembly and control flow. Uses the binaries that Triton bundles."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton.backends.nvidia as nvidia

from .flow import BasicBlock, connect

_BIN = Path(nvidia.__file__).parent / "bin"
_BRANCHES = ("BRA", "EXIT", "RET", "BRX", "JMP", "BREAK")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str | None
    text: str

    @property
    def opcode(self) -> str:
        """With its modifiers: "LDS.128"."""
        return self.text.split()[0]

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


@dataclass(frozen=True)
class Resources:
    """What a kernel takes: registers a thread, stack and shared memory in bytes."""

    registers: int
    stack: int
    shared: int


def _tool(name: str, *args: str) -> str:
    return subprocess.run([str(_BIN / name), *args], capture_output=True, text=True, check=True).stdout


def read(cubin: bytes, kernel: str) -> tuple[Resources, list[Instruction], dict[str, int]]:
    """The resources of `kernel`, its instructions, and its labels as indices of instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        listing = _tool("nvdisasm", "-c", file.name)
    found = re.search(rf"Function {re.escape(kernel)}:\s*\n\s*(.*)", usage)
    if not found:
        raise ValueError(f"kernel: {kernel!r} is not in the cubin")
    sizes = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", found[1])}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    inside = False
    for line in listing.split("\n"):
        section = re.match(r"\s*\.section\s+\.text\.(\S+?),", line)
        if section:
            inside = section[1] == kernel
        if not inside:
            continue
        if label := re.match(r"^(\.L_\S+):", line):
            labels[label[1]] = len(instructions)
        if code := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?(.*?)\s*;", line):
            instructions.append(Instruction(int(code[1], 16), code[2], code[3]))
    return Resources(sizes["REG"], sizes["STACK"], sizes["SHARED"]), instructions, labels


def _conditional(instruction: Instruction) -> bool:
    """Whether a branch may fall through: it has a predicate, or a uniform predicate that is not true by name."""
    if instruction.predicate is not None:
        return True
    uniform = re.match(r"BRA(?:\.\w+)*\s+!?U?P\w+", instruction.text)
    first = instruction.text.split(",")[0]
    return bool(uniform) and "UPT" not in first and " PT" not in first


def blocks(instructions: list[Instruction], labels: dict[str, int]) -> list[BasicBlock[Instruction]]:
    """Basic blocks in the order of the code, with their successors."""
    leaders = {0, *(index for index in labels.values() if index < len(instructions))}
    jumps: dict[int, tuple[int | None, bool]] = {}  # target, whether the next instruction may follow
    for i, instruction in enumerate(instructions):
        label = re.search(r"`\((\.L_\S+?)\)", instruction.text)
        target = labels.get(label[1]) if label else None
        if instruction.name == "CALL":
            # ptxas leaves some loops by a CALL that never returns, so it is an edge both ways.
            if target is not None:
                jumps[i] = (target, True)
                leaders.add(i + 1)
        elif instruction.name in _BRANCHES:
            jumps[i] = (target if instruction.name == "BRA" else None, _conditional(instruction))
            leaders.add(i + 1)
    return connect(instructions, leaders, jumps)


def width(opcode: str) -> int:
    """32-bit words that one lane's memory instruction moves."""
    return 4 if re.search(r"\.(128|F32x4)(\.|$)", opcode) else 2 if re.search(r"\.64(\.|$)", opcode) else 1
