"""A static model of one multiprocessor's pipes: cycles that a loop needs at least, from its instructions alone.

overlap: the busiest pipe. two_phase: max(tensor, shared memory) + max(MUFU, FMA, ALU, other issue slots), matrix and
softmax phases never overlapped. FlashAttention-2's published speeds are 0.77 to 0.90 of its two-phase figure (A100 and
H100, forward and backward) and FlashAttention-3's forward 0.94 to 0.99; none is faster. The model knows no bank
conflicts, latencies, caches, prologues or masked waste: compare its ratios, never read it as time.

Constants are results per clock and multiprocessor (A100 / H100): FP32 FMA 64 / 128, integer 64 / 64, MUFU 16 / 16,
shared memory 128 bytes, dense bf16 multiply-adds 1024 / 2048. Sources: OpenXLA's core tables citing NVIDIA's Best
Practices guide 13.0; the FlashAttention-3 paper (MUFU); H800 microbenchmark papers (wgmma, and
mma.sync at 0.62 of it).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from posattn.backends.common.arch import shared_memory

from .flow import BasicBlock, Loop
from .sass import Instruction, width


@dataclass(frozen=True)
class Gpu:
    """Cycles a warp instruction holds a pipe of a quarter multiprocessor, and the sizes that limit occupancy."""

    fma: int
    imad: int
    imad_in_half_fma: bool  # integer multiplies share half of the FMA pipe
    alu: int
    mufu: int
    macs: int  # tensor-core multiply-adds a cycle and quarter
    mma_sync: float  # the share of them that mma.sync reaches
    shared: int
    registers: int = 65536
    max_warps: int = 64
    max_blocks: int = 32


GPUS = {
    "sm_80": Gpu(2, 2, False, 2, 8, 256, 1.0, shared_memory("sm_80").multiprocessor),
    "sm_90": Gpu(1, 2, True, 2, 8, 512, 0.62, shared_memory("sm_90").multiprocessor),
}

TENSOR = ("HMMA", "IMMA", "BMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA")
_PIPES = {
    "mufu": "MUFU I2F F2I F2F FRND POPC FLO BREV",
    "fma": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 HFMA2 HADD2 HMUL2",
    "memory": "LDS LDSM STS STSM LDGSTS SHFL ATOMS LDG STG LDL STL RED REDG ATOM ATOMG LD ST UTMALDG UBLKCP SYNCS "
    "UTMASTG UTMAREDG",
    "constant": "LDC LDCU S2R S2UR CS2R ULDC R2UR",
    "control": "BRA BAR DEPBAR LDGDEPBAR WARPSYNC NOP EXIT BSSY BSYNC WARPGROUP WARPGROUPSET CALL RET YIELD BREAK "
    "MEMBAR FENCE ERRBAR CCTL ELECT",
    "tensor": " ".join(TENSOR),
}
_PIPE_OF = {name: pipe for pipe, names in _PIPES.items() for name in names.split()}
_WIDE_ACCESS = frozenset(
    ["LDS", "STS", "LDGSTS", "LDG", "STG", "LDL", "STL", "LD", "ST", "SHFL", "ATOMS", "RED", "REDG"]
)
_HMMA_MACS = {"16816": 2048, "1688": 1024, "1684": 512}


@dataclass(frozen=True)
class Cycles:
    """Cycles of one loop iteration on a full multiprocessor, by pipe."""

    pipes: dict[str, float]
    two_phase: float
    tensor_instructions: int

    @property
    def overlap(self) -> float:
        return max(self.pipes.values())


def _pipe(instruction: Instruction) -> str:
    name = instruction.name
    if name.startswith("IMAD"):
        return "imad"
    if name in _PIPE_OF:
        return _PIPE_OF[name]
    return "uniform" if name[0] == "U" else "alu"


def _macs(opcode: str) -> int:
    """Multiply-adds of one warp's part of a matrix instruction."""
    if shape := re.search(r"\.(\d+)x(\d+)x(\d+)", opcode):
        return int(shape[1]) * int(shape[2]) * int(shape[3]) // 4
    shape = re.match(r"HMMA\.(\d+)", opcode)
    return _HMMA_MACS.get(shape[1], 0) if shape else 0


