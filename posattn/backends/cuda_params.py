"""The parameter structs of csrc/cuda/params.h, packed from Python.

The header is the one description: its structs are read here and laid out by ctypes as the C++ compiler does, and every
compiled source asserts the size (see cuda_compile), so the two sides cannot disagree.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from torch import Tensor

_SCALARS: Mapping[str, type] = {
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
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


@cache
def _structs() -> tuple[dict[str, type[ctypes.Structure]], frozenset[tuple[str, str]]]:
    """Every struct of the header, and the (struct, member) pairs that are const pointers."""
    text = re.sub(r"//[^\n]*", "", (files("posattn.cuda_source") / "params.h").read_text())
    structs: dict[str, type[ctypes.Structure]] = {}
    constant = set()
    for name, body in _STRUCT.findall(text):
        fields: list[tuple[str, Any]] = []
        for line in filter(None, map(str.strip, body.split("\n"))):
            found = _MEMBER.fullmatch(line)
            if found is None:
                raise ValueError(f"params.h: expected one member a line in struct {name}, got {line!r}")
            const, kind, star, member, count = found.groups()
            if star:
                member_type: Any = ctypes.c_uint64
                if const:
                    constant.add((name, member))
            elif kind in _SCALARS or kind in structs:
                member_type = _SCALARS.get(kind) or structs[kind]
            else:
                raise ValueError(f"params.h: struct {name} has a member of unknown type {kind}")
            fields.append((member, member_type * int(count) if count else member_type))
        structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return structs, frozenset(constant)


def size(struct: str) -> int:
    """sizeof(struct)."""
    return ctypes.sizeof(_structs()[0][struct])


def pack(struct: str, values: Values) -> Arguments:
    """`values` by member name as the bytes of `struct`.

    A tensor gives its address and None a null pointer; a mapping fills a member struct, a sequence an array. Members
    that are not named stay zero.
    """
    read: dict[int, Tensor] = {}
    written: dict[int, Tensor] = {}
    image = _filled(struct, values, read, written)
    return Arguments(
        bytes(image),
        [*written.values(), *(tensor for key, tensor in read.items() if key not in written)],
        [tensor for key, tensor in read.items() if key not in written],
    )


def _filled(struct: str, values: Values, read: dict[int, Tensor], written: dict[int, Tensor]) -> ctypes.Structure:
    structs, constant = _structs()
    if struct not in structs:
        raise ValueError(f"struct: expected one of {sorted(structs)}, got {struct!r}")
    made = structs[struct]()
    types = dict(structs[struct]._fields_)  # type: ignore[arg-type]
    for member, value in values.items():
        if member not in types:
            raise ValueError(f"values: struct {struct} has no member {member!r}")
        if isinstance(value, Tensor):
            (read if (struct, member) in constant else written)[id(value)] = value
            value = value.data_ptr()
        elif isinstance(value, Mapping):
            value = _filled(types[member].__name__, value, read, written)
        elif isinstance(value, Sequence):
            value = types[member](*value)
        elif value is None:
            continue
        setattr(made, member, value)
    return made
