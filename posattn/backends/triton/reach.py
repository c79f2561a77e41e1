"""Host side of the reach of a bias that falls with the distance: which keys blocks of queries cannot do without."""

from __future__ import annotations

import torch
from torch import Tensor

from posattn.backends.common.operands import all_blocks, k_max, power_of_two, q_max, sequences
from posattn.backends.common.reach import CELL, falling_operands, worthwhile
from posattn.backends.triton.arguments import NO_PAGES, Arguments, Launch, angles, strides
from posattn.backends.triton.configs.forward import FEW_ROWS
from posattn.kernels.attention.reach import Falling, find_reach, largest_norms, turn_reach
from posattn.kernels.common.arguments import Angles
from posattn.kernels.common.config import SidesConfig
from posattn.kernels.common.pages import Pages
from posattn.plan import Call

# Elements that a block of four warps holds at once.
_TILE = 4096


def keys_in_reach(
    call: Call,
    launch: Launch,
    q: Tensor,
    k: Tensor,
    block: int,
    arguments: Arguments,
    q_angles: Angles | None = None,
    k_angles: Angles | None = None,
    pages: Pages = NO_PAGES,
    page: int = 0,
) -> Tensor | None:
    """int32 [blocks of `block` queries of all sequences, H, 2]: the first key in reach, and the end; None where nothing
    may be out of it. q and k are those that the kernel is given, and so is what turns them there."""
    if not worthwhile(call, FEW_ROWS):
        return None
    rotary = call.plan.rotary
    none = angles(None, None)
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[3]
    block_d = power_of_two(dim)
    rows = max(1, _TILE // block_d)
    shared = {
        "HALF": 0 if rotary is None else rotary.q_cos.shape[-1],
        "D": dim,
        "BLOCK_D": block_d,
        "INTERLEAVED": rotary is not None and rotary.interleaved,
    }
    cells = all_blocks(call, call.k_tokens, k_max(call), CELL)
    norms = torch.empty((kv_heads, cells), dtype=torch.float32, device=q.device)
    grid = (-(-k_max(call) // CELL) * kv_heads * sequences(call),)
    launch(
        largest_norms,
        grid,
        (k, norms, strides(k), k_angles or none, pages, arguments.shape, arguments.mask, k_max(call), cells),
        {**shared, "PAGE": page, "ROWS": min(CELL, rows)},
        4,
        1,
        None,
    )
    blocks = all_blocks(call, q.shape[2], q_max(call), block)
    reach = torch.empty((blocks, heads, 2), dtype=torch.int32, device=q.device)
    launch(
        find_reach,
        (-(-q_max(call) // block) * heads * sequences(call),),
        (
            *(q, reach, norms, cells, strides(q), q_angles or none, _falling(call)),
            *(arguments.shape, arguments.mask, q_max(call), k_max(call), abs(call.scale), call.softcap or None),
        ),
        {
            **shared,
            "ROWS": min(block, rows),
            "BLOCK": block,
            "SIGNED": call.plan.bias.slope is not None and call.plan.bias.slope.signed,
            "CONFIG": _sides(arguments),
        },
        4,
        1,
        None,
    )
    return reach


def queries_in_reach(
    call: Call, launch: Launch, q: Tensor, k: Tensor, block_m: int, block_n: int, arguments: Arguments
) -> Tensor | None:
    """keys_in_reach the other way round, [blocks of `block_n` keys, H, 4]: spans of tiles of `block_m` queries. q and k
    are turned already."""
    of_queries = keys_in_reach(call, launch, q, k, CELL, arguments)
    if of_queries is None:
        return None
    heads = q.shape[1]
    blocks = all_blocks(call, k.shape[2], k_max(call), block_n)
    reach = torch.empty((blocks, heads, 4), dtype=torch.int32, device=q.device)
    launch(
        turn_reach,
        (-(-k_max(call) // block_n) * heads * sequences(call),),
        (of_queries, reach, arguments.shape, arguments.mask, q_max(call), k_max(call)),
        {"ROWS": CELL, "BLOCK_M": block_m, "BLOCK_N": block_n, "CONFIG": _sides(arguments)},
        1,
        1,
        None,
    )
    return reach


def _sides(arguments: Arguments) -> SidesConfig:
    return SidesConfig(arguments.config.has_left, arguments.config.has_right)


def _falling(call: Call) -> Falling:
    of = falling_operands(call)
    return Falling(**{name: getattr(of, name) for name in Falling._fields})
