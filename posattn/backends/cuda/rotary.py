"""Host side of the CUDA kernel that rotates a whole tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from posattn.backends.cuda import launch, operands
from posattn.backends.cuda.constants import RotaryConstants
from posattn.plan import Call, Rotary

_THREADS = 128


def rotated(
    x: Tensor, cos: Tensor, sin: Tensor, rotary: Rotary, back: bool = False, paged: Call | None = None
) -> Tensor:
    """x [B, H, T, D], D a multiple of 8, with its pairs rotated (back), contiguous. x may be the keys of a `paged`
    call, which are gathered in the same pass."""
    batch, heads, tokens, dim = x.shape
    table: operands.Members = {}
    page = 0
    if paged is not None:
        batch, tokens = paged.q.shape[0], paged.k_tokens
        table, page = operands.pages(paged)
    out = torch.empty((batch, heads, tokens, dim), dtype=x.dtype, device=x.device)
    values = {
        "x": x,
        "out": out,
        "x_strides": operands.strides(x),
        "angles": operands.angles(cos, sin),
        "batch": batch,
        "heads": heads,
        "tokens": tokens,
        "pages": table,
    }
    constants = RotaryConstants(x.dtype == torch.bfloat16, dim, operands.pairs(rotary), back, _THREADS, page)
    grid = (-(-out.numel() // (8 * _THREADS)),)
    launch.run("common/rotary.cu", "rotate", "RotaryParams", constants, values, grid, _THREADS, 0, x.device)
    return out


def rotated_pair(call: Call, q: Tensor, k: Tensor, back: bool = False) -> tuple[Tensor, Tensor]:
    """q and k (or their gradients) rotated (back), if the plan says so."""
    rotary = call.plan.rotary
    if rotary is None:
        return q, k
    q = rotated(operands.in_chunks(q), rotary.q_cos, rotary.q_sin, rotary, back)
    return q, rotated(operands.in_chunks(k), rotary.k_cos, rotary.k_sin, rotary, back)
