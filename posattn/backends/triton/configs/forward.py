"""Tiles of the forward kernel, by architecture, head dimension and kind of plan.

sm_100 runs the sm_90 shapes: Triton's tcgen05 path wants a warpgroup of 128 rows as well, and no timing says better.
gfx942 has 64 KiB of shared memory per workgroup and wavefronts of 64, so 4 warps and one stage.
"""

from __future__ import annotations

from dataclasses import replace

from posattn.backends.common.operands import q_max
from posattn.backends.triton.configs.launch_config import LaunchConfig, Table, head_dim, look_up
from posattn.plan import Call

_FLOAT32 = LaunchConfig(32, 32, 4, 1, "exact float32 products run on FMA units, unrolled: larger tiles spill")
_SMALL_80 = LaunchConfig(
    128, 64, 4, 3, "2P 784 at D = 64, bound by tensor cores; 32 rows a warp halve the K and V fragments"
)
_SM90 = LaunchConfig(
    128, 128, 8, 2, "2P 520 at D = 64, bound by MUFU; 128 keys hide LDGSTS behind wgmma, 64 keys give 560"
)
_AMD = LaunchConfig(128, 64, 4, 1, "K, V and P tiles within 64 KiB of LDS")

# At D = 512 a row of the output takes as many registers as four do at 128. Not modelled.
_WIDER = {
    "plain": LaunchConfig(32, 16, 4, 1, "within 64 KiB of shared memory, which every architecture has"),
    "float32": LaunchConfig(16, 16, 4, 1, "exact float32, as above"),
}

FORWARD: Table = {
    "sm_80": {
        64: {
            "plain": _SMALL_80,
            "profile": LaunchConfig(128, 64, 4, 2, "2P 812, no spills; a third stage gives 826"),
            "dense": LaunchConfig(128, 32, 4, 2, "a [128, 64] bias tile in both layouts spills"),
            "float32": _FLOAT32,
        },
        128: {
            "plain": LaunchConfig(
                128, 32, 4, 2, "2P 1440, bound by tensor cores; 3 stages give 1490, 8 warps of 16 rows 1628"
            ),
            "profile": LaunchConfig(128, 32, 4, 2, "2P 1574, no spills; 8 warps of 16 rows and 64 keys 1768"),
            "dense": LaunchConfig(64, 32, 4, 2, "registers"),
            "float32": _FLOAT32,
        },
        512: _WIDER,
        256: {
            "plain": LaunchConfig(64, 32, 4, 2, "96 KiB of shared memory, so that sm_86 and sm_89 hold it too"),
            "float32": LaunchConfig(32, 16, 4, 1, "exact float32, as above"),
        },
    },
    "sm_90": {
        64: {
            "plain": _SM90,
            "profile": LaunchConfig(128, 128, 8, 2, "2P 613, no spills"),
            "dense": LaunchConfig(128, 64, 8, 2, "registers"),
            "float32": _FLOAT32,
        },
        128: {
            "plain": LaunchConfig(128, 128, 8, 2, "2P 776 at D = 128, bound by tensor cores; 64 keys give 917"),
            "profile": LaunchConfig(128, 128, 8, 2, "2P 872, no spills"),
            "dense": LaunchConfig(128, 64, 8, 2, "registers"),
            "float32": _FLOAT32,
        },
        512: _WIDER,
        256: {
            "plain": LaunchConfig(128, 64, 8, 2, "64 + 2 x 64 KiB of shared memory"),
            "dense and boolean": LaunchConfig(64, 64, 4, 2, "both with 128 queries take 240 KiB; 32 keys are slower"),
            "float32": LaunchConfig(32, 16, 4, 1, "exact float32, as above"),
        },
    },
    "gfx942": {
        64: {"plain": _AMD, "float32": _FLOAT32},
        128: {"plain": LaunchConfig(128, 32, 4, 1, "LDS"), "float32": _FLOAT32},
        256: {
            "plain": LaunchConfig(64, 32, 4, 1, "LDS"),
            "float32": LaunchConfig(32, 16, 4, 1, "exact float32, as above"),
        },
    },
}
FORWARD = {**FORWARD, "sm_100": FORWARD["sm_90"]}

# Decoding has few rows: a tile of them wastes tensor-core rows past Tq, which cost nothing beside reading the keys.
FEW_ROWS = 16
_DECODE = LaunchConfig(16, 64, 4, 3, "reading K and V binds: three stages of 64 keys in flight")
_DECODE_NARROW = LaunchConfig(16, 64, 1, 3, "a [16, 16] output is one warp's: more would each store it whole")
_DECODE_WIDE = LaunchConfig(16, 32, 4, 2, "the same within 64 KiB at D = 256")
# Keys that are rotated in the kernel bring float32 angles: three stages of 64 keys of 128 would be 244 KiB.
_DECODE_ROTARY = LaunchConfig(
    16, 64, 4, 1, "22 KiB at D = 128: other blocks of a multiprocessor hide what stages would"
)
_DECODE_ROTARY_WIDE = LaunchConfig(16, 32, 4, 1, "the same at D = 256")


def forward_config(arch: str, call: Call) -> LaunchConfig:
    config = _forward_config(arch, call)
    # Triton shares the stages out over a look-up in the block table and the loads that wait for it: half of them for
    # each (of three, one tile of keys in flight where there were two: 20 KiB for 36 at D = 64, decoding).
    if call.block_table is not None:
        config = replace(config, num_stages=2 * config.num_stages - 1)
    return config


def _forward_config(arch: str, call: Call) -> LaunchConfig:
    config = look_up(FORWARD, arch, call)
    if q_max(call) <= FEW_ROWS and config.block_m > 32:
        dim = head_dim(call)
        if dim > 256:
            return config
        if dim <= 32:
            return _DECODE_NARROW
        if call.plan.rotary is not None:
            return _DECODE_ROTARY if dim <= 128 else _DECODE_ROTARY_WIDE
        fits = dim <= 128 if arch.startswith("sm_") else dim <= 64
        return _DECODE if fits else _DECODE_WIDE
    return config
