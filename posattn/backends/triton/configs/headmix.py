"""Tiles of the HeadMix kernels."""

from __future__ import annotations

import torch

from posattn.backends.triton.configs.launch_config import LaunchConfig, family, head_dim
from posattn.plan import Call

MAX_HEADS = 32
MAX_WIDTH = 64
# A thread holds the output rows of its warp's heads: for 16 rows of 256 columns 128 of its 255 registers.
MAX_COLUMNS = 256


def unsupported(call: Call) -> str | None:
    """Why the HeadMix kernels cannot hold this call."""
    mix = call.plan.mix
    if mix is None:
        return None
    heads, width = call.q.shape[1], mix.w1.shape[0]
    if heads > MAX_HEADS:
        return f"it mixes up to {MAX_HEADS} heads in one program, got {heads}"
    if width > MAX_WIDTH:
        return f"it mixes through up to {MAX_WIDTH} hidden units, got {width}"
    if _columns(call) > MAX_COLUMNS:
        return (
            f"a warp's output rows must fit in registers, up to {MAX_COLUMNS} columns: it owns "
            f"{_columns(call) // head_dim(call)} heads of {head_dim(call)} columns, got {heads} heads"
        )
    return None


def group(call: Call) -> int:
    """Warps of a program, and so heads of a group: each warp owns one."""
    return 4 if call.q.shape[1] <= 4 else 8


def _columns(call: Call) -> int:
    """The output columns (padded) of all heads that one warp owns."""
    return -(-call.q.shape[1] // group(call)) * head_dim(call)


def keeps_queries(call: Call) -> bool:
    """True if a program's queries fit in registers beside its output rows; else every step loads them again."""
    return _columns(call) <= 128 and call.q.dtype != torch.float32


def scales_queries(call: Call) -> bool:
    """True if the kept queries can take the scale without rounding: then the logits need not."""
    return keeps_queries(call) and call.scale in (1.0, 0.5, 0.25, 0.125, 0.0625)


def forward_config(arch: str, call: Call) -> LaunchConfig:
    """All heads of BLOCK_M queries by BLOCK_N keys."""
    mix = call.plan.mix
    narrow = mix is not None and call.q.shape[1] <= 16 and mix.w1.shape[0] <= 32
    if arch.startswith("sm_") and narrow and keeps_queries(call):
        return LaunchConfig(
            16, 32, group(call), 1, "12 heads of 64: 2P 2172 on sm_80, 1992 on sm_90; 16 keys rescale twice as often"
        )
    return LaunchConfig(16, 16, group(call), 1, "32 keys spill: AMD 2.5 KB, 32 heads or 64 hidden units more still")


def halves(call: Call, config: LaunchConfig) -> bool:
    """True if the heads of the last group take two warps each, one for either half of a tile's keys: of 8 warps, 4
    would otherwise own a head that does not exist."""
    return config.block_n == 32 and 8 < call.q.shape[1] <= 12 and call.q.dtype != torch.float32


def chunks(config: LaunchConfig) -> int:
    """Parts in which the positions of a forward tile go through the hidden layer."""
    # 512 positions at once spill 152 bytes in the loop on sm_90, two halves none; quarters cost 2P 2340 there.
    return 2 if config.block_n == 32 else 1


def backward_config(arch: str, call: Call) -> LaunchConfig:
    # On sm_80 ptxas stops at 128 registers for DQ of 12 heads of 128: 2P 8968, where with 255 it is 6960.
    registers = 255 if family(arch) in ("sm_80", "sm_86") and head_dim(call) == 128 else None
    reason = "logits, their gradients and the hidden layer share the registers"
    return LaunchConfig(16, 16, group(call), 1, reason, registers=registers)
