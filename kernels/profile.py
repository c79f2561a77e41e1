"""What a tile adds to the gradients of a profile's lines and of its row scale."""

import triton
import triton.language as tl

from .bias import lookup
from .scores import segments


@triton.jit
def profile_sums(
    ds, i0, j0, pi, pj, shift, row_scale, sums, Psi, psi_first, psi_last, PsiBounds, row_first, row_last, RowBounds,
    Knots, num_knots, slopes, CLAMP: tl.constexpr, EXPLICIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDS_BLOCK: tl.constexpr, KNOTS: tl.constexpr,
    NVIDIA: tl.constexpr,
):  # fmt: skip
    """The gradient [BLOCK_M] of the row scale from ds [BLOCK_N, BLOCK_M]; row_scale is [1, BLOCK_M] and `slopes` the
    head's. Sums of ds and of ds * y are added to `sums` [2, num_knots + 1], which no other program adds to: so the
    additions come in the program's own order."""
    low, high = segments(
        i0, j0, pi, pj, shift, row_scale, Psi, psi_first, psi_last, PsiBounds, row_first, row_last, RowBounds,
        Knots, num_knots, CLAMP, EXPLICIT, BLOCK_M, BLOCK_N, BOUNDS_BLOCK, KNOTS, NVIDIA,
    )  # fmt: skip
    psi = lookup(Psi, pi, pj, i0, j0, shift, psi_first, psi_last, 0, CLAMP, EXPLICIT, NVIDIA)
    scales = tl.reshape(row_scale, [BLOCK_M])
    ds_row = tl.sum(ds, 0)
    ds_psi_row = tl.sum(ds * psi, 0)
    drow_scale = tl.zeros([BLOCK_M], tl.float32)
    for m in range(low + 1, high + 1):
        y = psi * row_scale
        on = y > tl.load(Knots + m - 1)
        if m < num_knots:
            on = on & (y <= tl.load(Knots + m))
        part = tl.where(on, ds, 0.0)
        part_row = tl.sum(part, 0)
        part_psi_row = tl.sum(part * psi, 0)
        drow_scale += tl.load(slopes + m) * part_psi_row
        tl.atomic_add(sums + m, tl.sum(part_row), sem="relaxed")
        tl.atomic_add(sums + num_knots + 1 + m, tl.sum(part_psi_row * scales), sem="relaxed")
        ds_row -= part_row
        ds_psi_row -= part_psi_row
    tl.atomic_add(sums + low, tl.sum(ds_row), sem="relaxed")
    tl.atomic_add(sums + num_knots + 1 + low, tl.sum(ds_psi_row * scales), sem="relaxed")
    return drow_scale + tl.load(slopes + low) * ds_psi_row
