"""Tile shapes of the CUDA kernels, by architecture, head dimension and kind of plan, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from posattn.backends.common.operands import q_max
from posattn.backends.cuda.operands import Constants, padded
from posattn.plan import Call


@dataclass(frozen=True)
class ForwardTile:
    """One choice for attention_forward. `reason` is the modelled ground: "2P" is the two-phase figure of the static
    pipe model, cycles for a 64 x 64 tile of one head, bf16, unmasked inner loop, on sm_80."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    blocks: int  # on a multiprocessor, which limits registers to 65536 / (32 warps blocks)
    q_in_registers: bool
    reason: str
    source: str = "forward/forward.cu"
    columns: int = 32  # what head dimensions are padded to a multiple of

    def padded(self, dim: int) -> int:
        return -(-dim // self.columns) * self.columns

    def constants(self) -> Constants:
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "WARPS": self.warps,
            "THREADS": 32 * self.warps,
            "STAGES": self.stages,
            "BLOCKS_PER_SM": self.blocks,
            "Q_IN_REGISTERS": self.q_in_registers,
        }


_FORWARD = {
    64: ForwardTile(128, 64, 4, 2, 2, True, "2P 768 at D = 64; two blocks of 48 KiB fit sm_86's 100 KiB as well"),
    96: ForwardTile(128, 64, 4, 2, 2, False, "2P 1024; Q in registers would leave room for 32 keys: 1024, Table 1069"),
    128: ForwardTile(128, 32, 4, 2, 2, False, "2P 1280; with 64 keys a bias needs more than 255 registers"),
    192: ForwardTile(64, 64, 4, 1, 2, False, "2P 2398, bound by shared memory: 32 rows a warp do not fit registers"),
    256: ForwardTile(128, 32, 8, 1, 1, False, "2P 3118; 64 x 64 in 4 warps gives 3116 with half the warps to hide in"),
}


# A bias tensor's rows and loaded values come on top of a plain call's registers.
_DENSE = {
    64: ForwardTile(128, 32, 4, 2, 2, True, "2P 968; 64 keys give 1006 and reload 188 bytes a step"),
    128: ForwardTile(128, 32, 4, 1, 2, False, "2P 1494; two stages give 1576 and reload 64 bytes a step"),
}
_DENSE_BLACKWELL = {64: _DENSE[64]}


# A profile keeps a row scale, its lines and the knots besides, and must not spill in the loop for it.
_PROFILE = {96: ForwardTile(128, 48, 4, 2, 2, False, "2P 1095; 64 keys give 1066 and reload 12 bytes a step")}
_PROFILE_BLACKWELL = {
    96: ForwardTile(128, 32, 4, 2, 2, False, "64 keys reload 8 bytes a step"),
    128: ForwardTile(128, 32, 8, 2, 1, False, "32 rows a warp reload 8 bytes a step on sm_100 and 32 on sm_120"),
}


@dataclass(frozen=True)
class DecodeTile:
    """One choice for attention_decode: its rows, and warps of 16 keys each."""

    block_m: int
    warps: int
    stages: int
    reason: str
    source: str = "forward/decode.cu"

    @property
    def block_n(self) -> int:
        return 16 * self.warps

    def constants(self) -> Constants:
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "WARPS": self.warps,
            "THREADS": 32 * self.warps,
            "STAGES": self.stages,
        }


# Rows (queries times the heads that share a key head) up to which reading K and V binds, not the tensor cores: a byte
# read serves one row's multiply-add, and sm_80 has 70 of them a byte, sm_90 150.
DECODE_ROWS = 32

_DECODE = {
    64: DecodeTile(16, 4, 3, "three stages of 16 KiB: bytes in flight are what binds"),
    128: DecodeTile(16, 4, 2, "two stages of 32 KiB, so that sm_86 holds them too"),
    256: DecodeTile(16, 2, 2, "16 rows of 256 columns and Q fill a warp's registers; two stages of 32 KiB"),
}


def decode_tile(call: Call) -> DecodeTile | None:
    """The tile of a call with few rows for a key head; None if it has more."""
    rows = q_max(call) * (call.q.shape[1] // call.k.shape[1])
    if rows > DECODE_ROWS:
        return None
    dim = max(padded(call.q.shape[3]), padded(call.v.shape[3]))
    tile = _DECODE[min(d for d in _DECODE if d >= dim)]
    # Twice the rows read K and V once; beyond D = 128 registers do not hold them.
    return replace(tile, block_m=32) if rows > 16 and dim <= 128 else tile


# On sm_90a beyond D = 32, where padding to 64 columns would cost more than wgmma gains (462 against 512). 2P is that of
# sm_90; at D = 96, padded to 128, mma.sync's would be 875.
_WGMMA = "forward/forward_sm90.cu"
_HOPPER = {
    64: ForwardTile(128, 128, 8, 2, 1, True, "2P 512; Q in registers, else a table binds on shared memory", _WGMMA, 64),
    128: ForwardTile(128, 128, 8, 2, 1, False, "2P 768; Q's registers would spill beside 128 columns", _WGMMA, 64),
    192: ForwardTile(128, 64, 8, 2, 1, False, "2P 1068; two stages of 128 keys do not fit beside Q", _WGMMA, 64),
    256: ForwardTile(128, 64, 8, 2, 1, False, "2P 1350; two stages of 64 KiB beside 64 KiB of Q", _WGMMA, 64),
}


def forward_tile(arch: str, call: Call) -> ForwardTile:
    dim = max(padded(call.q.shape[3]), padded(call.v.shape[3]))
    if arch == "sm_90" and dim > 32:
        return _HOPPER[min(d for d in _HOPPER if d >= dim)]
    dim = min(d for d in _FORWARD if d >= dim)
    blackwell = int(arch.removeprefix("sm_")) >= 100
    special: Mapping[int, ForwardTile] = {}
    if call.plan.bias.dense is not None:
        special = _DENSE_BLACKWELL if blackwell else _DENSE
    elif call.plan.bias.profile is not None:
        special = _PROFILE_BLACKWELL if blackwell else _PROFILE
    return special.get(dim, _FORWARD[dim])
