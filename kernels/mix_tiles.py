"""How the HeadMix kernels hold a tile: every warp owns one head of each group, and reads that head's operands itself.

A tensor [GROUP, ...] holds GROUP = num_warps heads, one a warp; a tuple of them holds all heads. No two warps need the
same key or value, so these come straight from global memory in the register layout of the tensor cores' operands: the
contraction runs over the dimensions in whatever order makes a lane's 16 bytes its own part of the product. Shared
memory carries the logits alone, from the warps that own a head to the warps that own positions, and back.
"""

import triton
import triton.language as tl


@triton.jit
def contracted(
    base, heads, rows, stride_h, ROWS: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows of a [H, T, D] tensor as [heads, BLOCK_D, ROWS], for products that sum over D. Without `rows` they are the
    first ones, and all addresses of a lane are one pointer and constants.

    The order of D is not memory's but the same in every operand: lane t of four reads VECTOR neighbours, which the
    products take as k = 2t, 2t + 1, 2t + 8, 2t + 9, ..."""
    VECTOR: tl.constexpr = 8 if BLOCK_D >= 32 else 4
    HIGH: tl.constexpr = BLOCK_D // (4 * VECTOR)
    GROUP: tl.constexpr = heads.shape[0]
    lane = tl.reshape(tl.arange(0, 4) * VECTOR, [1, 1, 1, 1, 4, 1])
    first = base + tl.reshape(heads * stride_h, [1, 1, GROUP, 1, 1, 1])
    d = tl.reshape(tl.arange(0, HIGH) * (4 * VECTOR), [1, HIGH, 1, 1, 1, 1])
    d += tl.reshape(tl.arange(0, VECTOR), [1, 1, 1, 1, 1, VECTOR])
    if rows is None:
        lane += tl.reshape(tl.arange(0, 8) * STEP, [1, 1, 1, 8, 1, 1])
        at = d + tl.reshape(tl.arange(0, ROWS // 8) * (8 * STEP), [ROWS // 8, 1, 1, 1, 1, 1])
    else:
        lane += tl.reshape(rows * STEP, [ROWS // 8, 1, 1, 8, 1, 1])
        at = d
    pointers = (first + lane) + at
    if D == BLOCK_D:
        x = tl.load(pointers)
    else:
        t = tl.reshape(tl.arange(0, 4) * VECTOR, [1, 1, 1, 1, 4, 1])
        x = tl.load(pointers, mask=d + t < D, other=0.0)
    x = tl.reshape(x, [ROWS // 8, HIGH, GROUP, 8, 4, VECTOR // 2, 2])
    return tl.reshape(tl.permute(x, (2, 1, 5, 4, 6, 0, 3)), [GROUP, BLOCK_D, ROWS])


@triton.jit
def summed(base, heads, rows, stride_h, ROWS: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a [H, T, D] tensor as [heads, ROWS, BLOCK_D], for products that sum over the rows; see contracted.

    A lane reads the same 8 neighbouring dimensions of the rows k = 2t, 2t + 1, ... of the product; column n of the
    result is dimension `column_of(n)`."""
    GROUP: tl.constexpr = heads.shape[0]
    first = base + tl.reshape(heads * stride_h, [1, 1, 1, GROUP, 1, 1, 1])
    high = tl.reshape(tl.arange(0, BLOCK_D // 8) * 8, [1, 1, 1, 1, BLOCK_D // 8, 1, 1])
    at = tl.reshape(tl.arange(0, 8), [1, 1, 1, 1, 1, 1, 8])
    lane = high
    if rows is None:
        lane += tl.reshape(tl.arange(0, 4) * (2 * STEP), [1, 1, 1, 1, 1, 4, 1])
        at += tl.reshape(tl.arange(0, ROWS // 16) * (16 * STEP), [ROWS // 16, 1, 1, 1, 1, 1, 1])
        at += tl.reshape(tl.arange(0, 2) * (8 * STEP), [1, 2, 1, 1, 1, 1, 1])
        at += tl.reshape(tl.arange(0, 2) * STEP, [1, 1, 2, 1, 1, 1, 1])
    else:
        r = tl.permute(tl.reshape(rows, [ROWS // 16, 2, 4, 2]), (0, 1, 3, 2))
        lane += tl.reshape(r * STEP, [ROWS // 16, 2, 2, 1, 1, 4, 1])
    pointers = (first + lane) + at
    if D == BLOCK_D:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=high + tl.reshape(tl.arange(0, 8), [1, 1, 1, 1, 1, 1, 8]) < D, other=0.0)
    return tl.reshape(tl.permute(x, (3, 0, 1, 5, 2, 6, 4)), [GROUP, ROWS, BLOCK_D])


@triton.jit
def column_of(n, BLOCK_D: tl.constexpr):
    """The dimension in column n of a product with `summed`."""
    return n % (BLOCK_D // 8) * 8 + n // (BLOCK_D // 8)


@triton.jit
def _joined(parts, COUNT: tl.constexpr):
    if COUNT == 1:
        return parts[0]
    else:
        halves = ()
        for i in tl.static_range(COUNT // 2):
            halves += (tl.join(parts[2 * i], parts[2 * i + 1]),)
        return _joined(halves, COUNT // 2)


@triton.jit
def _parted(x, COUNT: tl.constexpr):
    if COUNT == 1:
        return (x,)
    else:
        low, high = tl.split(x)
        return _parted(low, COUNT // 2) + _parted(high, COUNT // 2)


@triton.jit
def rows_of_heads(parts, HEADS: tl.constexpr):
    """Tiles [GROUP, M, N] of all heads as [HEADS, M * N]; heads past the last tile are zero."""
    SHAPE: tl.constexpr = parts[0].shape
    COUNT: tl.constexpr = HEADS // SHAPE[0]
    even = ()
    odd = ()
    for g in tl.static_range(COUNT):
        part = parts[g] if g < len(parts) else tl.zeros_like(parts[0])
        a, b = tl.split(tl.reshape(part, [SHAPE[0], SHAPE[1], SHAPE[2] // 2, 2]))
        even += (a,)
        odd += (b,)
    # Neighbouring keys are joined last, and so lie in one register: the memory between the warps has them together.
    x = tl.join(_joined(even, COUNT), _joined(odd, COUNT))
    if COUNT == 2:
        x = tl.permute(x, (3, 0, 1, 2, 4))
    elif COUNT == 4:
        x = tl.permute(x, (4, 3, 0, 1, 2, 5))
    elif COUNT == 8:
        x = tl.permute(x, (5, 4, 3, 0, 1, 2, 6))
    return tl.reshape(x, [HEADS, SHAPE[1] * SHAPE[2]])


@triton.jit
def _tiles(x, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    COUNT: tl.constexpr = x.shape[0] // GROUP
    if COUNT == 1:
        return (tl.reshape(x, [GROUP, M, N]),)
    elif COUNT == 2:
        return _parted(tl.permute(tl.reshape(x, [2, GROUP, M, N]), (1, 2, 3, 0)), 2)
    elif COUNT == 4:
        return _parted(tl.permute(tl.reshape(x, [2, 2, GROUP, M, N]), (2, 3, 4, 1, 0)), 4)
    else:
        return _parted(tl.permute(tl.reshape(x, [2, 2, 2, GROUP, M, N]), (3, 4, 5, 2, 1, 0)), 8)


@triton.jit
def tiles_of_heads(x, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """The inverse of rows_of_heads, with the tiles of padding too."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], M * N // 2, 2]))
    even = _tiles(even, GROUP, M, N // 2)
    odd = _tiles(odd, GROUP, M, N // 2)
    COUNT: tl.constexpr = x.shape[0] // GROUP
    tiles = ()
    for g in tl.static_range(COUNT):
        # Joined last: see rows_of_heads.
        tiles += (tl.reshape(tl.join(even[g], odd[g]), [GROUP, M, N]),)
    return tiles
