"""A PTX kernel and its launch on CPU tensors: what a driver does with a cubin, done with PTX on the CPU."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch

from .build import load
from .tensors import Arena, extent

_native = load()
Unsupported = _native.Unsupported
Fault = _native.Fault

Argument = torch.Tensor | bool | int | float | bytes | None


class Findings(AssertionError):
    """The kernel did something that a GPU may punish; the message lists what and where."""


@dataclass(frozen=True)
class Options:
    """How a launch is run and what is checked.

    race, global_race: check shared and global memory for races. late: asynchronous copies land at their wait (the
    latest moment the ISA allows) instead of at once (the earliest). poison: fill shared memory with NaN patterns before
    each block. stats: count bank conflicts and sectors. perturb: move approximate functions by up to 2 ulp and let
    tensor cores truncate. reverse: run the blocks from the last to the first. tensor_strict: look for
    what the ISA asks of tcgen05 and Triton's kernels do without: fences beside barriers, wait::ld before a loaded
    register is used, no load of what nothing wrote. tensor_core: 0 lets mma sum in float64;
    80 or 90 lets it align, cut and round as measured on A100 and H100. limit: warp instructions until the launch is
    given up as endless (the default takes about a minute); 0 for none. seed: the order in which warps run.
    """

    race: bool = True
    global_race: bool = True
    late: bool = True
    poison: bool = True
    stats: bool = True
    perturb: bool = False
    reverse: bool = False
    tensor_strict: bool = False
    tensor_core: int = 0
    limit: int = 1_000_000_000
    seed: int = 1


@dataclass(frozen=True)
class Conflict:
    """A PTX instruction whose accesses to shared memory took more wavefronts (of 128 bytes) than they had to.

    main_loop: it lies in an innermost loop that holds a tensor-core instruction.
    """

    line: int
    text: str
    requests: int
    wavefronts: int
    ideal: int
    main_loop: bool


@dataclass(frozen=True)
class Report:
    """What a launch did. findings: kind -> count, only kinds that occurred; first: kind -> where it was first seen.
    With Options.stats, conflicts: the instructions with bank conflicts; lines: the PTX lines that were executed."""

    findings: Mapping[str, int]
    first: Mapping[str, str]
    counters: Mapping[str, int]
    opcodes: Mapping[str, int]
    conflicts: Sequence[Conflict] = field(default=())
    lines: frozenset[int] = frozenset()

    @property
    def main_loop_conflicts(self) -> list[Conflict]:
        """The bank conflicts inside loops that hold a tensor-core instruction (none means zero, if stats were on)."""
        return [conflict for conflict in self.conflicts if conflict.main_loop]

    def check(self, ignore: Sequence[str] = ()) -> None:
        """Raises Findings unless the launch was clean, leaving out the kinds in `ignore`."""
        bad = {kind: count for kind, count in self.findings.items() if kind not in ignore}
        if bad:
            lines = [f"{kind}: {count} ({self.first.get(kind, 'no place kept')})" for kind, count in bad.items()]
            raise Findings("the PTX machine found:\n  " + "\n  ".join(lines))


def _triple(name: str, size: Sequence[int]) -> tuple[int, int, int]:
    if not 1 <= len(size) <= 3 or any(n < 1 for n in size):
        raise ValueError(f"{name}: expected one to three positive sizes, got {tuple(size)}")
    x, y, z = (*size, 1, 1)[:3]
    return int(x), int(y), int(z)


def _pack(value: bool | int | float | bytes | None, size: int, name: str) -> bytes:
    if value is None:
        packed = bytes(size)
    elif isinstance(value, bytes | bytearray):
        packed = bytes(value)
    elif isinstance(value, float):
        packed = struct.pack("<f" if size == 4 else "<d", value)
    else:
        packed = (int(value) & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
    if len(packed) != size:
        kind = type(value).__name__
        raise ValueError(f"kernel parameter {name}: expected {size} bytes, got {len(packed)} from {kind}")
    return packed


class Kernel:
    """One entry point of a PTX module."""

    def __init__(self, ptx: str, entry: str = "") -> None:
        self._program = _native.Program(ptx, entry)
        self.name: str = self._program.name
        self.params: list[tuple[str, int, int]] = self._program.params

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Argument],
        *,
        shared: int = 0,
        options: Options | None = None,
        read_only: Sequence[int] = (),
        buffers: Sequence[torch.Tensor] = (),
        read_only_buffers: Sequence[torch.Tensor] = (),
    ) -> Report:
        """Runs every block of the grid to its end.

        args: one per kernel parameter, trailing ones may be left out (they are zero). Of a tensor, the bytes from its
        first to its last element may be touched; its index in `read_only` forbids writes. shared: bytes of dynamic
        shared memory. buffers and read_only_buffers: tensors that the kernel reaches through pointers inside a struct
        parameter, at multiples of 8 bytes in it. The kernel runs on copies that lie far apart, so that no overrun hits
        a neighbour; the pointers in structs are changed to match.
        """
        if len(args) > len(self.params):
            raise ValueError(f"args: {self.name} has {len(self.params)} parameters, got {len(args)} arguments")
        tensors = [(t, True) for t in buffers] + [(t, False) for t in read_only_buffers]
        tensors += [(a, i not in read_only) for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
        arena = Arena([tensor for tensor, _ in tensors])
        ranges = [(arena.address(tensor), extent(tensor)[1], writable) for tensor, writable in tensors]
        image = bytearray(self._program.param_bytes)
        for arg, (name, offset, size) in zip(args, self.params, strict=False):
            value = arena.address(arg) if isinstance(arg, torch.Tensor) else arg
            if isinstance(value, bytes):
                value = arena.moved(value)
            image[offset : offset + size] = _pack(value, size, name)
        sizes = _triple("grid", grid), _triple("block", block)
        raw = self._program.launch(*sizes, shared, bytes(image), ranges, asdict(options or Options()))
        arena.copy_back()
        raw["conflicts"] = [Conflict(*conflict) for conflict in raw["conflicts"]]
        raw["lines"] = frozenset(raw["lines"])
        return Report(**raw)
