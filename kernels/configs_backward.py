"""Tiles of the backward kernels, by architecture, head dimension and kind of plan.

The pass over queries keeps q, grad_out and dq of its rows; the pass over keys keeps k, v, dk and dv, so it holds twice
the accumulators and prefers few queries to a step.
"""

from __future__ import annotations

from posattn.plan import Call

from .tiles import Table, Tile, look_up

_FLOAT32 = Tile(32, 32, 4, 1, "exact float32 products run on FMA units, unrolled: larger tiles spill")
_FLOAT32_WIDE = Tile(16, 16, 4, 1, "exact float32 at D = 256")
_SMALL = Tile(64, 64, 4, 2, "no spills with operands of every kind")

QUERIES: Table = {
    "sm_80": {
        64: {
            "plain": Tile(128, 32, 4, 3, "2P 1024 at D = 64, bound by tensor cores, no spills; [64, 64] gives 1280"),
            "profile": Tile(64, 32, 4, 2, "registers"),
            "dense": _SMALL,
            "float32": _FLOAT32,
        },
        128: {
            "plain": Tile(128, 32, 8, 2, "registers"),
            "profile": Tile(64, 32, 4, 2, "registers"),
            "float32": _FLOAT32,
        },
        256: {"plain": Tile(64, 32, 8, 1, "registers and shared memory"), "float32": _FLOAT32_WIDE},
    },
    "sm_90": {
        64: {
            "plain": Tile(128, 128, 8, 2, "2P 640 at D = 64, bound by tensor cores; [128, 64] gives 650"),
            "profile": Tile(128, 64, 8, 2, "registers"),
            "dense": Tile(128, 64, 8, 2, "registers"),
            "float32": _FLOAT32,
        },
        128: {"plain": Tile(128, 64, 8, 2, "registers"), "float32": _FLOAT32},
        256: {"plain": Tile(64, 32, 4, 1, "shared memory"), "float32": _FLOAT32_WIDE},
    },
    "gfx942": {
        64: {"plain": Tile(64, 64, 4, 1, "LDS"), "float32": _FLOAT32},
        128: {"plain": Tile(64, 32, 4, 1, "LDS"), "float32": _FLOAT32},
        256: {"plain": Tile(32, 32, 4, 1, "LDS"), "float32": _FLOAT32_WIDE},
    },
}
QUERIES = {**QUERIES, "sm_100": QUERIES["sm_90"]}

KEYS: Table = {
    "sm_80": {
        64: {
            "plain": Tile(32, 128, 4, 2, "2P 1313 at D = 64, bound by tensor cores; [64, 64] gives 1714"),
            "profile": Tile(32, 64, 4, 2, "registers"),
            "dense": Tile(32, 64, 4, 2, "registers"),
            "float32": _FLOAT32,
        },
        128: {"plain": Tile(32, 64, 4, 2, "registers"), "float32": _FLOAT32},
        256: {"plain": Tile(32, 32, 8, 1, "registers and shared memory"), "float32": _FLOAT32_WIDE},
    },
    "sm_90": {
        64: {
            "plain": Tile(64, 128, 8, 3, "2P 942 at D = 64, bound by shared memory; no spills in the loop"),
            "profile": Tile(64, 64, 4, 2, "registers"),
            "dense": Tile(64, 64, 4, 2, "registers"),
            "float32": _FLOAT32,
        },
        128: {"plain": Tile(64, 128, 8, 2, "registers"), "float32": _FLOAT32},
        256: {"plain": Tile(32, 64, 8, 1, "shared memory"), "float32": _FLOAT32_WIDE},
    },
    "gfx942": {
        64: {"plain": Tile(32, 64, 4, 1, "LDS"), "float32": _FLOAT32},
        128: {"plain": Tile(32, 64, 4, 1, "LDS"), "float32": _FLOAT32},
        256: {"plain": Tile(32, 32, 4, 1, "LDS"), "float32": _FLOAT32_WIDE},
    },
}
KEYS = {**KEYS, "sm_100": KEYS["sm_90"]}

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


def query_tile(arch: str, call: Call) -> Tile:
    return look_up(QUERIES, arch, call)


def key_tile(arch: str, call: Call) -> Tile:
    return look_up(KEYS, arch, call)


def bias_tile(arch: str, call: Call) -> Tile:
    return look_up(BIASES, arch, call)
