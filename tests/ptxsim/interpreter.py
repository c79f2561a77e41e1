"""Mends Triton's own CPU interpreter (TRITON_INTERPRET=1): bfloat16, which it computes on as on raw 16-bit integers,
and loop variables, which it hands to kernels as Python's ints.

    os.environ["TRITON_INTERPRET"] = "1"   # before triton is imported
    from tests.ptxsim import interpreter
    interpreter.mend()

Afterwards bfloat16 operations widen to float32, compute, and round once to nearest even; the variable of a loop that
is no static_range is a tensor, as in a compiled kernel; and kernels may be autotuned with no GPU. Works on the
interpreter's builder methods by name, so a release that lacks one (3.6 to 3.9 differ) is left as it is there. Useful
for quick sweeps; the PTX machine is what proves a kernel.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import interpreter
from triton.runtime.driver import driver

# fmt: off
_ARITHMETIC = (
    "fadd", "fmul", "fdiv", "frem", "fsub", "fneg", "minimumf", "minnumf", "maximumf", "maxnumf", "precise_divf",
    "approx_divf", "clampf", "fma", "cos", "exp", "exp2", "floor", "ceil", "log", "log2", "precise_sqrt", "sqrt",
    "sin", "erf", "rsqrt",
)
# fmt: on

_Handle = interpreter.TensorHandle
_Builder = interpreter.InterpreterBuilder


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 patterns (uint16) as float32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 patterns, to nearest even; NaN becomes the canonical one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, np.uint16(0x7FFF), nearest)


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, _Handle) and value.dtype.scalar == tl.bfloat16


def _wide(value: Any) -> Any:
    return _Handle(widened(value.data), tl.float32) if _is_bfloat16(value) else value


def _narrow(value: Any) -> Any:
    return _Handle(rounded(value.data), tl.bfloat16)


def _in_float32(method: Callable[..., Any], comparison: bool) -> Callable[..., Any]:
    def computed(self: Any, *args: Any) -> Any:
        if not any(_is_bfloat16(arg) for arg in args):
            return method(self, *args)
        result = method(self, *(_wide(arg) for arg in args))
        return result if comparison else _narrow(result)

    computed.mended = True  # type: ignore[attr-defined]
    return computed


def _dot(method: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, acc: Any, *rest: Any) -> Any:
        result = method(self, _wide(a), _wide(b), _wide(acc), *rest)
        return _narrow(result) if _is_bfloat16(acc) else result

    return create_dot


def _cast(method: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        if _is_bfloat16(source) and dtype.scalar != tl.bfloat16:
            wide = _wide(source)
            return wide if dtype.scalar == tl.float32 else method(self, wide, dtype)
        if dtype.scalar == tl.bfloat16 and not _is_bfloat16(source):
            return _Handle(rounded(source.data.astype(np.float32)), tl.bfloat16)
        return method(self, source, dtype)

    return cast_impl


def _visit_for(self: Any, node: ast.For) -> ast.AST:
    """Assigns the variable of range() and tl.range() to itself, as the interpreter makes what is assigned a tensor."""
    called = node.iter.func if isinstance(node.iter, ast.Call) else None
    name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", None)
    if name == "range" and isinstance(node.target, ast.Name):
        variable = ast.Name(id=node.target.id, ctx=ast.Load())
        node.body.insert(0, ast.copy_location(ast.Assign(targets=[node.target], value=variable), node))
    visited: ast.AST = self.generic_visit(node)
    return visited


class _NoDevice:
    """What autotuning asks a driver for; every candidate takes no time."""

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def benchmark(function: Callable[[], None], **_: Any) -> list[float]:
            function()
            return [0.0, 0.0, 0.0]

        return benchmark

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def mend() -> None:
    """Replaces the interpreter's bfloat16 methods, its loops and its driver; a second call changes nothing."""
    if getattr(_Builder.create_fadd, "mended", False):
        return
    comparisons = [name for name in dir(_Builder) if name.startswith("create_fcmp")]
    arithmetic = [f"create_{name}" for name in _ARITHMETIC if hasattr(_Builder, f"create_{name}")]
    for name in comparisons + arithmetic:
        setattr(_Builder, name, _in_float32(getattr(_Builder, name), name in comparisons))
    _Builder.create_dot = _dot(_Builder.create_dot)
    _Builder.cast_impl = _cast(_Builder.cast_impl)
    interpreter.ASTTransformer.visit_For = _visit_for
    driver.set_active(_NoDevice())
