"""Host side of the CUDA forward pass: which kernels run for a call, and with what."""

from __future__ import annotations

import torch
from torch import Tensor

from posattn.backends.common.arch import MAX_SPLITS, key_splits
from posattn.backends.common.operands import k_max, q_max, sequences
from posattn.backends.cuda import compiler, launch, operands
from posattn.backends.cuda.configs.forward import DecodeTile, ForwardTile, decode_tile, forward_tile
from posattn.backends.cuda.operands import Constants
from posattn.backends.cuda.params import Values, pack
from posattn.plan import Call, Rotary

# Turning K in the kernel costs each query block one pass over K; ahead of time it costs two passes over memory and a
# launch. With one or two query blocks a head the first is less.
TURN_IN_KERNEL_BLOCKS = 2


def architecture(device: torch.device) -> str:
    """What kernels are compiled for: sm_90 with the instructions that only it has."""
    name = launch.architecture(device)
    return "sm_90a" if name == "sm_90" else name


def run(
    source: str,
    entry: str,
    struct: str,
    constants: Constants,
    values: Values,
    grid: tuple[int, ...],
    threads: int,
    shared_bytes: int,
    device: torch.device,
) -> None:
    """Compile (or find) a kernel and launch it; a grid without blocks needs neither."""
    if 0 in grid:
        return
    kernel = compiler.compile_kernel(source, entry, struct, constants, architecture(device))
    launch.launch(kernel, grid, (threads,), shared_bytes, pack(struct, values))


