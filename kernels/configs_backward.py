"""Tiles of the backward kernels, by architecture, head dimension and kind of plan.

The main pass keeps k, v, dk and dv of its keys, and passes over dq of its queries: long in keys, since each block of
keys reads and writes dq once, and short in queries, whose tiles fill the remaining registers.
"""

from __future__ import annotations

from posattn.plan import Call

from .tiles import Table, Tile, look_up

_FLOAT32 = Tile(32, 32, 4, 1, "exact float32 products run on FMA units, unrolled: larger tiles spill")
_FLOAT32_WIDE = Tile(16, 16, 4, 1, "exact float32 at D = 256")
_HALF_80 = Tile(32, 64, 4, 2, "2P 5672, 22860 with 128 keys")
_PROFILE_80 = Tile(32, 64, 4, 2, "2P 10228, spills; 13666 with the 128 registers that ptxas takes", registers=255)
_SMALL = Tile(64, 64, 4, 2, "no spills with operands of every kind")

# Each element of dq must belong to one warp, since programs add to it in memory: a narrow head takes fewer warps.
_NARROW = {
    16: {"plain": Tile(32, 32, 1, 2, "dq of 16 dimensions is one warp's"), "float32": _FLOAT32},
    32: {"plain": Tile(32, 64, 2, 2, "dq of 32 dimensions is two warps'"), "float32": _FLOAT32},
}
_NARROW_90 = {
    32: {"plain": Tile(64, 64, 4, 2, "wgmma over 64 keys; warps share dq by its queries"), "float32": _FLOAT32},
}
MAIN: Table = {
    "sm_80": {
        **_NARROW,
        64: {
            "plain": Tile(32, 128, 4, 2, "2P 1783, bound by shared memory; 64 keys give 2650, 8 warps 2782"),
            "table": Tile(32, 128, 4, 2, "with its gradient 2P 2299; addresses carried along would spill", hide=True),
            "profile": Tile(32, 64, 4, 2, "registers"),
            "dense": Tile(32, 64, 4, 2, "registers"),
            "float32": _FLOAT32,
        },
        128: {
            "plain": Tile(32, 128, 8, 2, "2P 4352, bound by shared memory, no spills; 64 queries give 4235 and spill"),
            "profile": _PROFILE_80,
            "dense": _HALF_80,
            "float32": _FLOAT32,
        },
        256: {
            "plain": Tile(32, 32, 8, 1, "2P 61256 and spills; 199904 with the 32 that ptxas takes", registers=255),
            "float32": _FLOAT32_WIDE,
        },
    },
    "sm_90": {
        **_NARROW_90,
        64: {
            "plain": Tile(64, 128, 8, 2, "2P 1339, bound by shared memory, no spills; 128 queries spill"),
            "dense": Tile(64, 64, 4, 2, "registers"),
            "float32": _FLOAT32,
        },
        128: {
            "plain": Tile(64, 128, 8, 2, "2P 2127; invariants kept in registers would spill 212 bytes", hoist=False),
            "float32": _FLOAT32,
        },
        256: {"plain": Tile(32, 64, 8, 1, "shared memory"), "float32": _FLOAT32_WIDE},
    },
    "gfx942": {
        **_NARROW,
        64: {"plain": Tile(32, 64, 4, 1, "LDS"), "float32": _FLOAT32},
        128: {"plain": Tile(32, 64, 4, 1, "LDS"), "float32": _FLOAT32},
        256: {"plain": Tile(32, 32, 4, 1, "LDS"), "float32": _FLOAT32_WIDE},
    },
}
MAIN = {**MAIN, "sm_100": MAIN["sm_90"]}

# Square, as the walk along diagonals needs.
_BIAS_WIDE = Tile(32, 32, 4, 1, "square; shared memory at D = 256")
BIASES: Table = {
    arch: {
        64: {"plain": _SMALL, "float32": _FLOAT32},
        128: {"plain": Tile(64, 64, 8, 1, "square; 4 warps spill at D = 128"), "float32": _FLOAT32},
        256: {"plain": _BIAS_WIDE, "float32": _FLOAT32_WIDE},
    }
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942")
}


def main_tile(arch: str, call: Call) -> Tile:
    return look_up(MAIN, arch, call)


def bias_tile(arch: str, call: Call) -> Tile:
    return look_up(BIASES, arch, call)
