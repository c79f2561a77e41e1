"""Ways to keep the compiler from choices that cost registers: values that it does not see through."""

import triton
import triton.language as tl


@triton.jit
def opaque(pointers, after, NVIDIA: tl.constexpr):
    """The same pointers, in a way that the compiler does not see through.

    Else it would carry the address of each element along the loop in registers of its own; so a tile's addresses are a
    few pointers and offsets that fit in the instruction."""
    if NVIDIA:
        address = tl.inline_asm_elementwise(
            "mov.b64 $0, $1;", "=l,l,r", [pointers.to(tl.int64), after], tl.int64, is_pure=True, pack=1
        )
        return address.to(pointers.dtype)
    else:
        return pointers


@triton.jit
def hidden(index, HIDE: tl.constexpr):
    """The same int32, in a way that the compiler does not see through: what follows from a loop's index is then
    computed anew in each step, where the compiler would carry an address for each load."""
    if HIDE:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [index], tl.int32, is_pure=True, pack=1)
    else:
        return index


@triton.jit
def apart(index, NUMBER: tl.constexpr, NVIDIA: tl.constexpr):
    """True, in a way that only ptxas sees through: what an `if` of it holds is a region of its own for Triton.

    Products in one region are taken for a chain, and the warps of all laid along one axis of the results, so that each
    reads the whole of one operand. A product in a region of its own has its warps spread over both axes, and results of
    products that go into no other in their region too. NUMBER tells conditions apart, or regions would be merged."""
    if NVIDIA:
        yes = tl.inline_asm_elementwise("mov.b32 $0, 1;", "=r,r,r", [index, NUMBER], tl.int32, is_pure=True, pack=1)
        return yes > 0
    else:
        return True
