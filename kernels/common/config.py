"""What the kernels are compiled for, beside tile shapes: frozen values, each handed on as one argument."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BiasConfig:
    """An additive bias: signed slopes, lookups that may fall outside, and the padded number of a profile's knots."""

    signed: bool
    clamp: bool
    knots: int


@dataclass(frozen=True)
class SidesConfig:
    """On which sides a mask bounds the keys of a query."""

    has_left: bool
    has_right: bool


@dataclass(frozen=True)
class AttentionConfig:
    """A call of plain attention: dim and value_dim with their padded sizes; its bias; whether the slope is linear along
    the keys, and whether the logits are multiplied by the scale before anything is added to them (the host's
    arguments.py says when); explicit positions; the mask; entries that one of a profile's bounds covers; the precision
    of products."""

    dim: int
    block_dim: int
    value_dim: int
    block_value_dim: int
    bias: BiasConfig
    linear: bool
    scale_before_bias: bool
    explicit: bool
    has_left: bool
    has_right: bool
    bounds_block: int
    precision: str


@dataclass(frozen=True)
class BackwardConfig:
    """How attention_backward goes about it: whether invariants may leave its loop (hoist), and addresses are hidden
    from the compiler (hide); whether every warp has 16 keys of its own or more (whole); whether lse2 has each row's
    share of a linear bias (shares); whether warps share both axes of every product's result (spread); and how many
    warps hold different keys (parts)."""

    hoist: bool
    hide: bool
    whole: bool
    shares: bool
    spread: bool
    parts: int


@dataclass(frozen=True)
class HeadMixConfig:
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
    inner: BiasConfig
    outer: BiasConfig
    bounds_block: int
    precision: str
