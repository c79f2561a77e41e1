"""Plans: the closed set of operands that every backend knows.

An encoding lowers to a `Plan`; a `Call` is a plan together with the tensors and options of one attention call.
Kernels see nothing else, so a new encoding never touches a kernel. Everything here is data: no computation, no checks.

Distances. Query i of a sequence with Tq queries and Tk keys sits at key position i + (Tk - Tq), so the distance
d = q_position - k_position runs over -(Tq - 1) .. Tk - 1 for implicit positions; a mask's `offset` replaces Tk - Tq.
With explicit positions, d = q_positions[i] - k_positions[j]. Operands indexed by a distance (or a position) carry
`first`, the distance (or position) of their entry 0; an index outside the stored range is clamped to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Turn pair c of token t by the angle whose cosine and sine are given, before the dot product.

    q_cos, q_sin, k_cos and k_sin are [B or 1, T, rotary_dim / 2] float32, T the number of queries or of keys, with any
    attention factor already multiplied in; or [B or 1, H or 1, T, rotary_dim / 2], H the heads of q or of k, where
    heads differ. Kernels know the first form without a gradient; q and k are turned in front of them for the others
    (turning.py). The first rotary_dim dimensions turn, the others pass. Pairs are (2c, 2c + 1) if interleaved, else
    (c, c + rotary_dim / 2).
    """

    q_cos: Tensor
    q_sin: Tensor
    k_cos: Tensor
    k_sin: Tensor
    interleaved: bool = False


@dataclass(frozen=True)
class Slope:
    """bias = -slope * |d|, or -slope * d if signed. slope is [H] or [B, H] float32."""

    slope: Tensor
    signed: bool = False


@dataclass(frozen=True)
class Table:
    """bias = values[h, d - first]. values is [H, L] float32."""

    values: Tensor
    first: int


@dataclass(frozen=True)
class Profile:
    """bias = A[h, s] * y + C[h, s], continuous and piecewise linear in y = psi[d - first] * row_scale[p - row_first].

    p is the query's position; s counts the knots that are < y. psi is [L], row_scale [P], knots [W] ascending (+inf
    pads), segment_slope (A) and segment_intercept (C) [H, W + 1], all float32. No gradient flows to the knots: the
    function is continuous in them.
    """

    psi: Tensor
    first: int
    row_scale: Tensor
    row_first: int
    knots: Tensor
    segment_slope: Tensor
    segment_intercept: Tensor


@dataclass(frozen=True)
class Dense:
    """bias[b, h, i, j], [B or 1, H or 1, Tq or 1, Tk or 1], any floating dtype, any strides; -inf forbids a key."""

    bias: Tensor


@dataclass(frozen=True)
class Decay:
    """bias = q[b, h, i] - k[b, h, j]: what is left of a running sum over tokens between key and query.

    q is [B or 1, H or 1, Tq] and k [B or 1, H or 1, Tk], in float64, or in float32: a running sum grows with the text,
    and only differences of near tokens matter, so they are taken in float64.
    """

    q: Tensor
    k: Tensor


@dataclass(frozen=True)
class Bias:
    """A sum of additive operands, at most one of each kind: slope, table, profile, dense, decay; None for none."""

    slope: Slope | None = None
    table: Table | None = None
    profile: Profile | None = None
    dense: Dense | None = None
    decay: Decay | None = None

    def __bool__(self) -> bool:
        return any(x is not None for x in (self.slope, self.table, self.profile, self.dense, self.decay))


FORMS = ("concat-residual", "concat", "add")
EDGES = ("causal", "paper")


@dataclass(frozen=True)
class HeadMix:
    """DAPE: an MLP over the heads of each (i, j), from the scaled logits x and the inner bias b.

    form "concat-residual": x + b + f([x; b]); "concat": x + f([x; b]); "add": x + b + f(x + b), where
    f(z) = w2 @ leaky_relu(w1 @ z + b1, 0.01) + b2. w1 is [W, 2H] for the concat forms with an inner bias and [W, H]
    otherwise, b1 [W], w2 [H, W], b2 [H], all float32. Without an inner bias every form is x + f(x).

    With w1 [W, 2H, k] and w2 [H, W, k], k odd, both are convolved along the keys (DAPE V2): z is zero where a query may
    not see a key, and the layer between is zero before a sequence's first key. Past its last key that layer goes on, as
    if z went on with zeros, if edge is "causal"; with "paper" it is zero where the keys end.
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    form: str = "concat-residual"
    inner: Bias = field(default_factory=Bias)
    edge: str = "causal"


@dataclass(frozen=True)
class Places:
    """Where tokens sit for the biases of a plan, in place of the call's own positions: int64, q [B or 1, Tq] and k [B
    or 1, Tk]. They need not be positions in a sequence: a table over differences of cells' numbers is a 2-D one."""

    q: Tensor
    k: Tensor


@dataclass(frozen=True)
class Gated:
    """Add q_i . e at the position p_ij = min(sum of sigmoid(x_ij') over the keys j' >= j that i sees, L - 1) (CoPE).

    x are the logits before any bias, e is linear between the rows of `weight`, [H or 1, L, D] float32, and q is as it
    came, before any turn; its products with e are not scaled, unless `scaled`. Keys count as they lie in memory,
    whatever their positions; one that a mask or a bias of -inf hides counts nothing. Not together with a mix.
    """

    weight: Tensor
    scaled: bool = False


