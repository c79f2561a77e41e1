"""Keys and values in pages, [pages, H, page, D], found through a block table."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Pages(NamedTuple):
    """The block table [B, entries], int32, and the pool's last page; None throughout where keys lie side by side."""

    table: Any
    entries: Any
    last: Any


@triton.jit
def paged_rows(base, pages: Pages, b, t0, rows, page_stride, stride, PAGE: tl.constexpr, WHOLE: tl.constexpr):
    """Where the tile of tokens t0 + rows of batch entry b begins, for who adds rows * stride: one pointer if a page
    holds the whole tile (WHOLE), else one a row, [rows, 1]. `base` is the pool's. An entry that names no page of the
    pool, which nobody could look for, reads its first or its last."""
    table = pages.table + tl.cast(b, tl.int64) * pages.entries
    if WHOLE:
        page = tl.minimum(tl.maximum(tl.load(table + t0 // PAGE), 0), pages.last).to(tl.int64)
        return base + page * page_stride + tl.cast(t0 % PAGE, tl.int64) * stride
    else:
        t = t0 + rows
        page = tl.minimum(tl.maximum(tl.load(table + t // PAGE), 0), pages.last).to(tl.int64)
        return base + (page * page_stride + (t % PAGE - rows).to(tl.int64) * stride)[:, None]
