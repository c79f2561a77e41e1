"""Kernel arguments that belong together, as named tuples in the names of csrc/cuda/params.h.

Triton takes a tuple as an argument and compiles a member that is None away. Upper-case members are pointers that a
kernel writes; absent ones are None. Strides count elements.
"""

from typing import Any, NamedTuple


class Strides(NamedTuple):
    """Of a [B, H, T, D] tensor."""

    batch: Any
    head: Any
    token: Any


class PairStrides(NamedTuple):
    """Of a [B, H, Tq, Tk] tensor; 0 for a dimension of size 1 that serves every index."""

    batch: Any
    head: Any
    query: Any
    key: Any


class Inputs(NamedTuple):
    q: Any
    k: Any
    v: Any
    q_strides: Strides
    k_strides: Strides
    v_strides: Strides


class OutputGradient(NamedTuple):
    """The gradient of the output, and of each row the log-sum-exp in base 2 and delta (bwd_preprocess.py)."""

    grad_out: Any
    lse2: Any
    delta: Any
    strides: Strides


class Output(NamedTuple):
    """Out [B, H, Tq, DV] and Lse [B, H, Tq], or those of each split of the keys, `out_split` and `lse_split` apart."""

    Out: Any
    Lse: Any
    strides: Strides
    out_split: Any
    lse_split: Any


class Shape(NamedTuple):
    """Query heads, query heads that share a key head, and the lengths of the tensors' token axes."""

    heads: Any
    group: Any
    q_tokens: Any
    k_tokens: Any


class Positions(NamedTuple):
    """Explicit positions [B or 1, T] of queries and keys, and the strides of their batches."""

    q: Any
    k: Any
    q_batch: Any
    k_batch: Any


class Mask(NamedTuple):
    """What hides keys: bounds of sequences and of packed documents, the window around i + offset, and booleans. An
    offset is given by sequence, for all, or by neither: then the last query meets the last key. `reach` has what each
    block of the kernel's own cannot do without (attention/reach.py), or is None."""

    k_lengths: Any
    k_starts: Any
    cu_q: Any
    cu_k: Any
    offsets: Any
    offset: Any
    left: Any
    right: Any
    boolean: Any
    boolean_strides: PairStrides
    reach: Any


class Operands(NamedTuple):
    """A Bias."""

    slope: Any
    slope_batch: Any
    table: Any
    table_head: Any
    table_first: Any
    table_last: Any
    psi: Any
    psi_first: Any
    psi_last: Any
    psi_bounds: Any
    row_scale: Any
    row_first: Any
    row_last: Any
    row_bounds: Any
    knots: Any
    num_knots: Any
    segment_slope: Any
    segment_intercept: Any
    dense: Any
    dense_strides: PairStrides


class Angles(NamedTuple):
    """Of one side's tokens, [B or 1, T, half] each, and the stride of their batch."""

    cos: Any
    sin: Any
    batch: Any


class Dropout(NamedTuple):
    """A call's dropout; None throughout where there is none.

    Kernels take its members one by one: Triton specialises what is in tuples, and another share (DROPOUT_BITS) must not
    compile another kernel. The seed comes as a pointer, so that each replay of a captured graph may draw its own, and
    is read once."""

    threshold: Any
    keep_scale: Any
    seed: Any


DROPOUT_BITS = ("threshold",)
