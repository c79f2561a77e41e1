"""Queries as the HeadMix backward kernel takes them and gives their gradient: in the order of its fragments.

Every sequence begins at a padded row that is a multiple of ROWS, a tile's queries; rows of no token are zeros. See
csrc/cuda/headmix/rows.h for the tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posattn.backends.common.operands import sequences
from posattn.backends.cuda import rows as gradients
from posattn.plan import Call

ROWS = 24
_EIGHTS = ROWS // 8
_NO_WEIGHT = -(2.0**100)  # of a row that sees nothing: exp2 of any logit less this is zero, and zero times it is too


def padded_count(call: Call) -> int:
    """Padded rows of all sequences."""
    tokens: int = call.q.shape[2]
    count: int = sequences(call)
    packed = call.mask.cu_seqlens_q is not None
    return (tokens // ROWS + count if packed else -(-tokens // ROWS) * count) * ROWS


def tiles(call: Call, q: Tensor, grad_out: Tensor, minus_lse2: Tensor, minus_delta: Tensor) -> Tensor:
    """[H, tiles, TILE_BYTES / 2] int16 from q and grad_out [B, H, Tq, a multiple of 32] and statistics [B, H, Tq].

    minus_lse2 is -inf where a row sees nothing.
    """
    at = gradients.padded_rows(call, ROWS)
    count = padded_count(call)
    to = torch.where(at >= 0, at, count).flatten()  # tokens of no sequence share a row that is cut off

    def padded(x: Tensor) -> Tensor:
        rows = x.new_zeros((x.shape[1], count + 1, *x.shape[3:]))
        rows[:, to] = x.transpose(0, 1).flatten(1, 2)
        return rows[:, :count].unflatten(1, (count // ROWS, _EIGHTS, 8))  # [H, tile, eight, row, D]

    q, grad_out = padded(q), padded(grad_out)
    parts = [_columns(q), _columns(grad_out)]
    parts.append(_statistics(padded(minus_lse2.clamp(min=_NO_WEIGHT)), padded(minus_delta)))
    parts += [_pairs(q), _pairs(grad_out)]
    return torch.cat([x.flatten(2).view(torch.int16) for x in parts], dim=2)


def key_tiles(call: Call, k: Tensor, v: Tensor) -> tuple[Tensor, int]:
    """Keys and values [B, Hkv, Tk, a multiple of 32] as the forward kernel takes them, and how many rows they are.

    A tile's keys lie as queries do in the backward kernel's tiles (see _columns), its values by pairs whose dimensions
    are those that a lane stores. A tile of zeros ends them, for the kernel reads one ahead.
    """
    cu, batch, tokens = call.mask.cu_seqlens_k, k.shape[0], k.shape[2]
    count = (-(-tokens // ROWS) * batch if cu is None else tokens // ROWS + sequences(call)) * ROWS
    token = torch.arange(tokens, device=k.device)[None]
    if cu is None:
        start = 0 if call.mask.k_starts is None else call.mask.k_starts[:, None]
        to = torch.arange(batch, device=k.device)[:, None] * (count // max(batch, 1)) + token - start
        to = torch.where(token < start, count, to)
    else:
        document = torch.searchsorted(cu.long()[1:], token, right=True).clamp(max=sequences(call) - 1)
        start = cu.long()[document]
        to = (start // ROWS + document) * ROWS + token - start
        to = torch.where(token < cu[-1], to, count)
    if call.mask.k_lengths is not None:
        to = torch.where(token < call.mask.k_lengths[:, None], to, count)

    def padded(x: Tensor) -> Tensor:
        rows = x.new_zeros((x.shape[1], count + 1, x.shape[3]))
        rows[:, to.flatten()] = x.transpose(0, 1).flatten(1, 2)
        return rows[:, :count].unflatten(1, (count // ROWS, _EIGHTS, 8))

    tiles = torch.cat([_columns(padded(k)).flatten(2), _pairs(_in_runs(padded(v)))], dim=2).flatten()
    return torch.cat([tiles, tiles.new_zeros(ROWS * (k.shape[3] + v.shape[3]))]), count


def _in_runs(x: Tensor) -> Tensor:
    """Dimension 8 n + g of the result is what lane g stores as its n-th: neighbours, eight in each 64 of them and four
    in a last 32."""
    wide = x.shape[-1] // 64 * 64
    runs = x[..., :wide].unflatten(-1, (-1, 8, 8)), x[..., wide:].unflatten(-1, (-1, 8, 4))
    return torch.cat([part.transpose(-1, -2).flatten(-3) for part in runs], dim=-1)


def _columns(x: Tensor) -> Tensor:
    """[H, tile, eight, D / 32, row, 4, 8]: lane (row, t) has eight neighbouring dimensions of its row."""
    return x.unflatten(-1, (-1, 4, 8)).movedim(3, 4).contiguous()


def _pairs(x: Tensor) -> Tensor:
    """Lane (g, t) has rows 2 t and 2 t + 1 of dimensions 8 n + g: two of them and eights 0 and 1, four of them and the
    last eight."""
    by_lane = x.unflatten(-1, (-1, 8)).unflatten(3, (4, 2))  # [H, tile, eight, t, row, n, g]
    both = by_lane[:, :, :2].unflatten(5, (-1, 2)).permute(0, 1, 5, 7, 3, 6, 2, 4)
    last = by_lane[:, :, 2:].unflatten(5, (-1, 4)).permute(0, 1, 5, 7, 3, 6, 2, 4)
    return torch.cat([both.flatten(2), last.flatten(2)], dim=2)


def _statistics(minus_lse2: Tensor, minus_delta: Tensor) -> Tensor:
    """[H, tile, row, 4, 4, 2] bfloat16: lane (row, t) has parts 2 t, 2 t + 1 of its row of each eight; padding."""
    parts = torch.stack([*_in_parts(minus_lse2), *_in_parts(minus_delta)], dim=-1)  # [H, tile, eight, row, 8]
    by_lane = parts.unflatten(-1, (4, 2)).movedim(2, 4)
    return torch.nn.functional.pad(by_lane, (0, 0, 0, 4 - _EIGHTS))


def _in_parts(x: Tensor) -> list[Tensor]:
    """Three bfloat16 numbers whose sum is x, float32, and zero."""
    parts = []
    for _ in range(3):
        parts.append(x.bfloat16())
        x = x - parts[-1].float()
    return [*parts, torch.zeros_like(parts[0])]


def queries_gradient(call: Call, accumulated: Tensor, dim: int, by_lane: bool) -> Tensor:
    """dQ [B, H, Tq, dim] float32 from sums in the order of the fragments, [H, rows / 8, 8 dim]; a lane's four numbers
    are neighbours, or (unless by_lane) those of a warp's lanes.

    A fragment [16 dimensions, 8 queries] has its rows g and g + 8 at neighbouring dimensions 2 m and 2 m + 1 of lane
    g's run of 8 (4 in the last 32 of an odd dim), its columns at queries 2 t and 2 t + 1.
    """
    heads, wide = call.q.shape[1], dim // 64
    if by_lane:
        accumulated = accumulated.view(heads, -1, 32, 4).transpose(2, 3).contiguous()
    by_step = accumulated.view(heads, -1, dim // 16, 2, 2, 8, 4)
    parts = []
    if wide:
        x = by_step[:, :, : 4 * wide].unflatten(2, (wide, 4))  # [H, T / 8, block, m, dimension, query, g, t]
        parts.append(x.permute(0, 1, 7, 5, 2, 6, 3, 4).flatten(1, 3).flatten(2))
    if dim % 64:
        x = by_step[:, :, 4 * wide :]  # [H, T / 8, m, dimension, query, g, t]
        parts.append(x.permute(0, 1, 6, 4, 5, 2, 3).flatten(1, 3).flatten(2))
    rows = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
    at = gradients.padded_rows(call, ROWS)
    return torch.where((at >= 0)[..., None], rows[:, at.clamp(min=0)], 0.0).movedim(0, 1)
