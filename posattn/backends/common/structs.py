"""Structs of a C++ header, packed from Python: what the native code of a backend takes for one call.

The header is the one description. Its structs are read here and laid out by ctypes as the C++ compiler does; each
backend has the size checked by its compiler, so the two sides cannot disagree.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# By name in C++: the type for ctypes, and the letter for struct.
_SCALARS: Mapping[str, tuple[type, str]] = {
    "bool": (ctypes.c_bool, "?"),
    "int32_t": (ctypes.c_int32, "i"),
    "uint32_t": (ctypes.c_uint32, "I"),
    "int64_t": (ctypes.c_int64, "q"),
    "uint64_t": (ctypes.c_uint64, "Q"),
    "float": (ctypes.c_float, "f"),
    "double": (ctypes.c_double, "d"),
}
_ENUM = re.compile(r"enum class (\w+) : (\w+) \{(.*?)\};", re.DOTALL)
_ENUMERATOR = re.compile(r"\s*(\w+) = (\d+),?")
_STRUCT = re.compile(r"struct (\w+) \{(.*?)\n\};", re.DOTALL)
_MEMBER = re.compile(r"(const )?(\w+)(\*?) (\w+)(?: = [^;]+)?;")
_METHOD = re.compile(r".*\) const \{.*\}")

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
    """Where a member lies and how it is written: a scalar or a pointer by `write`, a struct by its `members`."""

    offset: int
    write: Callable[..., None]
    const: bool
    members: Mapping[str, _Member] | None


@dataclass(frozen=True)
class _Layout:
    size: int
    members: Mapping[str, _Member]


class Header:
    """The structs and enumerations of a header that holds nothing else: a member or a member function a line.

    `structs` has the structs by name as classes of ctypes, in which a pointer is an address; `enums` the values of the
    enumerations.
    """

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        text = re.sub(r"//[^\n]*", "", text)
        self.enums: dict[str, dict[str, int]] = {}
        scalars = dict(_SCALARS)
        for enum, kind, body in _ENUM.findall(text):
            self.enums[enum] = {key: int(value) for key, value in _ENUMERATOR.findall(body)}
            scalars[enum] = _SCALARS[kind]
        self.structs: dict[str, Any] = {}
        self._layouts: dict[str, _Layout] = {}
        for struct_name, body in _STRUCT.findall(text):
            lines = [line for line in map(str.strip, body.split("\n")) if line and not _METHOD.fullmatch(line)]
            self._lay_out(struct_name, lines, scalars)

    def size(self, name: str) -> int:
        """sizeof(struct)."""
        return self._layout(name).size

    def names(self, name: str) -> Iterable[str]:
        """The members of a struct."""
        return self._layout(name).members

    def pack(self, name: str, values: Values) -> Arguments:
        """`values` by member name as the bytes of struct `name`.

        A tensor gives its address and None a null pointer; a mapping fills a member struct. Members that are not named
        stay zero.
        """
        read: dict[int, Tensor] = {}
        written: dict[int, Tensor] = {}
        layout = self._layout(name)
        image = bytearray(layout.size)
        try:
            _fill(image, 0, layout.members, values, read, written)
        except KeyError as error:
            raise ValueError(f"values: struct {name} has no member {error}") from None
        except struct.error as error:  # a number that its member cannot hold
            raise ValueError(f"values: struct {name}: {error}") from None
        unwritten = [tensor for key, tensor in read.items() if key not in written]
        return Arguments(bytes(image), [*written.values(), *unwritten], unwritten)

    def _layout(self, name: str) -> _Layout:
        if name not in self._layouts:
            raise ValueError(f"struct: expected one of {sorted(self._layouts)}, got {name!r}")
        return self._layouts[name]

    def _lay_out(self, name: str, lines: Sequence[str], scalars: Mapping[str, tuple[type, str]]) -> None:
        found = [self._parsed(name, line) for line in lines]
        fields: list[tuple[str, Any]] = []
        for _, kind, star, member in found:
            scalar = "uint64_t" if star else kind
            if scalar not in scalars and kind not in self.structs:
                raise ValueError(f"{self.name}: struct {name} has a member of unknown type {kind}")
            fields.append((member, scalars[scalar][0] if scalar in scalars else self.structs[kind]))
        # With no place for other attributes, a misspelt member is an error.
        made = self.structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields, "__slots__": ()})
        members = {}
        for const, kind, star, member in found:
            nested = self._layouts[kind].members if not star and kind in self._layouts else None
            letter = "x" if nested else scalars["uint64_t" if star else kind][1]
            offset: int = getattr(made, member).offset
            members[member] = _Member(offset, struct.Struct("=" + letter).pack_into, bool(const), nested)
        self._layouts[name] = _Layout(ctypes.sizeof(made), members)

    def _parsed(self, name: str, line: str) -> tuple[str, str, str, str]:
        """const, type, star and name of one member; const and star may be empty."""
        found = _MEMBER.fullmatch(line)
        if found is None:
            raise ValueError(f"{self.name}: expected one member a line in struct {name}, got {line!r}")
        const, kind, star, member = (part or "" for part in found.groups())
        return const, kind, star, member


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
        else:
            member.write(image, base + member.offset, value)
