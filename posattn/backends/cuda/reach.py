"""Host side of reach in CUDA: which keys blocks of queries cannot do without (csrc/cuda/reach/)."""

from __future__ import annotations

import torch
from torch import Tensor

from posattn.backends.common.operands import all_blocks, k_max, q_max, sequences
from posattn.backends.common.reach import CELL, falling_operands, stretch, worthwhile
from posattn.backends.cuda import launch, operands
from posattn.backends.cuda.configs.forward import DECODE_ROWS
from posattn.backends.cuda.constants import ReachConstants, TurnConstants
from posattn.plan import Call, Rotary

_SOURCE = "reach/find.cu"
THREADS = 128


def keys_in_reach(
    call: Call,
    q: Tensor,
    k: Tensor,
    rows: int,
    q_rotary: Rotary | None = None,
    k_rotary: Rotary | None = None,
    pages: operands.Members | None = None,
    page: int = 0,
) -> Tensor | None:
    """int32 [blocks of `rows` queries of all sequences, H, 2]: the first key in reach, and the end; None where nothing
    may be out of it. q and k are those that the kernel is given; it turns them by what rotaries are given."""
    if not worthwhile(call, DECODE_ROWS):
        return None
    heads, kv_heads, device = q.shape[1], k.shape[1], q.device
    of, bias = falling_operands(call), call.plan.bias
    mask, constants = operands.mask(call)
    shape = operands.shape(call, rows, CELL)
    cells = all_blocks(call, call.k_tokens, k_max(call), CELL)
    reach = torch.empty((all_blocks(call, q.shape[2], q_max(call), rows), heads, 2), dtype=torch.int32, device=device)
    values = {
        "q": q,
        "k": k,
        "q_amplitude": None if q_rotary is None else _amplitude(q_rotary.q_cos, q_rotary.q_sin),
        "k_amplitude": None if k_rotary is None else _amplitude(k_rotary.k_cos, k_rotary.k_sin),
        "norms": torch.empty((kv_heads, cells), dtype=torch.float32, device=device),
        "reach": reach,
        "slope": of.slope,
        "table": of.table,
        "behind": of.behind,
        "before": of.before,
        "slope_batch": of.slope_batch,
        "table_head": of.table_head,
        "q_strides": operands.strides(q),
        "k_strides": operands.strides(k),
        "shape": shape,
        "mask": mask,
        "pages": pages or {},
        "table_first": of.first,
        "table_last": of.last,
        "table_cells": of.cells,
        "cells": cells,
        "scale": abs(call.scale),
        "softcap": call.softcap,
    }
    given = ReachConstants(
        bf16=q.dtype == torch.bfloat16,
        dim=q.shape[3],
        sequence=constants.sequence,
        has_slope=of.slope is not None,
        signed=bias.slope is not None and bias.slope.signed,
        has_table=of.table is not None,
        has_softcap=call.softcap != 0.0,
        block_m=rows,
        block_n=CELL,
        page=page,
        threads=THREADS,
    )
    for entry, blocks in (("key_norms", shape["k_blocks"] * kv_heads), ("find_reach", shape["q_blocks"] * heads)):
        grid = (blocks * sequences(call),)
        launch.run(_SOURCE, entry, "ReachParams", given, values, grid, THREADS, 0, device)
    return reach


def queries_in_reach(
    call: Call, of_queries: Tensor, shape: operands.Members, mask: operands.Members, constants: TurnConstants
) -> tuple[Tensor, Tensor | None]:
    """The same the other way round, int32 [blocks of `block_n` keys, Hkv, 2] of blocks of `block_m` queries; and, for a
    deterministic call, [blocks of queries, Hkv] of the first block of keys that walks them."""
    kv_heads, device = call.k.shape[1], of_queries.device
    blocks = all_blocks(call, call.k.shape[2], k_max(call), constants.block_n)
    reach = torch.empty((blocks, kv_heads, 2), dtype=torch.int32, device=device)
    first = torch.empty((of_queries.shape[0], kv_heads), dtype=torch.int32, device=device)
    values = {"of_queries": of_queries, "reach": reach, "first": first, "shape": shape, "mask": mask}
    entries = {"turn_reach": shape["k_blocks"], "first_in_reach": shape["q_blocks"] if call.deterministic else 0}
    for entry, blocks in entries.items():
        grid = (blocks * kv_heads * sequences(call),)
        launch.run("reach/turn.cu", entry, "TurnParams", constants, values, grid, THREADS, 0, device)
    return reach, first if call.deterministic else None


def _amplitude(cos: Tensor, sin: Tensor) -> Tensor:
    """The stretch of a rotation, [1]."""
    return stretch(cos.float(), sin.float()).view(1)
