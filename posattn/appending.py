"""New tokens of a paged cache, put where they belong: turned, rounded and written in one pass where the CPU can."""

from __future__ import annotations

from torch import Tensor

from posattn.backends import cpu
from posattn.turning import turn


def append(new: Tensor, pool: Tensor, index: Tensor, tables: tuple[Tensor, Tensor] | None, interleaved: bool) -> None:
    """Put tokens of new [B, H, T, D] into pool [pages, page, H, D] of the same dtype and device.

    Args:
        index: int64 [3, tokens] on the CPU: each token's batch entry, its place in new, and its slot in the pool, which
            is its page times the tokens of a page, and its place there.
        tables: cos and sin float32 [1, tokens, rotary_dim / 2] on the pool's device, to turn the tokens by; None to
            leave them.
        interleaved: whether pairs are (2c, 2c + 1), as of `posattn.plan.Rotary`.
    """
    new = new.detach()
    if cpu.appends(new, pool):
        cpu.append(new, pool, index, None if tables is None else (tables[0][0], tables[1][0], interleaved))
        return
    entries, sources, slots = index.to(pool.device)
    tokens = new[entries, :, sources]  # [tokens, H, D]
    if tables is not None:
        tokens = turn(tokens.transpose(0, 1)[None], *tables, interleaved)[0].transpose(0, 1)
    pool.flatten(0, 1)[slots] = tokens
