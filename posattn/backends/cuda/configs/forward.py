"""Launch configurations of the CUDA forward kernels, by architecture, head dimension and kind of plan, with reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from posattn.backends.common.operands import q_max
from posattn.backends.cuda.operands import padded
from posattn.plan import Call


@dataclass(frozen=True)
class ForwardConfig:
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

    def shared_bytes(self, head_dim: int, head_dim_v: int, by_distance: bool) -> int:
        """Dynamic shared memory, which the kernel asserts is enough; by_distance: a table's or a profile's values by
        distance come along with the keys."""
        stage = 2 * self.block_n * (head_dim + head_dim_v)
        if by_distance:
            stage += -(-8 * (self.block_m + self.block_n) // 1024) * 1024  # wgmma wants tiles aligned to this
        return max(2 * self.block_m * head_dim + self.stages * stage, 2 * self.block_m * head_dim_v)


_FORWARD = {
    64: ForwardConfig(128, 64, 4, 2, 2, True, "2P 768 at D = 64; two blocks of 48 KiB fit sm_86's 100 KiB as well"),
    96: ForwardConfig(
        128, 64, 4, 2, 2, False, "2P 1024; Q in registers would leave room for 32 keys: 1024, Table 1069"
    ),
    128: ForwardConfig(128, 32, 4, 2, 2, False, "2P 1280; with 64 keys a bias needs more than 255 registers"),
    192: ForwardConfig(64, 64, 4, 1, 2, False, "2P 2398, bound by shared memory: 32 rows a warp do not fit registers"),
    256: ForwardConfig(
        128, 32, 8, 1, 1, False, "2P 3118; 64 x 64 in 4 warps gives 3116 with half the warps to hide in"
    ),
}


# A bias tensor's rows and loaded values come on top of a plain call's registers.
_DENSE = {
    64: ForwardConfig(128, 32, 4, 2, 2, True, "2P 968; 64 keys give 1006 and reload 188 bytes a step"),
    128: ForwardConfig(128, 32, 4, 1, 2, False, "2P 1494; two stages give 1576 and reload 64 bytes a step"),
}
_DENSE_BLACKWELL = {64: _DENSE[64]}


# A profile keeps a row scale, its lines and the knots besides, and must not spill in the loop for it.
_PROFILE = {96: ForwardConfig(128, 48, 4, 2, 2, False, "2P 1095; 64 keys give 1066 and reload 12 bytes a step")}
_PROFILE_BLACKWELL = {
    96: ForwardConfig(128, 32, 4, 2, 2, False, "64 keys reload 8 bytes a step"),
    128: ForwardConfig(128, 32, 8, 2, 1, False, "32 rows a warp reload 8 bytes a step on sm_100 and 32 on sm_120"),
}


@dataclass(frozen=True)
class DecodeConfig:
    """One choice for attention_decode: its rows, and warps of 16 keys each."""

    block_m: int
    warps: int
    stages: int
    reason: str
    source: str = "forward/decode.cu"

    @property
    def block_n(self) -> int:
        return 16 * self.warps

    def padded(self, dim: int) -> int:
        return padded(dim)

    def shared_bytes(self, head_dim: int, head_dim_v: int, by_distance: bool) -> int:
        """As ForwardConfig has it; values by distance are read where they lie."""
        copies = 2 * self.block_m * head_dim + self.stages * 2 * self.block_n * (head_dim + head_dim_v)
        return max(copies, self.warps * self.block_m * (4 * head_dim_v + 8))


# Rows (queries times the heads that share a key head) up to which reading K and V binds, not the tensor cores: a byte
# read serves one row's multiply-add, and sm_80 has 70 of them a byte, sm_90 150.
DECODE_ROWS = 32

_DECODE = {
    64: DecodeConfig(16, 4, 3, "three stages of 16 KiB: bytes in flight are what binds"),
    128: DecodeConfig(16, 4, 2, "two stages of 32 KiB, so that sm_86 holds them too"),
    256: DecodeConfig(16, 2, 2, "16 rows of 256 columns and Q fill a warp's registers; two stages of 32 KiB"),
}


def decode_config(call: Call) -> DecodeConfig | None:
    """That of a call with few rows for a key head; None if it has more."""
    rows = q_max(call) * (call.q.shape[1] // call.k.shape[1])
    if rows > DECODE_ROWS:
        return None
    dim = max(padded(call.q.shape[3]), padded(call.v.shape[3]))
    config = _DECODE[min(d for d in _DECODE if d >= dim)]
    # Twice the rows read K and V once; beyond D = 128 registers do not hold them.
    return replace(config, block_m=32) if rows > 16 and dim <= 128 else config


# On sm_90a beyond D = 32, where padding to 64 columns would cost more than wgmma gains (462 against 512). 2P is that of
# sm_90; at D = 96, padded to 128, mma.sync's would be 875.
_SOURCE = "forward/forward_sm90.cu"
_SM90 = {
    64: ForwardConfig(
        128, 128, 8, 2, 1, True, "2P 512; Q in registers, else a table binds on shared memory", _SOURCE, 64
    ),
    128: ForwardConfig(128, 128, 8, 2, 1, False, "2P 768; Q's registers would spill beside 128 columns", _SOURCE, 64),
    192: ForwardConfig(128, 64, 8, 2, 1, False, "2P 1068; two stages of 128 keys do not fit beside Q", _SOURCE, 64),
    256: ForwardConfig(128, 64, 8, 2, 1, False, "2P 1350; two stages of 64 KiB beside 64 KiB of Q", _SOURCE, 64),
}


def forward_config(arch: str, call: Call) -> ForwardConfig:
    dim = max(padded(call.q.shape[3]), padded(call.v.shape[3]))
    if arch == "sm_90" and dim > 32:
        return _SM90[min(d for d in _SM90 if d >= dim)]
    dim = min(d for d in _FORWARD if d >= dim)
    blackwell = int(arch.removeprefix("sm_")) >= 100
    special: Mapping[int, ForwardConfig] = {}
    if call.plan.bias.dense is not None:
        special = _DENSE_BLACKWELL if blackwell else _DENSE
    elif call.plan.bias.profile is not None:
        special = _PROFILE_BLACKWELL if blackwell else _PROFILE
    return special.get(dim, _FORWARD[dim])