def _wavefronts(instruction: Instruction) -> float:
    """Cycles of the shared-memory data path (128 bytes each) that one warp's instruction takes without conflicts."""
    opcode, name = instruction.opcode, instruction.name
    if name in ("LDSM", "STSM"):
        count = re.search(r"\.(\d)$", opcode)
        return int(count[1]) if count else 1
    if name in ("HGMMA", "IGMMA", "QGMMA"):
        # One instruction serves a warpgroup: B comes from shared memory, and A does unless it has registers.
        shape = re.search(r"\.(\d+)x(\d+)x(\d+)", opcode)
        if not shape:
            return 0
        m, n, k = (int(size) for size in shape.groups())
        element = 1 if name == "QGMMA" else 2
        operands = instruction.text.split(None, 1)[1].split(",")
        from_shared = operands[1].strip().startswith("gdesc")
        return (n * k + (m * k if from_shared else 0)) * element / 128 / 4
    return width(opcode) if name in _WIDE_ACCESS else 0


def cycles(instructions: list[Instruction], gpu: Gpu, warps: int) -> Cycles:
    """What `warps` resident warps need for one pass over `instructions`."""
    count: Counter[str] = Counter()
    names: Counter[str] = Counter()
    macs = 0
    wavefronts = 0.0
    for instruction in instructions:
        never = instruction.predicate == "!PT"  # ptxas pads with these: an issue slot, nothing more
        pipe = "control" if never else _pipe(instruction)
        count[pipe] += 1
        names["NOP" if never else instruction.name] += 1
        if not never:
            macs += _macs(instruction.opcode)
            wavefronts += _wavefronts(instruction)
    quarter = warps / 4
    fma, imad = count["fma"] * gpu.fma, count["imad"]
    heavy = max(imad * gpu.imad, fma + imad * gpu.fma) if gpu.imad_in_half_fma else fma + imad * gpu.imad
    reached = 1.0 if names["HGMMA"] else gpu.mma_sync
    pipes = {
        "tensor": quarter * macs / gpu.macs / reached,
        "mufu": quarter * count["mufu"] * gpu.mufu,
        "fma": quarter * heavy,
        "alu": quarter * count["alu"] * gpu.alu,
        "shared": warps * wavefronts,
        "issue": quarter * sum(count.values()),
    }
    rest = quarter * (sum(count.values()) - count["tensor"] - names["LDSM"] - names["NOP"])
    two_phase = max(pipes["tensor"], pipes["shared"]) + max(pipes["mufu"], pipes["fma"], pipes["alu"], rest)
    return Cycles(pipes, two_phase, count["tensor"])


def occupancy(gpu: Gpu, registers: int, shared: int, warps: int) -> int:
    """Blocks of `warps` warps that fit on a multiprocessor."""
    per_warp = (registers * 32 + 255) // 256 * 256
    by_registers = 4 * (gpu.registers // 4 // per_warp) // warps
    by_shared = gpu.shared // (shared + 1024) if shared else gpu.max_blocks
    return min(gpu.max_warps // warps, gpu.max_blocks, by_registers, by_shared)


def steady_state(loop: Loop, graph: list[BasicBlock[Instruction]]) -> list[Instruction]:
    """What a long loop runs each time: the blocks of every iteration and those that prefetch, masks left out."""
    prefetch = ("LDGSTS", "UTMALDG", "UBLKCP")
    chosen = [
        i for i in sorted(loop.body) if i in loop.always or any(x.name in prefetch for x in graph[i].instructions)
    ]
    return [instruction for i in chosen for instruction in graph[i].instructions]
