"""What a tile adds to the gradients of a profile's lines and of its row scale.

Most tiles lie in one segment. Its sums are carried in registers from tile to tile, and written out when the walk comes
to another segment.
"""

import triton
import triton.language as tl

from .bias import by_distance, gather


@triton.jit
def write_sums(sums, segment, num_knots, of_ds, of_dsy):
    """Adds the sums over a segment to `sums` [2, num_knots + 1], which no other program adds to: so the additions come
    in the program's own order."""
    tl.atomic_add(sums + segment, tl.sum(of_ds), sem="relaxed")
    tl.atomic_add(sums + num_knots + 1 + segment, tl.sum(of_dsy), sem="relaxed")


@triton.jit
def profile_sums(
    ds, low, high, segment, of_ds, of_dsy, sums, i0, j0, pi, pj, shift, row_scale, Psi, psi_first, psi_last,
    Knots, num_knots, slopes, QUERIES: tl.constexpr, CLAMP: tl.constexpr, EXPLICIT: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """The gradient [BLOCK_M] of the row scale from ds, a tile of the segments low .. high, and the carried state: the
    segment, its sums of ds by key [BLOCK_N] and of ds * y by query [BLOCK_M].

    QUERIES is the axis of the queries in ds and row_scale; `slopes` are the head's."""
    ROWS: tl.constexpr = ds.shape[0]
    COLUMNS: tl.constexpr = ds.shape[1]
    psi = by_distance(Psi, pi, pj, i0, j0, shift, psi_first, psi_last, 1, ROWS, COLUMNS, CLAMP, EXPLICIT, NVIDIA)
    scales = tl.sum(row_scale, 1 - QUERIES)  # drops its axis of one
    by_key = tl.sum(ds, QUERIES)
    by_query = tl.sum(ds * psi, 1 - QUERIES)
    drow_scale = tl.zeros(by_query.shape, tl.float32)
    if high > low:
        for m in range(low + 1, high + 1):
            psi = by_distance(
                Psi, pi, pj, i0, j0, shift, psi_first, psi_last, m, ROWS, COLUMNS, CLAMP, EXPLICIT, NVIDIA
            )
            y = psi * row_scale
            on = (y > gather(Knots + m - 1, 0, NVIDIA)) & (y <= gather(Knots + m, 0, NVIDIA))
            part = tl.where(on, ds, 0.0)
            part_key = tl.sum(part, QUERIES)
            part_query = tl.sum(part * psi, 1 - QUERIES)
            drow_scale += gather(slopes + m, 0, NVIDIA) * part_query
            write_sums(sums, m, num_knots, part_key, part_query * scales)
            by_key -= part_key
            by_query -= part_query
    if low != segment:
        write_sums(sums, segment, num_knots, of_ds, of_dsy)
        of_ds = tl.zeros(by_key.shape, tl.float32)
        of_dsy = tl.zeros(by_query.shape, tl.float32)
    drow_scale += gather(slopes + low, 0, NVIDIA) * by_query
    return drow_scale, low, of_ds + by_key, of_dsy + by_query * scales
