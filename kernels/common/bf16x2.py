"""Tiles of 16-bit numbers, two in a register."""

import triton
import triton.language as tl


@triton.jit
def multiply_bf16(x, y, NVIDIA: tl.constexpr):
    """x * y rounded once, both bfloat16: one instruction for two elements, where float32 takes three."""
    if NVIDIA:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 zeros;
            mov.b32 zeros, 0x80008000;
            fma.rn.bf16x2 $0, $1, $2, zeros;
            }""",
            "=r,r,r", [x, y], tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return (x.to(tl.float32) * y.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def add_bf16(x, y, NVIDIA: tl.constexpr):
    """x + y rounded once, both bfloat16."""
    if NVIDIA:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 ones; mov.b32 ones, 0x3f803f80; fma.rn.bf16x2 $0, $1, ones, $2; }",
            "=r,r,r", [x, y], tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return (x.to(tl.float32) + y.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def widen_bf16(x, NVIDIA: tl.constexpr):
    """A bfloat16 tile as float32, without taking its pairs apart first."""
    if NVIDIA:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], tl.float32, is_pure=True, pack=2
        )
    else:
        return x.to(tl.float32)
