"""Launch configurations of the CUDA backward pass, by head dimension and by how much shared memory a block may have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

from posattn.backends.common.arch import shared_memory
from posattn.backends.cuda.constants import WantConstants, WarpConstants

_RESERVED = 1024  # of a block, by the driver


class Staging(NamedTuple):
    """What of a plan decides how much shared memory attention_backward takes, and whether it runs by wgmma."""

    explicit: bool
    has_table: bool
    has_profile: bool
    by_element: bool  # something is worked out for each logit: dropout, softcap, a mask or bias of pairs
    want: WantConstants


@dataclass(frozen=True)
class BackwardConfig:
    """One choice for attention_backward. `logit_columns`, `key_columns` and `query_columns` say how the warps lie over
    the columns of the logits, of dK and dV, and of dQ (see backward/warps.h). `reason` is the modelled ground: "2P" is
    the two-phase figure of the static pipe model, cycles for a 64 x 64 tile of one head, bf16, unmasked, on sm_80."""

    block_m: int
    block_n: int
    warps: int
    logit_columns: int
    key_columns: int
    query_columns: int
    blocks: int  # on a multiprocessor, which limits registers to 65536 / (32 warps blocks)
    reason: str
    grad_stages: int = 2
    strip_rows: int = 8
    query_parts: int = 1
    columns: int = 32  # what head dimensions are padded to a multiple of
    sm90: bool = False  # by wgmma

    def padded(self, dim: int) -> int:
        return -(-dim // self.columns) * self.columns

    @property
    def warp_keys(self) -> int:
        return self.block_n * self.logit_columns // self.warps

    @property
    def warp_queries(self) -> int:
        return self.block_m // (self.logit_columns * self.query_parts)

    def constants(self, dim: int) -> WarpConstants:
        """For a head dimension `dim`."""
        return WarpConstants(
            padded=self.padded(dim),
            block_m=self.block_m,
            block_n=self.block_n,
            warps=self.warps,
            logit_columns=self.logit_columns,
            key_columns=self.key_columns,
            query_columns=self.query_columns,
            query_parts=self.query_parts,
            sm90=self.sm90,
        )


_CONFIGS = {
    32: (
        BackwardConfig(64, 128, 4, 1, 1, 2, 2, "the tile of 64", query_parts=2, grad_stages=1),
        BackwardConfig(32, 128, 4, 1, 1, 2, 2, "where strips of two operands leave no room for 64 queries"),
    ),
    64: (
        BackwardConfig(
            64, 128, 4, 1, 1, 2, 2,
            "32 keys a warp with P^T and dS^T in registers; two parts of 32 queries share dQ's product",
            query_parts=2, grad_stages=1,
        ),
        BackwardConfig(
            32, 128, 4, 1, 1, 2, 2,
            "where strips of two operands leave no room for 64 queries: 2P 1764 for 1583",
        ),
    ),
    96: (
        BackwardConfig(64, 128, 8, 2, 2, 2, 1, "as 128"),
        BackwardConfig(64, 64, 8, 2, 2, 2, 1, "what 99 KiB hold"),
    ),
    128: (
        BackwardConfig(
            64, 128, 8, 2, 2, 4, 1,
            "dK and dV of 32 keys would take all registers, so pairs of warps share them and P^T goes by shared memory",
        ),
        BackwardConfig(32, 64, 8, 2, 4, 4, 1, "what 99 KiB hold"),
    ),
    192: (
        BackwardConfig(64, 64, 8, 2, 4, 2, 1, "half the keys of 128, for dK and dV are wider"),
        BackwardConfig(32, 32, 4, 2, 2, 2, 1, "what 99 KiB hold"),
    ),
    256: (
        BackwardConfig(32, 64, 8, 2, 4, 4, 1, "two stages of 64 queries would not fit beside K and V"),
        BackwardConfig(32, 32, 4, 2, 2, 2, 1, "what 99 KiB hold"),
    ),
}  # fmt: skip


def strip(config: BackwardConfig, staging: Staging) -> int:
    """Floats of values by distance that a tile takes for each of a table and psi."""
    return 0 if staging.explicit else config.block_m + config.block_n + 4


def shared_bytes(config: BackwardConfig, dim: int, staging: Staging) -> int:
    """Dynamic shared memory of attention_backward; it asserts that this is what it uses."""
    in_registers = config.logit_columns == 1 and config.key_columns == 1
    pairs = (1 if in_registers else 2) * config.block_n * config.block_m
    tiles = (2 * config.block_n + (2 + config.grad_stages) * config.block_m) * dim
    rows = 2 * config.block_m
    rows += strip(config, staging) if staging.has_table else 0
    rows += strip(config, staging) + config.block_m if staging.has_profile else 0
    by_distance = (staging.want.want_table or staging.want.want_psi) and not staging.explicit
    bands = config.warp_queries // 8 + config.warp_keys // 8 - 1
    strips = config.warps * config.strip_rows * (8 * bands + 16) if by_distance else 0
    slope = 16 * 32 if staging.want.want_slope else 0
    return 2 * (pairs + tiles) + 4 * (2 * rows + strips) + slope


def backward_config(arch: str, dim: int, staging: Staging) -> BackwardConfig:
    """The first configuration for head dimension `dim` (padded) of which `arch` has room for all blocks, or else for
    one, with what the plan stages: with two buffers for dO or, at the cost of waiting for it, with one; and then with
    whole or with half strips."""
    # No more than sm_80 has, for which these were modelled: whole strips, which sm_90 has room for, cost a profile's
    # registers (24 bytes of spills become 48).
    memory = min(shared_memory(arch), shared_memory("sm_80"), key=lambda memory: memory.block)
    for alone in (False, True):
        for config in _CONFIGS[dim]:
            room = memory.block if alone else memory.multiprocessor // config.blocks - _RESERVED
            for stages, strip_rows in product(range(config.grad_stages, 0, -1), (8, 4)):
                choice = replace(config, grad_stages=stages, strip_rows=strip_rows)
                if shared_bytes(choice, dim, staging) <= room:
                    return choice
    raise AssertionError(f"no backward configuration for head dimension {dim} fits {memory.block} bytes")
