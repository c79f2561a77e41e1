"""Launch configurations: what one is, and which kind of call it is chosen for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from posattn.backends.common.operands import power_of_two
from posattn.plan import Call

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class LaunchConfig:
    """Tile shape, warps and pipeline stages. `reason` is the measured or modelled ground for these numbers: "2P" is
    the two-phase figure of the static pipe model, cycles for a 64 x 64 tile of one head, bf16, unmasked inner loop."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    reason: str
    # Whether invariants may leave the main loop (of kernels that ask): each then holds a register throughout.
    hoist: bool = True
    # Whether addresses are computed anew in each step, and none carried from step to step (of kernels that ask).
    hide: bool = False
    # Whether warps share both axes of every product's result (of kernels that ask), where Triton lays them along one.
    spread: bool = False
    # How many registers ptxas may give a thread (of NVIDIA's alone); None leaves it to ptxas, which at times stops far
    # below what the block could have, and spills.
    registers: int | None = None


# Tables of configurations: by family of architecture, padded head dimension, and kind of plan.
Table = Mapping[str, Mapping[int, Mapping[str, LaunchConfig]]]


def family(arch: str) -> str:
    """The architecture whose configurations serve `arch`: sm_90's and data-center Blackwell's have their own, the rest
    of NVIDIA's are like A100, sm_86 and its like with 99 KB of shared memory a block, and AMD's share one."""
    if not arch.startswith("sm_"):
        return "gfx942"
    number = int(arch.removeprefix("sm_"))
    if number in (100, 103):
        return "sm_100"
    if number in (86, 89, 120, 121):
        return "sm_86"
    return "sm_90" if number == 90 else "sm_80"


def configs_of(table: Table, arch: str) -> Mapping[int, Mapping[str, LaunchConfig]]:
    """The rows of a table for an architecture, those of sm_80 where sm_86 has none of its own."""
    of = family(arch)
    return table["sm_80"] if of == "sm_86" and of not in table else table[of]


def head_dim(call: Call) -> int:
    """The larger head dimension, as the kernels pad it."""
    return max(power_of_two(call.q.shape[3]), power_of_two(call.v.shape[3]))


def kinds(call: Call) -> list[str]:
    """What costs so much among the operands of a call that it may have one of its own."""
    bias = call.plan.bias
    if call.q.dtype == torch.float32:
        return ["float32"]
    found = {
        "profile": bias.profile is not None or call.q_positions is not None,
        "dense": bias.dense is not None or call.mask.boolean is not None or call.dropout_p > 0.0,
        "dense and boolean": bias.dense is not None and call.mask.boolean is not None,
        "table": bias.table is not None,
    }
    return [name for name, there in found.items() if there] or ["plain"]


def look_up(table: Table, arch: str, call: Call) -> LaunchConfig:
    """For a call: of its dimension's row (the next larger one) and its kinds' entries the one that takes least memory,
    or the plain one."""
    by_dim = configs_of(table, arch)
    dim = min(d for d in by_dim if d >= head_dim(call))
    configs = by_dim[dim]
    own = [configs[name] for name in kinds(call) if name in configs]
    return min(own, key=lambda own: own.block_m * own.block_n * own.num_stages, default=configs["plain"])
