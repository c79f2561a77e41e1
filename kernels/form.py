"""What the kernels are compiled for, beside tile shapes: frozen values, each handed on as one argument."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BiasForm:
    """An additive bias: signed slopes, lookups that may fall outside, and the padded number of a profile's knots."""

    signed: bool
    clamp: bool
    knots: int


@dataclass(frozen=True)
class Form:
    """A call of the plain family: its bias; whether the slope is linear along the keys, and whether the logits are in
    natural units when anything is added to them (operands.py says when either holds); explicit positions; the mask;
    entries that one of a profile's bounds covers; the precision of products."""

    bias: BiasForm
    linear: bool
    natural: bool
    explicit: bool
    has_left: bool
    has_right: bool
    top_left: bool
    bounds_block: int
    precision: str
