"""The parameter structs of csrc/cuda/params.h, packed from Python.

The header is the one description: its structs are read here and laid out by ctypes as the C++ compiler does, and every
compiled source asserts the size (see compiler.py), so the two sides cannot disagree.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from torch import Tensor

# By name in C++: the type for ctypes, and the letter for struct.
_SCALARS: Mapping[str, tuple[type, str]] = {
    "int32_t": (ctypes.c_int32, "i"),
    "uint32_t": (ctypes.c_uint32, "I"),
    "int64_t": (ctypes.c_int64, "q"),
    "uint64_t": (ctypes.c_uint64, "Q"),
    "float": (ctypes.c_float, "f"),
}
_STRUCT = re.compile(r"struct (\w+) \{(.*?)\n\};", re.DOTALL)
_MEMBER = re.compile(r"(const )?(\w+)(\*?) (\w+)(?:\[(\d+)\])?;")

Values = Mapping[str, Any]


class Arguments(bytes):
    """A packed struct and the tensors that its pointers point to; those in `read_only` are never written."""

    tensors: tuple[Tensor, ...]
    read_only: tuple[Tensor, ...]

    def __new__(cls, image: bytes, tensors: Sequence[Tensor] = (), read_only: Sequence[Tensor] = ()) -> Arguments:
        made = super().__new__(cls, image)
        made.tensors, made.read_only = tuple(tensors), tuple(read_only)
        return made


@dataclass(frozen=True)
class _Member:
    """Where a member lies and how it is written: a scalar, an array or a pointer by `write`, a struct by `members`."""

    offset: int
    write: Callable[..., None]
    const: bool
    array: bool
    members: Mapping[str, _Member] | None


@dataclass(frozen=True)
class _Layout:
    size: int
    members: Mapping[str, _Member]


@cache
def _layouts() -> dict[str, _Layout]:
    """Every struct of the header, laid out by ctypes as the C++ compiler does."""
    text = re.sub(r"//[^\n]*", "", (files("posattn.cuda_source") / "params.h").read_text())
    structs: dict[str, type[ctypes.Structure]] = {}
    layouts: dict[str, _Layout] = {}
    for name, body in _STRUCT.findall(text):
        found = [_parsed(name, line) for line in filter(None, map(str.strip, body.split("\n")))]
        fields: list[tuple[str, Any]] = []
        for _, kind, star, member, count in found:
            scalar = "uint64_t" if star else kind
            if scalar not in _SCALARS and kind not in structs:
                raise ValueError(f"params.h: struct {name} has a member of unknown type {kind}")
            one: Any = _SCALARS[scalar][0] if scalar in _SCALARS else structs[kind]
            fields.append((member, one * int(count) if count else one))
        structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
        members = {}
        for const, kind, star, member, count in found:
            nested = None if star or kind in _SCALARS else layouts[kind].members
            letter = "x" if nested else _SCALARS["uint64_t" if star else kind][1]
            write = struct.Struct(f"={count or 1}{letter}").pack_into
            members[member] = _Member(getattr(structs[name], member).offset, write, bool(const), bool(count), nested)
        layouts[name] = _Layout(ctypes.sizeof(structs[name]), members)
    return layouts


def _parsed(name: str, line: str) -> tuple[str, str, str, str, str]:
    """const, type, star, name and count of one member; each may be empty but for type and name."""
    found = _MEMBER.fullmatch(line)
    if found is None:
        raise ValueError(f"params.h: expected one member a line in struct {name}, got {line!r}")
    const, kind, star, member, count = (part or "" for part in found.groups())
    return const, kind, star, member, count


def _layout(name: str) -> _Layout:
    layouts = _layouts()
    if name not in layouts:
        raise ValueError(f"struct: expected one of {sorted(layouts)}, got {name!r}")
    return layouts[name]


def size(name: str) -> int:
    """sizeof(struct)."""
    return _layout(name).size


def names(name: str) -> Iterable[str]:
    """The members of a struct."""
    return _layout(name).members


def pack(name: str, values: Values) -> Arguments:
    """`values` by member name as the bytes of struct `name`.

    A tensor gives its address and None a null pointer; a mapping fills a member struct, a sequence an array. Members
    that are not named stay zero.
    """
    read: dict[int, Tensor] = {}
    written: dict[int, Tensor] = {}
    layout = _layout(name)
    image = bytearray(layout.size)
    try:
        _fill(image, 0, layout.members, values, read, written)
    except KeyError as error:
        raise ValueError(f"values: struct {name} has no member {error}") from None
    except struct.error as error:  # a number that its member cannot hold
        raise ValueError(f"values: struct {name}: {error}") from None
    unwritten = [tensor for key, tensor in read.items() if key not in written]
    return Arguments(bytes(image), [*written.values(), *unwritten], unwritten)


def _fill(
    image: bytearray,
    base: int,
    members: Mapping[str, _Member],
    values: Values,
    read: dict[int, Tensor],
    written: dict[int, Tensor],
) -> None:
    # Every launch comes through here, with about a hundred members: this is most of its time on the host.
    for name, value in values.items():
        member = members[name]
        if value is None:
            continue
        if member.members is not None:
            _fill(image, base + member.offset, member.members, value, read, written)
        elif isinstance(value, Tensor):
            (read if member.const else written)[id(value)] = value
            member.write(image, base + member.offset, value.data_ptr())
        elif member.array:
            member.write(image, base + member.offset, *value)
        else:
            member.write(image, base + member.offset, value)
