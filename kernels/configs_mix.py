"""Tiles of the HeadMix kernels."""

from __future__ import annotations

from posattn.plan import Call

from .operands import padded
from .tiles import Tile, head_dim

# A program holds the output rows of all its heads: 4 bytes * heads * block_m * head dimension in registers, of which an
# SM has 256 KiB for these and everything else.
MAX_HEADS = 32
MAX_WIDTH = 64
MAX_HEADS_TIMES_DIM = 2048
# Up to here dK and dV of 16 keys share a program's registers.
BOTH_KEY_GRADIENTS = 1024


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


_SMALL = Tile(16, 16, 8, 1, "output rows of 16 heads of 64 take 64 registers in 8 warps; 32 rows spill")
_LARGE = Tile(16, 16, 16, 1, "twice the rows of the small one over twice the warps")


def mix_tile(arch: str, call: Call) -> Tile:
    return _SMALL if padded(call.q.shape[1]) * head_dim(call) <= BOTH_KEY_GRADIENTS else _LARGE


def both_key_gradients(arch: str, call: Call) -> bool:
    """True if one program can hold the accumulators of dK and dV, and AMD's 64 KiB of LDS what they exchange."""
    return arch.startswith("sm_") and padded(call.q.shape[1]) * head_dim(call) <= BOTH_KEY_GRADIENTS
