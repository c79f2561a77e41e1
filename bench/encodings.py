"""The encodings to time, found in posattn.encodings and built from the names of their constructors' parameters."""

from __future__ import annotations

import inspect

import posattn
from posattn.encodings import __all__ as exported
from posattn.encodings.base import Encoding

# What a constructor may ask for, beside the sizes of the call. Learnable where there is a choice: the gradients of an
# encoding's parameters belong to the work that is timed.
FIXED = {"max_distance": 128, "learnable": True}


def names() -> tuple[str, ...]:
    """ "none", and every exported encoding that `build` can make."""
    return ("none", *(name for name in exported if _arguments(name, 1, 1) is not None))


def build(name: str, heads: int, head_dim: int) -> Encoding | None:
    """The encoding of that name for q [B, heads, T, head_dim], or None for "none". DAPE's inner bias is Kerple."""
    if name == "none":
        return None
    arguments = _arguments(name, heads, head_dim)
    if arguments is None:
        raise ValueError(f"encoding: expected one of {', '.join(names())}, got {name!r}")
    encoding = getattr(posattn, name)(**arguments)
    assert isinstance(encoding, Encoding)
    return encoding


def _arguments(name: str, heads: int, head_dim: int) -> dict[str, object] | None:
    """Arguments for the constructor, or None if it asks for something that only a caller can know."""
    kind = getattr(posattn, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, Encoding)):
        return None
    known: dict[str, object] = {"num_heads": heads, "head_dim": head_dim, **FIXED}
    if name == "DAPE":
        known["inner"] = posattn.Kerple(heads)
    parameters = inspect.signature(kind).parameters
    arguments = {key: known[key] for key in parameters if key in known}
    required = {key for key, parameter in parameters.items() if parameter.default is parameter.empty}
    return arguments if required <= arguments.keys() else None
