"""When the CUDA backward pass runs by wgmma (sm_90a), and in which tiles."""

from __future__ import annotations

from dataclasses import replace

from posattn.backends.common.arch import shared_memory
from posattn.backends.cuda.configs.backward import BackwardTile, shared_bytes
from posattn.backends.cuda.operands import Constants

_STAGES = 3
_TILES = {
    64: BackwardTile(
        128, 128, 8, 1, 1, 1, 1, "2P 960; with 64 queries K and V are read twice as often: shared memory 832 for 704"
    ),
    128: BackwardTile(64, 128, 8, 1, 1, 2, 1, "2P 1680; beside dK and dV of 64 keys the registers hold 64 queries"),
}
_BY_ELEMENT = BackwardTile(
    64, 128, 8, 1, 1, 2, 1, "what is worked out for each element would spill beside 128 queries"
)  # fmt: skip


def hopper_tile(arch: str, dim: int, constants: Constants) -> BackwardTile | None:
    """The tile for head dimension `dim` (padded) and this plan; None if mma.sync serves it."""
    # A profile's sums by row and by distance, psi and row scales do not fit the registers beside dK, dV, P and dP.
    if arch != "sm_90" or dim > max(_TILES) or constants["HAS_PROFILE"]:
        return None
    tile = _TILES[min(d for d in _TILES if d >= dim)]
    by_element = ("HAS_DROPOUT", "HAS_SOFTCAP", "HAS_BOOLEAN", "HAS_DENSE", "EXPLICIT")
    if dim <= 64 and any(constants[name] for name in by_element):
        tile = _BY_ELEMENT
    for strip_rows in (8, 4):
        choice = replace(tile, strip_rows=strip_rows, source="backward/sm90/backward.cu", columns=64)
        if hopper_shared_bytes(choice, choice.padded(dim), constants) <= shared_memory(arch).block:
            return choice
    return None


def hopper_shared_bytes(tile: BackwardTile, dim: int, constants: Constants) -> int:
    """Dynamic shared memory of backward_sm90.cu: a stage and a tile of dS more than backward.cu, and mbarriers."""
    table_by_product = constants["WANT_TABLE"] and not constants["EXPLICIT"] and tile.block_m == tile.block_n
    given = {"WANT_SLOPE": False, "WANT_TABLE": constants["WANT_TABLE"] and not table_by_product}
    two_stages = shared_bytes(tile, dim, {**constants, **given})
    diagonals = 4 * 2 * 8 * (tile.block_m + 24) if table_by_product else 0
    strip = 0 if constants["EXPLICIT"] else tile.block_m + tile.block_n + 4
    rows = 2 * tile.block_m
    rows += strip if constants["HAS_TABLE"] else 0
    return two_stages + 2 * (2 * tile.block_m * dim + tile.block_m * tile.block_n) + 4 * rows + diagonals + 8 * _STAGES
