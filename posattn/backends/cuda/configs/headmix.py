"""Launch configurations of the CUDA kernels that mix heads (DAPE), and which calls have none."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from posattn.backends.common.arch import shared_memory
from posattn.plan import Call, HeadMix

MAX_HEADS = 32
MAX_WIDTH = 64
OTHER_REGISTERS = 36  # of a thread of the backward kernel, beside dK and dV of its head


@dataclass(frozen=True)
class HeadMixConfig:
    """block_m rows and block_n columns of all heads a step, queries by keys in the forward kernel, keys by queries in
    the backward one; each warp owns heads_per_warp heads. The MLP is every warp's, or its own warps'."""

    heads: int
    block_m: int
    heads_per_warp: int
    block_n: int = 24  # three tiles of 8: odd keeps banks apart, and 48 positions share out among 1, 2, 3, 4, .. warps
    own_mlp_warps: int = 0

    @property
    def warps(self) -> int:
        return -(-self.heads // self.heads_per_warp) + self.own_mlp_warps

    @property
    def mlp_warps(self) -> int:
        return self.own_mlp_warps or self.warps


def inputs(call: Call, mix: HeadMix) -> int:
    """Inputs of the MLP."""
    heads = call.q.shape[1]
    return 2 * heads if mix.inner and mix.form != "add" else heads


def folds_slope(call: Call, mix: HeadMix) -> bool:
    """Whether the forward kernel takes the inner bias as the distance times a column of weights. In float16 distances
    could be too large."""
    inner = mix.inner
    alone = inner.slope is not None and inner.table is None and inner.profile is None and inner.dense is None
    return alone and mix.form != "add" and call.q_positions is None and call.q.dtype == torch.bfloat16


def _planes(call: Call, mix: HeadMix) -> int:
    """Inputs, and a plane of ones for b1 where they leave one free."""
    count = inputs(call, mix)
    return count + (count % 8 != 0)


def dims(call: Call) -> tuple[int, int]:
    """The head dimensions as the kernels pad them."""
    return -(-call.q.shape[3] // 32) * 32, -(-call.v.shape[3] // 32) * 32


def forward_shared_bytes(call: Call, mix: HeadMix, config: HeadMixConfig) -> int:
    """Dynamic shared memory of headmix_forward; it asserts that this is enough."""
    m, n, heads = config.block_m, config.block_n, config.heads
    queries = heads * m * dims(call)[0] * 2
    folded = heads + 2 + ((heads + 3) % 8 != 0)
    x = (folded if folds_slope(call, mix) else _planes(call, mix)) * (2 * m * n + 16)
    mixed = -(-heads // 8) * 8 * (2 * m * n + 16)
    staged = (mix.inner.table is not None or mix.inner.profile is not None) and call.q_positions is None
    return queries + x + mixed + (2 * heads * 8 * (m + n) if staged else 0)


def forward_config(arch: str, call: Call, mix: HeadMix) -> HeadMixConfig | None:
    """That of a call; None if none fits.

    An output accumulator takes dim_v / 2 registers for sixteen rows of a head. 64 of them leave room in the 168 that
    twelve warps have, and, without fetching ahead, in the 128 that sixteen have.
    """
    heads, (_, dim_v) = call.q.shape[1], dims(call)
    heads_per_warp = 1 if heads <= 16 else 2
    limit = shared_memory(arch).block
    for block_m in (32, 16):
        accumulators = heads_per_warp * block_m * dim_v // 32
        config = HeadMixConfig(heads, block_m, heads_per_warp)
        fits = accumulators <= (64 if config.warps <= 12 or block_m == 16 else 32)
        if fits and forward_shared_bytes(call, mix, config) <= limit:
            return config
    return None


def forward_unsupported(call: Call, mix: HeadMix, arch: str) -> str | None:
    """Why these kernels cannot run `call`; None if they can."""
    heads, width = call.q.shape[1], mix.w1.shape[0]
    if heads > MAX_HEADS:
        return f"its kernels that mix heads take up to {MAX_HEADS} heads, got {heads}"
    if width > MAX_WIDTH:
        return f"its kernels that mix heads take up to {MAX_WIDTH} hidden units, got {width}"
    if forward_config(arch, call, mix) is None:
        return f"its kernels that mix heads keep the outputs of all heads in registers, and {_heads(call)} do not fit"
    return None


def backward_config(call: Call) -> HeadMixConfig:
    """16 keys by 24 queries: logits are held transposed, and four warps have the MLP."""
    return HeadMixConfig(call.q.shape[1], 16, 1, 24, own_mlp_warps=4)


def backward_shared_bytes(call: Call, mix: HeadMix) -> int:
    """Dynamic shared memory of headmix_backward; it asserts that this is enough."""
    config, (dim, dim_v) = backward_config(call), dims(call)
    heads, plane = config.heads, 2 * config.block_m * config.block_n + 16
    kept = heads * config.block_m * 2 * (2 * dim + dim_v)
    mixed = -(-max(inputs(call, mix), heads) // 8) * 8
    return kept + (_planes(call, mix) + heads + mixed) * plane + 16


def backward_unsupported(call: Call, mix: HeadMix, arch: str) -> str | None:
    """Why the backward kernel cannot run `call`; None if it can."""
    heads, width, warps = call.q.shape[1], mix.w1.shape[0], backward_config(call).warps
    registers = 65536 // (32 * warps) if warps <= 32 else 0
    if sum(dims(call)) // 2 + OTHER_REGISTERS > registers:
        return f"its backward kernel keeps dK and dV of all heads in registers, and {_heads(call)} do not fit"
    pairs, eights = -(-width // 16), -(-inputs(call, mix) // 8) + -(-heads // 8)
    if 8 * pairs * eights > registers:
        return f"its backward kernel keeps the MLP and its gradient in registers, and {width} hidden units do not fit"
    if backward_shared_bytes(call, mix) > shared_memory(arch).block:
        return f"its backward kernel needs {backward_shared_bytes(call, mix)} bytes of shared memory"
    return None


def _heads(call: Call) -> str:
    return f"{call.q.shape[1]} heads of dimension {max(call.q.shape[3], call.v.shape[3])}"
