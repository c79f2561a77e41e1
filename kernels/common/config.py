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


@dataclass(frozen=True)
class MixForm:
    """dim and value_dim with their padded sizes; steps from token to token of q, k, v and dO; groups of heads (each
    `group` wide, one head a warp), all heads padded, hidden units padded; of forward, whether the queries stay in
    registers (and take the scale there), in how many parts the positions go through the MLP, and whether each of the
    last group's heads has two warps, one for either half of the keys; whether offsets of heads fit in 32 bits; the
    forms of the mix, the mask and the biases."""

    dim: int
    block_dim: int
    value_dim: int
    block_value_dim: int
    q_step: int
    k_step: int
    v_step: int
    grad_step: int
    group: int
    groups: int
    heads: int
    width: int
    keep_queries: bool
    scaled_queries: bool
    near: bool
    chunks: int
    halves: bool
    concat: bool
    residual: bool
    has_inner: bool
    has_outer: bool
    explicit: bool
    has_left: bool
    has_right: bool
    top_left: bool
    inner: BiasForm
    outer: BiasForm
    bounds_block: int
    precision: str
