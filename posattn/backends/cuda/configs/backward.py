"""Tile shapes of the CUDA backward pass, by head dimension and by how much shared memory a block may have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from posattn.backends.common.arch import shared_memory
from posattn.backends.cuda.operands import Constants

_RESERVED = 1024  # of a block, by the driver


@dataclass(frozen=True)
class BackwardTile:
    """One choice for attention_backward. `logit_columns`, `key_columns` and `query_columns` say how the warps lie over
    the columns of the logits, of dK and dV, and of dQ (see backward_warps.h). `reason` is the modelled ground: "2P" is
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
    source: str = "backward/backward.cu"
    columns: int = 32  # what head dimensions are padded to a multiple of

    def padded(self, dim: int) -> int:
        return -(-dim // self.columns) * self.columns

    @property
    def warp_keys(self) -> int:
        return self.block_n * self.logit_columns // self.warps

    @property
    def warp_queries(self) -> int:
        return self.block_m // (self.logit_columns * self.query_parts)

    def constants(self) -> Constants:
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "WARPS": self.warps,
            "LOGIT_COLUMNS": self.logit_columns,
            "KEY_COLUMNS": self.key_columns,
            "QUERY_COLUMNS": self.query_columns,
            "QUERY_PARTS": self.query_parts,
            "WGMMA": self.source == "backward/sm90/backward.cu",
        }


_TILES = {
    32: (
        BackwardTile(64, 128, 4, 1, 1, 2, 2, "the tile of 64", query_parts=2, grad_stages=1),
        BackwardTile(32, 128, 4, 1, 1, 2, 2, "where strips of two operands leave no room for 64 queries"),
    ),
    64: (
        BackwardTile(
            64, 128, 4, 1, 1, 2, 2,
            "32 keys a warp with P^T and dS^T in registers; two parts of 32 queries share dQ's product",
            query_parts=2, grad_stages=1,
        ),
        BackwardTile(
            32, 128, 4, 1, 1, 2, 2,
            "where strips of two operands leave no room for 64 queries: 2P 1764 for 1583",
        ),
    ),
    96: (
        BackwardTile(64, 128, 8, 2, 2, 2, 1, "as 128"),
        BackwardTile(64, 64, 8, 2, 2, 2, 1, "what 99 KiB hold"),
    ),
    128: (
        BackwardTile(
            64, 128, 8, 2, 2, 4, 1,
            "dK and dV of 32 keys would take all registers, so pairs of warps share them and P^T goes by shared memory",
        ),
        BackwardTile(32, 64, 8, 2, 4, 4, 1, "what 99 KiB hold"),
    ),
    192: (
        BackwardTile(64, 64, 8, 2, 4, 2, 1, "half the keys of 128, for dK and dV are wider"),
        BackwardTile(32, 32, 4, 2, 2, 2, 1, "what 99 KiB hold"),
    ),
    256: (
        BackwardTile(32, 64, 8, 2, 4, 4, 1, "two stages of 64 queries would not fit beside K and V"),
        BackwardTile(32, 32, 4, 2, 2, 2, 1, "what 99 KiB hold"),
    ),
}  # fmt: skip


def shared_bytes(tile: BackwardTile, dim: int, constants: Constants) -> int:
    """Dynamic shared memory of attention_backward; it asserts that this is what it uses."""
    in_registers = tile.logit_columns == 1 and tile.key_columns == 1
    pairs = (1 if in_registers else 2) * tile.block_n * tile.block_m
    tiles = (2 * tile.block_n + (2 + tile.grad_stages) * tile.block_m) * dim
    strip = 0 if constants["EXPLICIT"] else tile.block_m + tile.block_n + 4
    rows = 2 * tile.block_m
    rows += strip if constants["HAS_TABLE"] else 0
    rows += strip + tile.block_m if constants["HAS_PROFILE"] else 0
    by_distance = (constants["WANT_TABLE"] or constants["WANT_PSI"]) and not constants["EXPLICIT"]
    bands = tile.warp_queries // 8 + tile.warp_keys // 8 - 1
    strips = tile.warps * tile.strip_rows * (8 * bands + 16) if by_distance else 0
    slope = 16 * 32 if constants["WANT_SLOPE"] else 0
    return 2 * (pairs + tiles) + 4 * (2 * rows + strips) + slope


def backward_tile(arch: str, dim: int, constants: Constants) -> BackwardTile:
    """The first tile for head dimension `dim` (padded) of which `arch` has room for all blocks, or else for one, with
    what the plan stages: with two buffers for dO or, at the cost of waiting for it, with one; and then with whole or
    with half strips."""
    memory = shared_memory(arch)
    for alone in (False, True):
        for tile in _TILES[dim]:
            room = memory.block if alone else memory.multiprocessor // tile.blocks - _RESERVED
            for stages, strip_rows in product(range(tile.grad_stages, 0, -1), (8, 4)):
                choice = replace(tile, grad_stages=stages, strip_rows=strip_rows)
                if shared_bytes(choice, dim, constants) <= room:
                    return choice
    raise AssertionError(f"no backward tile for head dimension {dim} fits {memory.block} bytes")
