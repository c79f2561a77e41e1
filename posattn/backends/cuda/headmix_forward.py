"""Host side of the CUDA kernels that mix heads (DAPE): tiling, constants, launches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from posattn.backends.common.arch import shared_memory
from posattn.backends.common.operands import q_max, sequences
from posattn.backends.cuda import headmix_rows, launch, operands
from posattn.backends.cuda.attention_forward import run, turned
from posattn.backends.cuda.compiler import Constant
from posattn.plan import Call, HeadMix

MAX_HEADS = 32
MAX_WIDTH = 64

Constants = dict[str, Constant]


@dataclass(frozen=True)
class MixTile:
    """block_m queries of all heads, block_n keys a step; each warp owns heads_per_warp heads."""

    heads: int
    block_m: int
    heads_per_warp: int
    block_n: int = 24  # three tiles of 8: odd keeps banks apart, and 48 positions share out among 1, 2, 3, 4, .. warps

    @property
    def warps(self) -> int:
        return -(-self.heads // self.heads_per_warp)

    def constants(self) -> Constants:
        return {
            "HEADS": self.heads,
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "HEADS_PER_WARP": self.heads_per_warp,
            "WARPS": self.warps,
            "MLP_WARPS": self.warps,
            "THREADS": 32 * self.warps,
        }


def inputs(call: Call, mix: HeadMix) -> int:
    """Inputs of the MLP."""
    heads = call.q.shape[1]
    return 2 * heads if mix.inner and mix.form != "add" else heads


def _folds_slope(call: Call, mix: HeadMix) -> bool:
    """Whether the forward kernel takes the inner bias as the distance times a column of weights. In float16 distances
    could be too large."""
    inner = mix.inner
    alone = inner.slope is not None and inner.table is None and inner.profile is None and inner.dense is None
    return alone and mix.form != "add" and call.q_positions is None and call.q.dtype == torch.bfloat16


def planes(call: Call, mix: HeadMix) -> int:
    """Inputs, and a plane of ones for b1 where they leave one free."""
    count = inputs(call, mix)
    return count + (count % 8 != 0)


def dims(call: Call) -> tuple[int, int]:
    """The head dimensions as the kernels pad them."""
    return -(-call.q.shape[3] // 32) * 32, -(-call.v.shape[3] // 32) * 32


def forward_shared(call: Call, mix: HeadMix, tile: MixTile) -> int:
    """Dynamic shared memory of headmix_forward; it asserts that this is enough."""
    m, n = tile.block_m, tile.block_n
    queries = tile.heads * m * dims(call)[0] * 2
    folded = tile.heads + 2 + ((tile.heads + 3) % 8 != 0)
    x = (folded if _folds_slope(call, mix) else planes(call, mix)) * (2 * m * n + 16)
    mixed = -(-tile.heads // 8) * 8 * (2 * m * n + 16)
    staged = (mix.inner.table is not None or mix.inner.profile is not None) and call.q_positions is None
    return queries + x + mixed + (2 * tile.heads * 8 * (m + n) if staged else 0)


def forward_tile(arch: str, call: Call, mix: HeadMix) -> MixTile | None:
    """The tiling for a call; None if none fits.

    An output accumulator takes dim_v / 2 registers for sixteen rows of a head. 64 of them leave room in the 168 that
    twelve warps have, and, without fetching ahead, in the 128 that sixteen have.
    """
    heads, (_, dim_v) = call.q.shape[1], dims(call)
    heads_per_warp = 1 if heads <= 16 else 2
    warps = -(-heads // heads_per_warp)
    limit = shared_memory(arch).block
    for block_m in (32, 16):
        accumulators = heads_per_warp * block_m * dim_v // 32
        tile = MixTile(heads, block_m, heads_per_warp)
        if accumulators <= (64 if warps <= 12 or block_m == 16 else 32) and forward_shared(call, mix, tile) <= limit:
            return tile
    return None


def unsupported(call: Call, mix: HeadMix, arch: str) -> str | None:
    """Why these kernels cannot run `call`; None if they can."""
    heads, width = call.q.shape[1], mix.w1.shape[0]
    if heads > MAX_HEADS:
        return f"its kernels that mix heads take up to {MAX_HEADS} heads, got {heads}"
    if width > MAX_WIDTH:
        return f"its kernels that mix heads take up to {MAX_WIDTH} hidden units, got {width}"
    if forward_tile(arch, call, mix) is None:
        dims = f"{heads} heads of dimension {max(call.q.shape[3], call.v.shape[3])}"
        return f"its kernels that mix heads keep the outputs of all heads in registers, and {dims} do not fit"
    return None


def rows(x: Tensor) -> Tensor:
    """x [B, H, T, D] itself if a row is 16-byte chunks, a multiple of 32 elements in all; else a copy that is."""
    extra = -x.shape[-1] % 32
    return operands.in_chunks(pad(x, (0, extra)) if extra else x)


def turned_pair(call: Call) -> tuple[Tensor, Tensor]:
    """q and k after the rotary embedding: every warp reads keys straight into fragments, so they come turned."""
    rotary = call.plan.rotary
    if rotary is None:
        return call.q, call.k
    q, k = operands.in_chunks(call.q), operands.in_chunks(call.k)
    return turned(q, rotary.q_cos, rotary.q_sin, rotary), turned(k, rotary.k_cos, rotary.k_sin, rotary)


def _weights(mix: HeadMix) -> operands.Members:
    """MixParams."""
    return {name: getattr(mix, name).float().contiguous() for name in ("w1", "b1", "w2", "b2")}


def common(call: Call, mix: HeadMix, tile: MixTile) -> tuple[operands.Members, Constants]:
    """What forward and backward kernels share."""
    mask, mask_constants = operands.mask(call)
    positions, position_constants = operands.positions(call)
    inner, inner_constants = operands.bias(call, mix.inner, tile.block_m, tile.block_n)
    outer, outer_constants = operands.bias(call, call.plan.bias, tile.block_m, tile.block_n)
    dropout, dropout_constants = operands.dropout(call)
    dim, dim_v = dims(call)
    constants: Constants = {
        **mask_constants,
        **position_constants,
        **inner_constants,
        **dropout_constants,
        **tile.constants(),
        **{f"OUTER_{name}": outer_constants[f"HAS_{name}"] for name in ("SLOPE", "TABLE", "PROFILE")},
        "OUTER_SIGNED": outer_constants["SIGNED"],
        "OUTER_DENSE": outer_constants["DENSE"],
        "BF16": call.q.dtype == torch.bfloat16,
        "HEAD_DIM": dim,
        "HEAD_DIM_V": dim_v,
        "WIDTH": mix.w1.shape[0],
        "HAS_INNER": bool(mix.inner),
        "CONCAT": bool(mix.inner) and mix.form != "add",
        "RESIDUAL": bool(mix.inner) and mix.form != "concat",
        "FOLD_SLOPE": False,
        "NATURAL": True,
        "HAS_SOFTCAP": call.softcap != 0.0,
    }
    values = {
        "shape": operands.shape(call, tile.block_m, tile.block_n),
        "mask": mask,
        "positions": positions,
        "inner": inner,
        "outer": outer,
        "mix": _weights(mix),
        "dropout": dropout,
        "scale": call.scale,
        "softcap": call.softcap,
    }
    return values, constants


def forward(call: Call, mix: HeadMix) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in q.dtype and the log-sum-exp [B, Hq, Tq] float32."""
    device = call.q.device
    tile = forward_tile(launch.architecture(device), call, mix)
    assert tile is not None  # unsupported() said so
    q, k = (rows(x) for x in turned_pair(call))
    v = rows(call.v)
    batch, heads, q_tokens, _ = q.shape
    # Packed documents may leave tokens outside every document, which no block would write.
    create = torch.empty if call.mask.cu_seqlens_q is None else torch.zeros
    out = create((batch, heads, q_tokens, v.shape[3]), dtype=q.dtype, device=device)
    lse = create((batch, heads, q_tokens), dtype=torch.float32, device=device)

    values, constants = common(call, mix, tile)
    constants["FOLD_SLOPE"] = _folds_slope(call, mix)
    constants.update({"HAS_SINKS": call.sinks is not None, "BLOCKS_PER_SM": 1})
    constants["SHARED_BYTES"] = forward_shared(call, mix, tile)
    tiles, key_rows = headmix_rows.key_tiles(call, k, v)
    values.update({"q": q, "tiles": tiles, "key_rows": key_rows, "out": out, "lse": lse, "sinks": call.sinks})
    values.update({"q_strides": operands.strides(q), "out_strides": operands.strides(out)})
    grid = (-(-q_max(call) // tile.block_m) * sequences(call),)
    run(
        "headmix/forward.cu", "headmix_forward", "MixForwardParams", constants, values, grid, 32 * tile.warps,
        int(constants["SHARED_BYTES"]), device,
    )  # fmt: skip
    return out[..., : call.v.shape[3]].contiguous(), lse
