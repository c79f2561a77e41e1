"""Tiles of the HeadMix kernels."""

from __future__ import annotations

import torch

from posattn.plan import Call

from .operands import padded
from .tiles import Tile, head_dim

# A program holds the output rows of all its heads: 4 bytes * heads * block_m * head dimension in registers, of which an
# SM has 256 KiB for these and everything else.
MAX_HEADS = 32
MAX_WIDTH = 64
MAX_HEADS_TIMES_DIM = 2048


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
    if padded(heads) * head_dim(call) > MAX_HEADS_TIMES_DIM:
        return (
            f"the heads' output rows must fit in registers together: heads (padded to {padded(heads)}) times the head "
            f"dimension (padded to {head_dim(call)}) up to {MAX_HEADS_TIMES_DIM}"
        )
    return None


def group(call: Call) -> int:
    """Warps of a program, and so heads of a group: each warp owns one."""
    return 4 if call.q.shape[1] <= 4 else 8


def _head_rows(call: Call) -> int:
    """The output columns of all heads that one warp owns."""
    return -(-call.q.shape[1] // group(call)) * head_dim(call)


def keeps_queries(call: Call) -> bool:
    """True if a program's queries fit in registers beside its output rows; else every step loads them again."""
    return _head_rows(call) <= 128 and call.q.dtype != torch.float32


def forward_tile(arch: str, call: Call) -> Tile:
    """All heads of BLOCK_M queries by BLOCK_N keys."""
    mix = call.plan.mix
    narrow = mix is not None and call.q.shape[1] <= 16 and mix.w1.shape[0] <= 32
    if arch.startswith("sm_") and narrow and keeps_queries(call):
        return Tile(
            16, 32, group(call), 1, "12 heads of 64, 2P on sm_80: 2621; 16 keys 3016, as rows rescale more often"
        )
    return Tile(16, 16, group(call), 1, "32 keys spill: AMD 2.5 KB, 32 heads or 64 hidden units more still")


def chunks(tile: Tile) -> int:
    """Parts in which the positions of a forward tile go through the hidden layer."""
    # 512 positions at once spill 132 bytes in the loop on sm_90, two halves 4.
    return 2 if tile.block_n == 32 else 1


def backward_tile(call: Call) -> Tile:
    return Tile(16, 16, group(call), 1, "logits, their gradients and the hidden layer share the registers")
