"""Checks of constructor arguments, each naming the argument, what was expected and what came."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from typing import Any

import torch

from posattn.errors import ArgumentTypeError, described


def check_positive_int(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected a positive int, got {value}")
    return value


def check_positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name}: expected a positive finite number, got {value}")
    return float(value)


def check_factor(value: float) -> float:
    """How many times longer a scaled RoPE is to reach. Less than 1 shrinks instead: computed, as Hugging Face does with
    a warning, since it is nearly always 1 / factor that was meant."""
    if check_positive("factor", value) < 1.0:
        warnings.warn(
            f"factor: expected at least 1, the new length over the original one, got {value}; did you mean "
            f"{1.0 / value:g}?",
            stacklevel=4,  # past __post_init__ and the dataclass's __init__
        )
    return value


def check_positive_float32(name: str, value: float) -> float:
    """A positive number that is neither 0 nor infinite in float32, the type of operands."""
    check_positive(name, value)
    info = torch.finfo(torch.float32)
    if not info.smallest_normal <= value <= info.max:
        raise ValueError(
            f"{name}: expected a positive finite number within float32's range, {info.smallest_normal:.3g} to "
            f"{info.max:.3g}, got {value}"
        )
    return float(value)


def check_float32(name: str, value: float) -> float:
    """A number that float32 can hold, for operands are float32."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    limit = torch.finfo(torch.float32).max
    if not abs(value) <= limit:
        raise ValueError(f"{name}: expected a finite number within float32's range of +/-{limit:.3g}, got {value}")
    return float(value)


def check_flag(name: str, value: object) -> bool:
    if not isinstance(value, (bool, torch.SymBool)):
        raise ArgumentTypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def check_sequence(name: str, value: Iterable[Any], expected: str) -> tuple[Any, ...]:
    """Its items, which the caller checks; `expected` says what they are to be."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected {expected}, got {described(value)}")
    return tuple(value)


def check_choice(name: str, value: str, choices: Collection[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return value
