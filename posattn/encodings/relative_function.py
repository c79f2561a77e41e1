"""Relative: b[h](d) = fn(d)[h], any differentiable function of the distance."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from itertools import chain
from types import CodeType, FunctionType, MethodType

import torch
from torch import Tensor, nn

from posattn.encodings._checks import check_positive_int
from posattn.encodings._initial import copied, remembered, restore
from posattn.encodings.base import Context, Encoding
from posattn.errors import ArgumentTypeError, ArgumentValueError
from posattn.plan import Bias, Plan, Table


class Relative(Encoding):
    """A bias that is a function of the distance d = i - j, in O(N) memory.

        gaussian = relative(lambda d, width: -((d / width[:, None]) ** 2), 12, width=torch.full((12,), 64.0))
        network = relative(lambda d, net: net(d[:, None]).T, 12, net=nn.Sequential(nn.Linear(1, 9), nn.Linear(9, 12)))
        out = attention(q, k, v, gaussian, causal=True)

    What the function learns are its arguments, given by name: they are `fn.<name>` of this encoding, and train, save,
    move and copy with it. A function that reaches for a parameter by itself (in a closure, a global, a bound method) is
    refused: a copy of the encoding would go on using the parameter of the first.

    Args:
        fn: a function or an nn.Module that turns distances [L] into [H, L], or [1, L] for all heads alike. Distances
            are whole numbers ascending by one, float32, or float64 where q or something learned is; d.long() indexes.
            Those below 0, of keys after their query, are among them in causal calls too, and their number must be
            finite (d.abs(), d.clamp(min=0)) or -inf. Where they begin and how many they are is up to the call, so the
            number of a distance must not depend on the others.
        num_heads: number of query heads H.
        parameters: by name, what fn takes beside the distances: a tensor, of which a copy is learned; an nn.Parameter,
            shared with whoever else has it; or an nn.Module. Their narrower types are widened for the call.
    """

    fn: nn.Module

    def __init__(self, fn: Callable[..., Tensor], num_heads: int, **parameters: Tensor | nn.Module) -> None:
        super().__init__()
        self.num_heads = check_positive_int("num_heads", num_heads)
        if isinstance(fn, type) or not callable(fn):
            got = f"the class {fn.__name__}; make an instance of it" if isinstance(fn, type) else type(fn).__name__
            raise ArgumentTypeError(f"fn: expected a function of the distances or an nn.Module, got {got}")
        self.fn = fn if isinstance(fn, nn.Module) and not parameters else _Function(fn, parameters)

    def build(self, context: Context) -> Plan:
        dtype = context.table_dtype(*self.parameters())
        given = chain(self.fn.named_parameters(), self.fn.named_buffers())
        wide = {name: x.to(dtype) for name, x in given if x.is_floating_point() and x.dtype.itemsize < dtype.itemsize}
        distances = context.distances().to(dtype)
        values = torch.func.functional_call(self.fn, wide, (distances,)) if wide else self.fn(distances)
        self._check(values, distances)
        return Plan(bias=Bias(table=Table(values.to(dtype), context.distance_range[0])))

    def _check(self, values: object, distances: Tensor) -> None:
        """Messages are written where they are raised: to format a traced length would tie the graph to it."""
        count = distances.shape[0]
        if isinstance(values, Tensor) and values.is_floating_point() and self._fits(values, count):
            return
        expected = f"fn: expected [{self.num_heads}, {count}] (heads, distances) or [1, {count}] from it"
        if not isinstance(values, Tensor):
            raise ArgumentTypeError(f"{expected}, got {type(values).__name__}")
        if not values.is_floating_point():
            raise ArgumentTypeError(f"{expected}, of a floating dtype, got {values.dtype}")
        hint = ""
        if values.dim() == 2 and values.shape[0] == count:
            hint = "; transpose it"
        elif values.dim() == 1:
            hint = "; a parameter of the heads is [:, None] there, or the result [None] for all heads alike"
        raise ArgumentValueError(f"{expected}, got {list(values.shape)}{hint}")

    def _fits(self, values: Tensor, count: int) -> bool:
        return values.dim() == 2 and values.shape[1] == count and values.shape[0] in (1, self.num_heads)

    @classmethod
    def examples(cls, num_heads: int, head_dim: int, tokens: int) -> dict[str, Encoding]:
        # On the CPU, so that reset_parameters knows it though the model is made on meta.
        width = torch.linspace(4.0, 16.0, num_heads, device="cpu")
        return {"Relative": cls(_gaussian, num_heads, width=width)}

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


def relative(fn: Callable[..., Tensor], num_heads: int, **parameters: Tensor | nn.Module) -> Relative:
    """The encoding `b[h](d) = fn(d, **parameters)[h]` of num_heads heads, for any differentiable fn: see `Relative`."""
    return Relative(fn, num_heads, **parameters)


class _Function(nn.Module):
    """A function with what it learns."""

    def __init__(self, function: Callable[..., Tensor], parameters: dict[str, Tensor | nn.Module]) -> None:
        super().__init__()
        for where, value in _outside(function):
            raise ArgumentTypeError(
                f"fn: expected to learn nothing but what it is given by name, got one that uses {where} of type "
                f"{type(value).__name__}, which a copy of the encoding would not copy; make it an argument: "
                "relative(fn, num_heads, name=...)"
            )
        self._names = tuple(parameters)
        self._initial: dict[str, Tensor | None] = {}
        for name, value in parameters.items():
            self._add(name, value)
        self.function = function

    def _add(self, name: str, value: object) -> None:
        if hasattr(self, name) or name == "function":
            raise ArgumentValueError(f"{name}: expected a name that nn.Module leaves free, got {name!r}")
        if isinstance(value, nn.Module):
            self.add_module(name, value)
            return
        if not isinstance(value, Tensor):
            raise ArgumentTypeError(f"{name}: expected a tensor or an nn.Module, got {type(value).__name__}")
        if not value.is_floating_point():
            raise ArgumentTypeError(f"{name}: expected a floating dtype, got {value.dtype}")
        if value.requires_grad and not isinstance(value, nn.Parameter):
            raise ArgumentTypeError(
                f"{name}: expected an nn.Parameter, or a tensor to copy, got one that requires grad, which its copy "
                "would not give it"
            )
        self._initial[name] = remembered(value)
        self.register_parameter(name, value if isinstance(value, nn.Parameter) else nn.Parameter(copied(value)))

    def reset_parameters(self) -> None:
        """The numbers that the tensors were given with. ValueError if they were made on the meta device."""
        for name, initial in self._initial.items():
            restore(name, self.get_parameter(name), initial)

    def forward(self, distances: Tensor) -> Tensor:
        return self.function(distances, **{name: getattr(self, name) for name in self._names})

    def extra_repr(self) -> str:
        return getattr(self.function, "__qualname__", type(self.function).__name__)


def _outside(function: object) -> Iterator[tuple[str, object]]:
    """Where a function uses what learns and is none of its arguments, and that."""
    found: dict[str, object] = {}
    if isinstance(function, functools.partial):
        found.update({f"a partial's `{name}`": value for name, value in function.keywords.items()})
        found.update({f"a partial's argument {place}": value for place, value in enumerate(function.args)})
        yield from _outside(function.func)
    elif isinstance(function, MethodType):
        found["`self`"] = function.__self__
        yield from _outside(function.__func__)
    elif isinstance(function, FunctionType):
        found.update({f"`{name}`": value for name, value in _names(function)})
    for where, value in found.items():
        learns = isinstance(value, nn.Module) and any(True for _ in value.parameters())
        if learns or (isinstance(value, Tensor) and value.requires_grad and value.is_leaf):
            yield where, value


def _names(function: FunctionType) -> Iterator[tuple[str, object]]:
    """What a function knows by name from outside: its closure, the globals that it mentions, and defaults."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        with contextlib.suppress(ValueError):  # a cell that nothing was put in yet
            yield name, cell.cell_contents
    codes = [function.__code__]
    for code in codes:  # which grows by the functions and comprehensions inside
        codes.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
        yield from ((name, function.__globals__[name]) for name in code.co_names if name in function.__globals__)
    signature = inspect.signature(function).parameters
    yield from ((name, argument.default) for name, argument in signature.items())


def _gaussian(distances: Tensor, width: Tensor) -> Tensor:
    return -((distances / width[:, None]) ** 2)
