"""How the HeadMix kernels hold a tile: every warp owns one head of each group, and reads that head's operands itself.

A tensor [GROUP, ...] holds GROUP = num_warps heads, one a warp; a tuple of them holds all heads. No two warps need the
same key or value, so these come straight from global memory in the register layout of the tensor cores' operands: the
contraction runs over the dimensions in whatever order makes a lane's 16 bytes its own part of the product. Shared
memory carries the logits alone, from the warps that own a head to the warps that own positions, and back.
"""

import triton
import triton.language as tl


@triton.jit
def contracted(base, offsets, exists, ROWS: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The first ROWS rows of a tensor as [GROUP, BLOCK_D, ROWS], for products that sum over D; a head's row 0 is at its
    offset. Rows that do not exist ([1 or GROUP, ROWS]; None if all do) are zero. All addresses of a lane are one
    pointer and constants.

    The order of D is not memory's but the same in every operand: lane t of four reads VECTOR neighbours, which the
    products take as k = 2t, 2t + 1, 2t + 8, 2t + 9, ..."""
    VECTOR: tl.constexpr = 8 if BLOCK_D >= 32 else 4
    HIGH: tl.constexpr = BLOCK_D // (4 * VECTOR)
    GROUP: tl.constexpr = offsets.shape[0]
    lane = tl.reshape(tl.arange(0, 4) * VECTOR, [1, 1, 1, 1, 4, 1])
    d = tl.reshape(tl.arange(0, HIGH) * (4 * VECTOR), [1, HIGH, 1, 1, 1, 1])
    d += tl.reshape(tl.arange(0, VECTOR), [1, 1, 1, 1, 1, VECTOR])
    low = tl.reshape(tl.arange(0, 8) * STEP, [1, 1, 1, 8, 1, 1])
    high = tl.reshape(tl.arange(0, ROWS // 8) * (8 * STEP), [ROWS // 8, 1, 1, 1, 1, 1])
    pointers = (base + (tl.reshape(offsets, [1, 1, GROUP, 1, 1, 1]) + lane + low)) + (d + high)
    if exists is not None:
        e = tl.permute(tl.reshape(exists, [exists.numel // ROWS, ROWS // 8, 8]), (1, 0, 2))
        mask = tl.expand_dims(e, (1, 4, 5)) & (d + lane < D)
        x = tl.load(pointers, mask=mask, other=0.0)
    elif D == BLOCK_D:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=d + lane < D, other=0.0)
    x = tl.reshape(x, [ROWS // 8, HIGH, GROUP, 8, 4, VECTOR // 2, 2])
    return tl.reshape(tl.permute(x, (2, 1, 5, 4, 6, 0, 3)), [GROUP, BLOCK_D, ROWS])


@triton.jit
def summed(base, offsets, exists, ROWS: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a tensor as [GROUP, ROWS, BLOCK_D], for products that sum over the rows; see contracted.

    A lane reads the same 8 neighbouring dimensions of the rows k = 2t, 2t + 1, ... of the product; column n of the
    result is dimension `column_of(n)`."""
    GROUP: tl.constexpr = offsets.shape[0]
    high = tl.reshape(tl.arange(0, BLOCK_D // 8) * 8, [1, 1, 1, 1, BLOCK_D // 8, 1, 1])
    low = tl.reshape(tl.arange(0, 8), [1, 1, 1, 1, 1, 1, 8])
    lane = tl.reshape(tl.arange(0, 4) * (2 * STEP), [1, 1, 1, 1, 1, 4, 1])
    at = low + tl.reshape(tl.arange(0, ROWS // 16) * (16 * STEP), [ROWS // 16, 1, 1, 1, 1, 1, 1])
    at += tl.reshape(tl.arange(0, 2) * (8 * STEP), [1, 2, 1, 1, 1, 1, 1])
    at += tl.reshape(tl.arange(0, 2) * STEP, [1, 1, 2, 1, 1, 1, 1])
    pointers = (base + (tl.reshape(offsets, [1, 1, 1, GROUP, 1, 1, 1]) + high + lane)) + at
    if exists is not None:
        e = tl.reshape(exists, [exists.numel // ROWS, ROWS // 16, 2, 4, 2])
        mask = tl.expand_dims(tl.permute(e, (1, 2, 4, 0, 3)), (4, 6)) & (high + low < D)
        x = tl.load(pointers, mask=mask, other=0.0)
    elif D == BLOCK_D:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=high + low < D, other=0.0)
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
def _positions(parts, HEADS: tl.constexpr):
    """Tiles [GROUP, M, n] of all heads as [HEADS, M, n], those past the last one zero."""
    COUNT: tl.constexpr = HEADS // parts[0].shape[0]
    filled = ()
    for g in tl.static_range(COUNT):
        filled += (parts[g] if g < len(parts) else tl.zeros_like(parts[0]),)
    x = _joined(filled, COUNT)
    if COUNT == 2:
        x = tl.permute(x, (3, 0, 1, 2))
    elif COUNT == 4:
        x = tl.permute(x, (4, 3, 0, 1, 2))
    elif COUNT == 8:
        x = tl.permute(x, (5, 4, 3, 0, 1, 2))
    return tl.reshape(x, [HEADS, parts[0].shape[1], parts[0].shape[2]])


@triton.jit
def _tiles(x, GROUP: tl.constexpr):
    """The inverse of _positions, with the tiles of padding too."""
    COUNT: tl.constexpr = x.shape[0] // GROUP
    M: tl.constexpr = x.shape[1]
    N: tl.constexpr = x.shape[2]
    if COUNT == 1:
        return (x,)
    elif COUNT == 2:
        return _parted(tl.permute(tl.reshape(x, [2, GROUP, M, N]), (1, 2, 3, 0)), 2)
    elif COUNT == 4:
        return _parted(tl.permute(tl.reshape(x, [2, 2, GROUP, M, N]), (2, 3, 4, 1, 0)), 4)
    else:
        return _parted(tl.permute(tl.reshape(x, [2, 2, 2, GROUP, M, N]), (3, 4, 5, 2, 1, 0)), 8)


@triton.jit
def _neighbours(x):
    """[A, B, n] of even and odd columns."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]))


@triton.jit
def _flat(even, odd):
    """Even and odd columns [H, M, N / 2] as rows [H, P]: positions lie as [N / 16, M, 16].

    Neighbouring keys are joined last, and so lie in one register: the memory between the warps has them together."""
    H: tl.constexpr = even.shape[0]
    M: tl.constexpr = even.shape[1]
    SIXTEENS: tl.constexpr = even.shape[2] // 8
    even = tl.permute(tl.reshape(even, [H, M, SIXTEENS, 8]), (0, 2, 1, 3))
    odd = tl.permute(tl.reshape(odd, [H, M, SIXTEENS, 8]), (0, 2, 1, 3))
    return tl.reshape(tl.join(even, odd), [H, M * SIXTEENS * 16])


@triton.jit
def rows_of_heads(parts, HEADS: tl.constexpr):
    """Tiles [GROUP, M, N] of all heads as [HEADS, P]; heads past the last tile are zero."""
    GROUPS: tl.constexpr = len(parts)
    even = ()
    odd = ()
    for g in tl.static_range(GROUPS):
        a, b = _neighbours(parts[g])
        even += (a,)
        odd += (b,)
    return _flat(_positions(even, HEADS), _positions(odd, HEADS))


@triton.jit
def rows_of_halves(part):
    """A tile [GROUP, M, 16] of a group whose heads take two warps each, one for either half of 32 keys, as
    [GROUP / 2, P]."""
    H: tl.constexpr = part.shape[0] // 2
    M: tl.constexpr = part.shape[1]
    even, odd = tl.split(tl.reshape(part, [2, H, M, 8, 2]))
    return tl.reshape(tl.permute(tl.join(even, odd), (1, 0, 2, 3, 4)), [H, 2 * M * 16])


@triton.jit
def tiles_of_heads(x, GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """The inverse of rows_of_heads, with the tiles of padding too."""
    SIXTEENS: tl.constexpr = N // 16
    H: tl.constexpr = x.shape[0]
    even, odd = tl.split(tl.reshape(x, [H, SIXTEENS, M, 8, 2]))
    even = _tiles(tl.reshape(tl.permute(even, (0, 2, 1, 3)), [H, M, N // 2]), GROUP)
    odd = _tiles(tl.reshape(tl.permute(odd, (0, 2, 1, 3)), [H, M, N // 2]), GROUP)
    tiles = ()
    for g in tl.static_range(H // GROUP):
        tiles += (tl.reshape(tl.join(even[g], odd[g]), [GROUP, M, N]),)
    return tiles


@triton.jit
def own_half(x):
    """Of a tile [GROUP, M, 32] that has the heads of rows_of_halves twice, the half of the keys that each warp takes:
    [GROUP, M, 16]."""
    GROUP: tl.constexpr = x.shape[0]
    low, high = tl.split(tl.permute(tl.reshape(x, [GROUP, x.shape[1], 2, 16]), (0, 1, 3, 2)))
    return tl.where((half_of(GROUP) == 0)[:, None, None], low, high)


@triton.jit
def half_of(GROUP: tl.constexpr):
    """Which half of the keys each warp of a group takes whose heads take two warps each: [GROUP]."""
    return tl.arange(0, GROUP) // (GROUP // 2)


@triton.jit
def repeated(x, HEADS: tl.constexpr):
    """Rows of fewer heads [H, P] as [HEADS, P], again and again: a product takes no fewer, and the weights of the
    repeated ones are zero. The compiler carries each row between warps once."""
    H: tl.constexpr = x.shape[0]
    P: tl.constexpr = x.shape[1]
    return tl.reshape(tl.broadcast_to(x[None, :, :], [HEADS // H, H, P]), [HEADS, P])
