"""What kernels are compiled with: for each family a named tuple of constants, made of those that families share.

A field is the C++ constant of its name in upper case. A family has all constants that its sources and the headers they
include use, and no other: a test asks the compiler.

Named tuples, for every launch asks for its kernel by these: to make and hash a family of 46 takes as long as it does
for a dict, and three times as long for frozen dataclasses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

Constant = bool | int


def definitions(constants: tuple[Any, ...]) -> Iterator[tuple[str, Constant]]:
    """The C++ constants of a family, by name."""
    for name, value in zip(constants._fields, constants):  # type: ignore[attr-defined] # a NamedTuple, as are its parts
        if isinstance(value, tuple):
            yield from definitions(value)
        else:
            yield name.upper(), value


class ElementConstants(NamedTuple):
    """The element type, and the head dimensions in chunks of 8."""

    bf16: bool
    dim: int
    dim_v: int


class SequenceConstants(NamedTuple):
    """Of common/mask.h: where sequences begin and end, and which keys a query sees by its place."""

    has_left: bool
    has_right: bool
    has_offset: bool
    has_offsets: bool
    has_k_lengths: bool
    has_k_starts: bool
    packed: bool


class MaskConstants(NamedTuple):
    sequence: SequenceConstants
    has_boolean: bool


class OperandConstants(NamedTuple):
    """Which operands one bias of the plan has."""

    has_slope: bool
    signed: bool
    has_table: bool
    has_profile: bool
    knots: int
    dense: int  # enum DenseType of bias/dense.h


class BiasConstants(NamedTuple):
    """The same, and how they are computed on tiles (bias/bias.h, bias/profile.h)."""

    operands: OperandConstants
    linear: bool  # no visible distance is negative, or the slope keeps its sign
    bounds_block: int


class PairConstants(NamedTuple):
    """Which dimensions a rotary embedding takes for a pair."""

    interleaved: bool
    half: int  # how many pairs


class RotaryConstants(NamedTuple):
    """Of common/rotary.cu."""

    bf16: bool
    dim: int
    pairs: PairConstants
    back: bool
    threads: int
    page: int  # tokens a page, 0 where x lies in one piece


class CombineConstants(NamedTuple):
    """Of forward/combine.cu."""

    bf16: bool
    dim_v: int
    has_sinks: bool
    max_splits: int
    threads: int


class ForwardConstants(NamedTuple):
    """Of every kernel of a forward pass."""

    element: ElementConstants
    head_dim: int  # as the kernels pad it
    head_dim_v: int
    mask: MaskConstants
    explicit: bool
    operands: OperandConstants
    has_dropout: bool
    rotary_q: bool
    rotary_k: bool
    pairs: PairConstants
    has_softcap: bool
    has_sinks: bool
    split: bool
    block_m: int
    block_n: int
    warps: int
    threads: int
    stages: int
    shared_bytes: int
    k_page: int  # tokens a page of keys, 0 where they lie side by side
    v_page: int
    reach_rows: int  # queries that share what is in reach, 0 where all is


class ReachConstants(NamedTuple):
    """Of reach/find.cu."""

    bf16: bool
    dim: int
    sequence: SequenceConstants
    has_slope: bool
    signed: bool
    has_table: bool
    has_softcap: bool
    block_m: int
    block_n: int
    page: int
    threads: int


class TurnConstants(NamedTuple):
    """Of reach/turn.cu."""

    sequence: SequenceConstants
    block_m: int
    block_n: int
    threads: int


class DecodeConstants(NamedTuple):
    """Of forward/decode.cu."""

    forward: ForwardConstants
    scale_before_bias: bool  # logits are formed before the softmax; else the scale is folded into its exponent


class PrefillConstants(NamedTuple):
    """Of forward/forward.cu and forward/forward_sm90.cu."""

    forward: ForwardConstants
    linear: bool  # as in BiasConstants
    bounds_block: int
    blocks_per_sm: int
    q_in_registers: bool


class WarpConstants(NamedTuple):
    """Of backward/warps.h: the tile, and how a block's warps lie over its products."""

    padded: int  # what both head dimensions are padded to
    block_m: int
    block_n: int
    warps: int
    logit_columns: int
    key_columns: int
    query_columns: int
    query_parts: int
    sm90: bool


class RowsConstants(NamedTuple):
    """Of backward/rows.cu."""

    element: ElementConstants
    sequence: SequenceConstants
    explicit: bool
    has_profile: bool
    rotary: bool
    pairs: PairConstants
    warps: WarpConstants


class TilesConstants(NamedTuple):
    """Of backward/sm90/tiles.cu."""

    element: ElementConstants
    sequence: SequenceConstants
    padded: int
    block_m: int
    block_n: int
    warps: int


class WantConstants(NamedTuple):
    """Which operands' gradients the backward kernel sums."""

    want_slope: bool
    want_table: bool
    want_psi: bool
    want_lines: bool
    want_dense: int  # 0, EACH_ONCE or SHARED


EACH_ONCE, SHARED = 1, 2  # elements of the dense gradient are stored, or added up


class BackwardSm90Constants(NamedTuple):
    """Of backward/sm90/backward.cu, and of every backward kernel."""

    element: ElementConstants
    mask: MaskConstants
    explicit: bool
    bias: BiasConstants
    has_dropout: bool
    has_softcap: bool
    rotary: bool
    pairs: PairConstants
    want: WantConstants
    ordered: bool
    warps: WarpConstants
    strip_rows: int
    blocks_per_sm: int
    shared_bytes: int
    reach: bool  # whether there are queries that blocks of keys do not walk, and a list of those that they do


class BackwardConstants(NamedTuple):
    """Of backward/backward.cu."""

    backward: BackwardSm90Constants
    grad_stages: int


class OuterBiasConstants(NamedTuple):
    """Of the bias that HeadMix adds to the MLP's output."""

    outer_slope: bool
    outer_signed: bool
    outer_table: bool
    outer_profile: bool
    outer_dense: int


class HeadMixConstants(NamedTuple):
    """Of every kernel that mixes heads; `bias` is the inner one."""

    bf16: bool
    head_dim: int
    head_dim_v: int
    mask: MaskConstants
    explicit: bool
    bias: BiasConstants
    outer: OuterBiasConstants
    has_dropout: bool
    has_softcap: bool
    heads: int
    heads_per_warp: int
    width: int
    has_inner: bool
    concat: bool
    residual: bool
    fold_slope: bool
    block_m: int
    block_n: int
    warps: int
    mlp_warps: int
    threads: int
    shared_bytes: int


class HeadMixForwardConstants(NamedTuple):
    """Of headmix/forward.cu."""

    headmix: HeadMixConstants
    has_sinks: bool
    blocks_per_sm: int


class HeadMixBackwardConstants(NamedTuple):
    """Of headmix/backward.cu."""

    headmix: HeadMixConstants
    ordered: bool
    vector_adds: bool
    want_inner: bool
