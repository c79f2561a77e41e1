"""The parameter structs of csrc/cuda/params.h; every compiled source asserts their size (see compiler.py)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.resources import files

from posattn.backends.common.structs import Arguments, Header, Values

__all__ = ["Arguments", "Values", "names", "pack", "size"]


@cache
def _header() -> Header:
    return Header("params.h", (files("posattn.cuda_source") / "params.h").read_text())


def size(name: str) -> int:
    """sizeof(struct)."""
    return _header().size(name)


def names(name: str) -> Iterable[str]:
    """The members of a struct."""
    return _header().names(name)


def pack(name: str, values: Values) -> Arguments:
    """`values` by member name as the bytes of struct `name`; see `Header.pack`."""
    return _header().pack(name, values)
