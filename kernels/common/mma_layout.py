"""Tiles in memory as tensor cores hold their results, and loads and stores of tiles that other programs add to."""

import triton
import triton.language as tl

from .codegen import opaque


@triton.jit
def by_query(pointers, STRIDE: tl.constexpr, after, BLOCK_M: tl.constexpr, NVIDIA: tl.constexpr):
    """A pointer, or [rows, 1] of them, and the BLOCK_M - 1 after it, STRIDE apart, as the last axis.

    In the layout of a tensor core's result a thread holds queries 2 c, 2 c + 1 and all those 8 apart from them: one
    opaque pointer each, and the rest fit in the instruction."""
    pairs = (2 * STRIDE) * tl.arange(0, 4)[:, None]
    steps = STRIDE * (8 * tl.arange(0, BLOCK_M // 8)[:, None, None] + tl.arange(0, 2)[None, None, :])
    if len(pointers.shape) == 0:
        return (opaque(pointers + pairs[None, :, :], after, NVIDIA) + steps).reshape([BLOCK_M])
    else:
        at = opaque(pointers[:, :, None, None] + pairs[None, None, :, :], after, NVIDIA) + steps[None, :, :, :]
        return at.reshape([pointers.shape[0], BLOCK_M])


@triton.jit
def fragments(tile, after, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NVIDIA: tl.constexpr):
    """Pointers [ROWS // 16, 8, COLUMNS // 8, 4] to the fours of a tile in memory that is kept as a tensor core's result
    is held: in blocks of 16 x 8 a thread has columns 2 c and 2 c + 1 of rows r and r + 8, here side by side."""
    block = (COLUMNS // 8) * tl.arange(0, ROWS // 16)[:, None, None, None] + tl.arange(0, COLUMNS // 8)[:, None]
    thread = 4 * tl.arange(0, 8)[:, None, None] + tl.arange(0, 4)
    return opaque(tile + 4 * thread, after, NVIDIA) + 128 * block


@triton.jit
def _each(pointers):
    """Pointers to all four elements of each: [..., columns, rows]."""
    return pointers[:, :, :, :, None, None] + (tl.arange(0, 2)[:, None] + 2 * tl.arange(0, 2))


@triton.jit
def load_fragments(pointers, after, NVIDIA: tl.constexpr):
    """The float32 tile [ROWS, COLUMNS] at fragments(), which other programs add to; `after` comes from wait_for."""
    if NVIDIA:
        x, y, z, w = tl.inline_asm_elementwise(
            "ld.global.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,l,r", [pointers.to(tl.int64), after],
            (tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
        tile = tl.join(tl.join(x, y), tl.join(z, w))
    else:
        tile = tl.load(_each(pointers), volatile=True)
    ROWS: tl.constexpr = 16 * pointers.shape[0]
    COLUMNS: tl.constexpr = 8 * pointers.shape[2]
    return tl.permute(tile, 0, 5, 1, 2, 3, 4).reshape([ROWS, COLUMNS])


@triton.jit
def store_fragments(pointers, tile, NVIDIA: tl.constexpr):
    """Stores a tile where load_fragments loads it."""
    rows: tl.constexpr = pointers.shape[0]
    columns: tl.constexpr = pointers.shape[2]
    tile = tl.permute(tile.reshape([rows, 2, 8, columns, 4, 2]), 0, 2, 3, 4, 5, 1)
    if NVIDIA:
        upper, lower = tl.split(tile)
        x, y = tl.split(upper)
        z, w = tl.split(lower)
        tl.inline_asm_elementwise(
            "st.global.v4.f32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0;",
            "=r,l,f,f,f,f", [pointers.to(tl.int64), x, y, z, w], tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(_each(pointers), tile)


@triton.jit
def load_shared(pointers, after, NVIDIA: tl.constexpr):
    """The float32 tile that other programs add to, in the layout in which it is used; `after` comes from wait_for."""
    if NVIDIA:
        return tl.inline_asm_elementwise(
            "ld.global.f32 $0, [$1];", "=f,l,r", [pointers.to(tl.int64), after], tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.load(pointers, volatile=True)


@triton.jit
def load_shared_inside(pointers, inside, after, MASKED: tl.constexpr, NVIDIA: tl.constexpr):
    """load_shared, if MASKED zero where not `inside`: rows past the end point at the last row, which another warp may
    store."""
    if not MASKED:
        return load_shared(pointers, after, NVIDIA)
    elif NVIDIA:
        return tl.inline_asm_elementwise(
            """{
            .reg .pred inside;
            setp.ne.s32 inside, $3, 0;
            mov.b32 $0, 0;
            @inside ld.global.f32 $0, [$1];
            }""",
            "=f,l,r,r", [pointers.to(tl.int64), after, inside.to(tl.int32)], tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.load(pointers, mask=inside, other=0.0, volatile=True)


@triton.jit
def store_shared(pointers, values, inside, MASKED: tl.constexpr, NVIDIA: tl.constexpr):
    """Stores a tile as load_shared loads it, where `inside` or everywhere."""
    if not NVIDIA:
        tl.store(pointers, values, mask=inside)
    elif MASKED:
        tl.inline_asm_elementwise(
            """{
            .reg .pred inside;
            setp.ne.s32 inside, $3, 0;
            @inside st.global.f32 [$1], $2;
            mov.b32 $0, 0;
            }""",
            "=r,l,f,r", [pointers.to(tl.int64), values, inside.to(tl.int32)], tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.inline_asm_elementwise(
            "st.global.f32 [$1], $2; mov.b32 $0, 0;",
            "=r,l,f", [pointers.to(tl.int64), values], tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