@dataclass(frozen=True)
class RelativeKeys:
    """Add <u_h, k_j> + <q_i + v_h, q_rows[h, r]> + <k_j, k_rows[h, r]> to <q_i, k_j>, before the scale, r the row of d.

    q_rows and k_rows are [H or 1, L, D], either None (not both); u and v [H or 1, D], or None for zeros; h is a query
    head on both sides; all float32. r = d - first, clamped to 0 .. L - 1; with `rows`, int64 [M], of numbers that are
    clamped so too, r = rows[d - first]. Not together with a rotation, an amplitude or a mix.
    """

    q_rows: Tensor | None
    k_rows: Tensor | None
    first: int
    rows: Tensor | None = None
    u: Tensor | None = None
    v: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """logits = mix(softcap(scale * <amplitude * rotary q, rotary k>)) + bias; without `mix` the first term stands as it
    is. amplitude is [B or 1, H or 1, Tq] float32, and q is multiplied by it in front of the kernel (turning.py).
    `places` are the positions of the biases, where these are not the call's. `gated` and
    `relative` add what they say."""

    rotary: Rotary | None = None
    mix: HeadMix | None = None
    bias: Bias = field(default_factory=Bias)
    amplitude: Tensor | None = None
    places: Places | None = None
    gated: Gated | None = None
    relative: RelativeKeys | None = None


@dataclass(frozen=True)
class Mask:
    """Which keys a query may see; all conditions hold together.

    offset: where query 0 sits on the keys' axis: Tk - Tq ("bottom-right", FlashAttention's) where it is None, 0 is
    torch's "top-left"; an int, or int32 [B] (or [documents]). Masks and implicit positions follow it.
    causal: j <= i + offset.
    window: i + offset - left <= j <= i + offset + right, either None for unlimited.
    boolean: [B or 1, H or 1, Tq, Tk] bool, True where allowed.
    k_lengths: [B] int32; keys from k_lengths[b] on are hidden and Tk in the default offset is k_lengths[b].
    k_starts: [B] int32; keys before k_starts[b] are hidden and implicit positions count from it. Not with cu_seqlens.
    q_segments, k_segments: [B, Tq] and [B, Tk] int32, the document of each token, in one run per row; negative for
    none. Documents are as with cu_seqlens, which they replace; not with k_lengths, k_starts or an offset.
    cu_seqlens_q, cu_seqlens_k: [documents + 1] int32 from 0 to the token count (B = 1); document n's queries see its
    own keys alone, and indices, offsets and implicit positions count inside the document.
    max_q, max_k: the longest document (or Tq and Tk), so that lowering and launching need no look at the device.
    offset_range: least and greatest offset where it is a tensor, as far as they are known without a look at the device.
    """

    causal: bool = False
    offset: int | Tensor | None = None
    left: int | None = None
    right: int | None = None
    boolean: Tensor | None = None
    k_lengths: Tensor | None = None
    k_starts: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_q: int = 0
    max_k: int = 0
    offset_range: tuple[int, int] | None = None
    q_segments: Tensor | None = None
    k_segments: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """One attention call, checked: tensors, a plan, a mask, options.

    q [B, Hq, Tq, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv]; Hq % Hkv == 0. deterministic asks for parameter gradients
    that are summed in a fixed order.
    q_positions [B or 1, Tq] and k_positions [B or 1, Tk] int64 are both given or both None (implicit positions).
    scale_tensor is the scale's tensor, of no dimensions, where it came as one (its gradient goes there); `scale` is its
    number. softcap 0 means none: else x = softcap * tanh(x / softcap) right after the scale. sinks [Hq] float32 adds
    exp(sink) to each row's denominator, and to the log-sum-exp. Dropout keeps element (b, h, i, j) where lane j & 3 of
    Philox4x32-10(key = seed's two halves, counter = (j >> 2, i, b * Hq + h, 0)) is at least dropout_p * 2^32, and
    divides kept weights by 1 - dropout_p; seed is an int64 [1] tensor on q's device. tokens_first: the output lies in
    memory as [B, Tq, Hq, Dv], as q does, so that whoever merges the heads gets a view.
    block_table: int32 or int64 [B, n] where keys lie in pages: k is [pages, Hkv, page, D] and v [pages, Hkv, page, Dv]
    then, key j of sequence b is row j % page of page block_table[b, j // page], and mask.max_k is Tk, at most n * page.
    Such a call takes no gradient. Entries past k_lengths may hold anything.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    plan: Plan
    mask: Mask
    scale: float
    softcap: float = 0.0
    sinks: Tensor | None = None
    q_positions: Tensor | None = None
    k_positions: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None
    deterministic: bool = False
    scale_tensor: Tensor | None = None
    tokens_first: bool = False
    block_table: Tensor | None = None

    @property
    def k_tokens(self) -> int:
        """Tk: the keys that a batch entry has room for."""
        return self.k.shape[2] if self.block_table is None else self.mask.max_k
