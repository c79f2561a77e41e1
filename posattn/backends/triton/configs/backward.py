"""Tiles of the backward kernels, by architecture, head dimension and kind of plan.

The main pass keeps k, v, dk and dv of its keys, and passes over dq of its queries: long in keys, since each block of
keys reads and writes dq once, and short in queries, whose tiles fill the remaining registers.
"""

from __future__ import annotations

from functools import partial

from posattn.backends.triton.configs.launch_config import LaunchConfig, Table, look_up
from posattn.plan import Call

_FLOAT32 = LaunchConfig(32, 32, 4, 1, "exact float32 products run on FMA units, unrolled: larger tiles spill")
_FLOAT32_WIDE = LaunchConfig(16, 16, 4, 1, "exact float32 at D = 256")
_SMALL = LaunchConfig(64, 64, 4, 2, "no spills with operands of every kind")

# Warps on both axes of the results read less of both operands: along the keys alone, 8 warps each read all of Q and dO.
_spread = partial(LaunchConfig, hide=True, spread=True, registers=255)
_SPREAD_128 = _spread(
    64, 128, 8, 1, "2P 3583, bound by shared memory; 4352 with warps along the keys alone, 32 queries"
)
_PROFILE_128 = _spread(32, 128, 8, 1, "2P 5954; before runs of tiles 7026, and 10228 with warps along 64 keys")
_SPREAD_256 = _spread(32, 64, 8, 1, "2P 10172, no spills; 64 queries 9592 and spills; 61256 with warps along 32 keys")
# At D = 512, K, V, Q and dO of 16 rows are 64 KiB, and dK and dV take 64 registers a thread. Not modelled.
_WIDER = {
    "plain": _spread(16, 16, 8, 1, "64 KiB of shared memory, which every architecture has"),
    "float32": LaunchConfig(16, 16, 8, 1, "exact float32 at D = 512"),
}
# In 99 KB of shared memory; "2P" is sm_80's.
_SMALL_128 = _spread(32, 128, 8, 1, "2P 4298; 64 queries need 128 KB")
_SMALL_256 = _spread(32, 32, 8, 1, "64 keys need 104 KB")

_WIDE_90 = LaunchConfig(
    32, 64, 8, 1, "a profile spilled 1188 bytes before runs of tiles; warps on both axes 4148 or 1724"
)

# Each element of dq must belong to one warp, since programs add to it in memory: a narrow head takes fewer warps.
_NARROW = {
    16: {"plain": LaunchConfig(32, 32, 1, 2, "dq of 16 dimensions is one warp's"), "float32": _FLOAT32},
    32: {"plain": LaunchConfig(32, 64, 2, 2, "dq of 32 dimensions is two warps'"), "float32": _FLOAT32},
}
_NARROW_90 = {
    32: {"plain": LaunchConfig(64, 64, 4, 2, "wgmma over 64 keys; warps share dq by its queries"), "float32": _FLOAT32},
}
MAIN: Table = {
    "sm_80": {
        **_NARROW,
        64: {
            "plain": LaunchConfig(32, 128, 4, 2, "2P 1746, bound by shared memory; 64 keys give 2650, 8 warps 2782"),
            "table": LaunchConfig(
                32, 128, 4, 2, "with its gradient 2P 2110; addresses carried along would spill", hide=True
            ),
            "profile": LaunchConfig(32, 128, 4, 2, "2P 3414 with all gradients; 64 keys gave 4142 for 3489", hide=True),
            "dense": LaunchConfig(32, 64, 4, 2, "registers"),
            "float32": _FLOAT32,
        },
        128: {"plain": _SPREAD_128, "profile": _PROFILE_128, "float32": _FLOAT32},
        256: {"plain": _SPREAD_256, "float32": _FLOAT32_WIDE},
        512: _WIDER,
    },
    "sm_90": {
        **_NARROW_90,
        64: {
            "plain": LaunchConfig(64, 128, 8, 2, "2P 1291, bound by shared memory, no spills; 128 queries spill"),
            "dense": LaunchConfig(64, 64, 4, 2, "registers"),
            "float32": _FLOAT32,
        },
        128: {
            "plain": LaunchConfig(64, 128, 8, 2, "2P 2093; invariants kept in registers would spill more", hoist=False),
            "float32": _FLOAT32,
        },
        256: {
            "plain": _spread(64, 64, 8, 1, "2P 8692; 32 queries 11476, with warps along the keys alone 12728"),
            "profile": _WIDE_90,
            "float32": _FLOAT32_WIDE,
        },
        512: _WIDER,
    },
    "gfx942": {
        **_NARROW,
        64: {"plain": LaunchConfig(32, 64, 4, 1, "LDS"), "float32": _FLOAT32},
        128: {"plain": LaunchConfig(32, 64, 4, 1, "LDS"), "float32": _FLOAT32},
        256: {"plain": LaunchConfig(32, 32, 4, 1, "LDS"), "float32": _FLOAT32_WIDE},
    },
}
MAIN = {
    **MAIN,
    "sm_86": {
        **MAIN["sm_80"],
        128: {**MAIN["sm_80"][128], "plain": _SMALL_128},
        256: {**MAIN["sm_80"][256], "plain": _SMALL_256},
    },
    "sm_100": {
        **MAIN["sm_90"],
        128: {
            **MAIN["sm_90"][128],
            "dense": LaunchConfig(64, 128, 8, 1, "128 KiB of shared memory; two stages take 241", hoist=False),
        },
        256: {"plain": _WIDE_90, "float32": _FLOAT32_WIDE},
    },
}

# Square, as the walk along diagonals needs.
_BIAS_WIDE = LaunchConfig(32, 32, 4, 1, "square; shared memory at D = 256")
BIASES: Table = {
    arch: {
        64: {"plain": _SMALL, "float32": _FLOAT32},
        128: {"plain": LaunchConfig(64, 64, 8, 1, "square; 4 warps spill at D = 128"), "float32": _FLOAT32},
        256: {"plain": _BIAS_WIDE, "float32": _FLOAT32_WIDE},
        512: {"plain": LaunchConfig(16, 16, 8, 1, "square; shared memory at D = 512"), "float32": _FLOAT32_WIDE},
    }
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942")
}


def main_config(arch: str, call: Call) -> LaunchConfig:
    return look_up(MAIN, arch, call)


def by_tile_config(arch: str, call: Call) -> LaunchConfig:
    return look_up(BIASES, arch, call)
