"""Runs a @triton.jit function on CPU tensors through the PTX that a GPU of the chosen architecture would get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .kernel import Argument, Kernel, Options, Report

_TYPE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass
class Compiled:
    """A compiled specialisation: its PTX, ready to launch, and Triton's own object. Mutation tests replace `kernel`."""

    kernel: Kernel
    triton: Any
    ptx: str

    def launch(self, grid: Sequence[int], args: Sequence[Argument], options: Options | None = None) -> Report:
        """Runs it with the arguments that compile_triton returned beside it."""
        metadata = self.triton.metadata
        return self.kernel.launch(grid, (32 * metadata.num_warps,), args, shared=metadata.shared, options=options)


_cache: dict[tuple[Any, ...], Compiled] = {}


def _type_of(value: Argument) -> tuple[str, bool]:
    """The signature type of an argument, and whether Triton may assume that it is a multiple of 16."""
    if isinstance(value, torch.Tensor):
        return "*" + _TYPE_NAMES[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    raise TypeError(f"args: expected tensors, numbers or None, got {type(value).__name__}")


Path = tuple[int, ...]
Signature = tuple[dict[str, Any], dict[Path, Any], dict[Path, list[list[Any]]], list[Argument]]


class _Specialised:
    """Collects what arguments are compiled as, by their paths: (i,) of a parameter, (i, j) of a member of its tuple."""

    def __init__(self) -> None:
        self.constants: dict[Path, Any] = {}
        self.attrs: dict[Path, list[list[Any]]] = {}
        self.passed: list[Argument] = []

    def add(self, path: Path, value: Any, param: Any) -> Any:
        """The type of `value` in the signature, of a tuple the tuple of its members' types."""
        if isinstance(value, tuple):
            types = [self.add((*path, j), member, param) for j, member in enumerate(value)]
            return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
        # Triton specialises what is in tuples whatever is said of the parameter.
        free = len(path) == 1 and param.do_not_specialize
        if value is None or (type(value) is int and value == 1 and not free):
            self.constants[path] = value
            return "constexpr"
        found, divisible = _type_of(value)
        if len(path) == 1 and param.annotation_type and not isinstance(value, torch.Tensor):
            found = param.annotation_type
        if divisible and not free and not (len(path) == 1 and param.do_not_specialize_on_alignment):
            self.attrs[path] = [["tt.divisibility", 16]]
        self.passed.append(value)
        return found


def specialise(fn: Any, args: Sequence[Any], constexprs: Mapping[str, Any]) -> Signature:
    """What Triton's launcher would compile `fn` for: signature, constants, attributes, and the arguments it passes.

    args follow the order of the function's non-constexpr parameters; of tuples, every member is passed on its own. As
    in Triton, None and the int 1 become constants, and pointers or ints that are multiples of 16 are specialised as
    such.
    """
    given = dict(constexprs)
    signature: dict[str, Any] = {}
    found = _Specialised()
    rest = iter(args)
    for i, param in enumerate(fn.params):
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            found.constants[(i,)] = given.pop(param.name, param.default)
        else:
            value = given.pop(param.name) if param.name in given else next(rest, None)
            signature[param.name] = found.add((i,), value, param)
    if given:
        raise ValueError(f"constexprs: {fn.__name__} has no parameter {sorted(given)}")
    if next(rest, None) is not None:
        raise ValueError(f"args: more arguments than {fn.__name__} has parameters")
    return signature, found.constants, found.attrs, found.passed


def launch_options(num_warps: int, num_stages: int, registers: int | None = None) -> dict[str, Any]:
    """The compiler's options that posattn.backends.triton.launch.launch gives."""
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return options if registers is None else {**options, "maxnreg": registers}


def _ptx_alone(backend: Any = None, stages: dict[str, Any] | None = None, *given: Any) -> tuple[str, str]:
    """Triton's hook into the stages of a compilation: the last, ptxas, takes a quarter of its time and makes machine
    code, which the machine does not run. Returned is what distinguishes the result in Triton's cache."""
    if stages is not None:
        stages["cubin"] = lambda ptx, metadata: b""
    return "PTX alone", "PTX alone"


def compile_triton(
    fn: Any,
    args: Sequence[Any],
    *,
    arch: int = 80,
    num_warps: int = 4,
    num_stages: int = 3,
    registers: int | None = None,
    constexprs: Mapping[str, Any] | None = None,
) -> tuple[Compiled, list[Argument]]:
    """Compiles `fn` for these arguments, once in a process; returns it with the arguments that are passed."""
    signature, constants, attrs, passed = specialise(fn, args, constexprs or {})
    key = (fn, repr(signature), repr(constants), repr(attrs), arch, num_warps, num_stages, registers)
    if key not in _cache:
        source = ASTSource(fn, signature, constexprs=constants, attrs=attrs)
        options = launch_options(num_warps, num_stages, registers)
        with mock.patch.object(triton.knobs.runtime, "add_stages_inspection_hook", _ptx_alone):
            built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        ptx = built.asm["ptx"]
        _cache[key] = Compiled(Kernel(ptx), built, ptx)
    return _cache[key], passed


def run_triton(
    fn: Any,
    grid: Sequence[int],
    args: Sequence[Any],
    arch: int = 80,
    num_warps: int = 4,
    num_stages: int = 3,
    constexprs: Mapping[str, Any] | None = None,
    options: Options | None = None,
) -> Report:
    """Compiles (once) and runs `fn` over `grid`; outputs are written into the tensors of `args`."""
    compiled, passed = compile_triton(
        fn, args, arch=arch, num_warps=num_warps, num_stages=num_stages, constexprs=constexprs
    )
    return compiled.launch(grid, passed, options)