def turned(x: Tensor, cos: Tensor, sin: Tensor, rotary: Rotary, back: bool = False) -> Tensor:
    """x [B, H, T, D], D a multiple of 8, with its pairs turned (back), contiguous."""
    batch, heads, tokens, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    values = {
        "x": x,
        "out": out,
        "x_strides": operands.strides(x),
        "angles": operands.angles(cos, sin),
        "batch": batch,
        "heads": heads,
        "tokens": tokens,
    }
    threads = 128
    constants: Constants = {
        "BF16": x.dtype == torch.bfloat16,
        "DIM": dim,
        "HALF": cos.shape[-1],
        "INTERLEAVED": rotary.interleaved,
        "BACK": back,
        "THREADS": threads,
    }
    grid = (-(-out.numel() // (8 * threads)),)
    run("common/rotary.cu", "turn", "TurnParams", constants, values, grid, threads, 0, x.device)
    return out


def _shared_bytes(tile: ForwardTile | DecodeTile, constants: Constants) -> int:
    """Dynamic shared memory of a forward kernel; each asserts that this is enough."""
    dim, dim_v = 2 * constants["HEAD_DIM"], 2 * constants["HEAD_DIM_V"]
    stage = tile.block_n * (dim + dim_v)
    if isinstance(tile, DecodeTile):
        return max(tile.block_m * dim + tile.stages * stage, tile.warps * tile.block_m * (2 * dim_v + 8))
    if (constants["HAS_TABLE"] or constants["HAS_PROFILE"]) and not constants["EXPLICIT"]:
        stage += -(-8 * (tile.block_m + tile.block_n) // 1024) * 1024  # wgmma wants tiles aligned to this
    return max(tile.block_m * dim + tile.stages * stage, tile.block_m * dim_v)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] in q.dtype and the log-sum-exp [B, Hq, Tq] float32."""
    q, k, v = (operands.in_chunks(x) for x in (call.q, call.k, call.v))
    batch, heads, q_tokens, _ = q.shape
    device = q.device
    decoding = decode_tile(call)
    tile = decoding or forward_tile(launch.architecture(device), call)
    shape = operands.shape(call, tile.block_m, tile.block_n)
    if decoding:
        shape["q_blocks"] = -(-q_max(call) * shape["group"] // tile.block_m)
    blocks = shape["q_blocks"] * sequences(call) * (heads // shape["group"] if decoding else heads)
    splits = key_splits(blocks, k_max(call), launch.processors(device))

    # Packed documents may leave tokens outside every document, which no block would write.
    packed = call.mask.cu_seqlens_q is not None
    create = torch.zeros if packed else torch.empty
    out = create((batch, heads, q_tokens, v.shape[3]), dtype=q.dtype, device=device)
    lse = create((batch, heads, q_tokens), dtype=torch.float32, device=device)
    partial, partial_lse = out[None], lse[None]
    if splits > 1:
        partial = create((splits, *out.shape), dtype=torch.float32, device=device)
        partial_lse = create((splits, *lse.shape), dtype=torch.float32, device=device)

    mask, mask_constants = operands.mask(call)
    positions, position_constants = operands.positions(call)
    bias, bias_constants = operands.bias(call, call.plan.bias, tile.block_m // tile.warps, tile.block_n)
    dropout, dropout_constants = operands.dropout(call)
    rotary = call.plan.rotary
    turn_here = rotary is not None and shape["q_blocks"] <= TURN_IN_KERNEL_BLOCKS
    if rotary is not None and not turn_here:
        k = turned(k, rotary.k_cos, rotary.k_sin, rotary)
    constants: Constants = {
        **operands.element(call),
        **mask_constants,
        **position_constants,
        **bias_constants,
        **dropout_constants,
        **tile.constants(),
        "NATURAL": operands.natural(call),
        "HAS_SOFTCAP": call.softcap != 0.0,
        "HAS_SINKS": call.sinks is not None,
        "ROTARY_Q": rotary is not None,
        "ROTARY_K": turn_here,
        "INTERLEAVED": rotary is not None and rotary.interleaved,
        "HALF": 1 if rotary is None else rotary.q_cos.shape[-1],
        "SPLIT": splits > 1,
    }
    if isinstance(tile, ForwardTile):
        constants.update(HEAD_DIM=tile.padded(q.shape[3]), HEAD_DIM_V=tile.padded(v.shape[3]))
    constants["SHARED_BYTES"] = _shared_bytes(tile, constants)
    values = {
        "q": q,
        "k": k,
        "v": v,
        "out": partial,
        "lse": partial_lse,
        "sinks": call.sinks,
        "q_strides": operands.strides(q),
        "k_strides": operands.strides(k),
        "v_strides": operands.strides(v),
        "out_strides": operands.strides(partial[0]),
        "out_split": partial.stride(0),
        "lse_split": partial_lse.stride(0),
        "shape": shape,
        "mask": mask,
        "positions": positions,
        "bias": bias,
        "q_angles": operands.angles(rotary.q_cos, rotary.q_sin) if rotary is not None else {},
        "k_angles": operands.angles(rotary.k_cos, rotary.k_sin) if rotary is not None and turn_here else {},
        "dropout": dropout,
        "scale": call.scale,
        "softcap": call.softcap,
        "split_tiles": -(-shape["k_blocks"] // splits),
    }
    entry = "attention_decode" if decoding else "attention_forward"
    threads, shared = 32 * tile.warps, int(constants["SHARED_BYTES"])
    run(tile.source, entry, "ForwardParams", constants, values, (blocks, splits), threads, shared, device)
    if splits > 1:
        _combine(call, partial, partial_lse, out, lse)
    return out[..., : call.v.shape[3]].contiguous(), lse


def _combine(call: Call, partial: Tensor, partial_lse: Tensor, out: Tensor, lse: Tensor) -> None:
    """out and lse from those of the splits."""
    threads = 128
    constants: Constants = {
        "BF16": out.dtype == torch.bfloat16,
        "DIM_V": out.shape[3],
        "HAS_SINKS": call.sinks is not None,
        "MAX_SPLITS": MAX_SPLITS,
        "THREADS": threads,
    }
    values = {
        "partial": partial,
        "partial_lse": partial_lse,
        "out": out,
        "lse": lse,
        "sinks": call.sinks,
        "out_strides": operands.strides(out),
        "rows": lse.numel(),
        "heads": out.shape[1],
        "q_tokens": out.shape[2],
        "splits": partial.shape[0],
    }
    grid = (-(-lse.numel() * 32 // threads),)
    run("forward/combine.cu", "attention_combine", "CombineParams", constants, values, grid, threads, 0, out.device)
