"""When the CUDA backward pass runs by wgmma (sm_90a), and in which launch configurations."""

from __future__ import annotations

from dataclasses import replace

from posattn.backends.common.arch import shared_memory
from posattn.backends.cuda.configs.backward import BackwardConfig, Staging, shared_bytes, strip

_STAGES = 3
_CONFIGS = {
    64: BackwardConfig(
        128, 128, 8, 1, 1, 1, 1, "2P 960; with 64 queries K and V are read twice as often: shared memory 832 for 704"
    ),
    128: BackwardConfig(64, 128, 8, 1, 1, 2, 1, "2P 1680; beside dK and dV of 64 keys the registers hold 64 queries"),
}
_BY_ELEMENT = BackwardConfig(
    64, 128, 8, 1, 1, 2, 1, "what is worked out for each element would spill beside 128 queries"
)  # fmt: skip


def sm90_config(arch: str, dim: int, staging: Staging) -> BackwardConfig | None:
    """That for head dimension `dim` (padded) and this plan; None if mma.sync serves it."""
    # A profile's sums by row and by distance, psi and row scales do not fit the registers beside dK, dV, P and dP.
    if arch != "sm_90" or dim > max(_CONFIGS) or staging.has_profile:
        return None
    config = _CONFIGS[min(d for d in _CONFIGS if d >= dim)]
    if dim <= 64 and (staging.by_element or staging.explicit):
        config = _BY_ELEMENT
    for strip_rows in (8, 4):
        choice = replace(config, strip_rows=strip_rows, columns=64, sm90=True)
        if sm90_shared_bytes(choice, choice.padded(dim), staging) <= shared_memory(arch).block:
            return choice
    return None


def sm90_shared_bytes(config: BackwardConfig, dim: int, staging: Staging) -> int:
    """Dynamic shared memory of backward/sm90/backward.cu: a stage and a tile of dS more than backward.cu, and
    mbarriers."""
    want = staging.want
    table_by_product = want.want_table and not staging.explicit and config.block_m == config.block_n
    summed = want._replace(want_slope=False, want_table=want.want_table and not table_by_product)
    two_stages = shared_bytes(config, dim, staging._replace(want=summed))
    diagonals = 4 * 2 * 8 * (config.block_m + 24) if table_by_product else 0
    rows = 2 * config.block_m + (strip(config, staging) if staging.has_table else 0)
    third = 2 * (2 * config.block_m * dim + config.block_m * config.block_n)
    return two_stages + third + 4 * rows + diagonals + 8 * _STAGES
