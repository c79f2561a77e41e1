"""The public functions: check the arguments, lower the encoding to a plan, and hand the call to a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import wraps
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict, TypeVar, overload

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.nn.functional import dropout, pad
from torch.overrides import handle_torch_function, has_torch_function

from posattn import jagged, keywords, ops, paging, plan_checks, sdpa_shapes, validation
from posattn.encodings._plans import check_values
from posattn.encodings.base import Context, Encoding
from posattn.errors import ArgumentValueError
from posattn.plan import Bias, Call, Dense, Mask, Plan
from posattn.positions import offset_bounds
from posattn.turning import turn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Unpack


class Options(TypedDict, total=False):
    """The keywords of attention() but mesh and return_lse, which decides what it returns."""

    causal: bool
    window: int | tuple[int | None, int | None] | None
    scale: float | Tensor | None
    softcap: float | None
    sinks: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    offset: int | Tensor | None
    k_lengths: Tensor | None
    k_starts: Tensor | None
    segments: Tensor | tuple[Tensor, Tensor] | None
    block_table: Tensor | None
    k_rotated: bool
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    q_positions: Tensor | None
    k_positions: Tensor | None
    position_range: tuple[int, int] | None
    dropout_p: float
    deterministic: bool
    backend: str


Run: TypeAlias = Callable[[Call, str], tuple[Tensor, Tensor]]
Function = TypeVar("Function", bound=Callable[..., object])


def _overridable(function: Function) -> Function:
    """The function as torch's own are: tensor-like arguments and modes take it over by __torch_function__."""
    names = tuple(signature(function).parameters)
    known = frozenset(names)

    @wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        for name in kwargs:
            if name not in known:
                keywords.refuse(function.__name__, name, names)
        given = (*args, *kwargs.values())
        if has_torch_function(given):
            # A CausalBias is understood here; its own way would give results of its class.
            others = [argument for argument in given if not isinstance(argument, CausalBias)]
            if has_torch_function(others):
                return handle_torch_function(call, others, *args, **kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Encoding | None = None,
    *,
    return_lse: Literal[False] = False,
    mesh: DeviceMesh | ProcessGroup | None = None,
    **options: Unpack[Options],
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Encoding | None = None,
    *,
    return_lse: Literal[True],
    mesh: DeviceMesh | ProcessGroup | None = None,
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...


@_overridable
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Encoding | None = None,
    *,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    scale: float | Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    offset: int | Tensor | None = None,
    k_lengths: Tensor | None = None,
    k_starts: Tensor | None = None,
    segments: Tensor | tuple[Tensor, Tensor] | None = None,
    block_table: Tensor | None = None,
    k_rotated: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    position_range: tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str = "auto",
    mesh: DeviceMesh | ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(logits) v, with logits = scale * q k^T as the encoding `position` changes them, in O(N) memory.

    Query i of Tq sits at key position i + offset. The default, Tk - Tq, lets the last query meet the last key, as a
    cache wants it ("bottom-right" alignment, FlashAttention's). A row that may see no key gives zeros and zero
    gradients.

    Args:
        q: [B, Hq, Tq, D], float32, bfloat16 or float16; float64 runs on the reference, in O(N^2) memory. Any strides.
        k: [B, Hkv, Tk, D]; Hkv divides Hq, and query head h reads key head h // (Hq / Hkv).
        v: [B, Hkv, Tk, Dv].
        position: an encoding, a sum of encodings, or None.
        causal: key j is seen by query i if j <= i + offset.
        window: (left, right) or an int for both: keys from i + offset - left to i + offset + right; None: no limit.
        scale: multiplies q k^T; 1 / sqrt(D) by default. A tensor of one element takes a gradient, and lets one compiled
            graph serve every value.
        softcap: x becomes softcap * tanh(x / softcap) right after the scale; None or 0 for none.
        sinks: [Hq], adds exp(sinks[h]) to the softmax's denominator (Xiao 2023, as GPT-OSS has it).
        bias: added to the logits, broadcasts to [B, Hq, Tq, Tk]; differentiable; -inf forbids a key. It is read as it
            is, so a number a key, c[:, :, None, :], or a query costs O(N).
        mask: bool, True where a key is seen, broadcasts to [B, Hq, Tq, Tk].
        offset: where query 0 sits on the keys' axis, for masks and implicit positions: an int, or integers [B] (with
            cu_seqlens, one a document) from -Tq to Tk. None for Tk - Tq, or k_lengths[b] - Tq; 0 is torch's "top-left"
            alignment; others are a chunk's of a prefill, a preallocated cache's, or a shard's.
        k_lengths: [B] integers from 0 to Tk; keys from k_lengths[b] on are hidden, and stand for Tk in the default
            offset.
        k_starts: [B] integers from 0 to Tk, at most k_lengths[b]; keys before k_starts[b] are hidden (left padding),
            and implicit positions count from it. Hidden keys and values may hold anything.
        segments: [B, T] integers, the document of each token (or a pair of them, for queries and for keys): a token
            sees its own document alone, and alignment and positions count inside it. Each document is one run of its
            row; a negative number belongs to none. The same documents have one shape however they are cut, so that one
            compiled graph serves them.
        block_table: [B, n] integers, where k and v are the pages of a cache, [pages, page, Hkv, D or Dv]: key j of
            sequence b is row j % page of page block_table[b, j // page], and Tk is n * page. k_lengths must be given;
            entries past it may hold anything. Kernels read through the table; where anything needs a gradient (and for
            DAPE on a GPU) the pages named are copied first, O(Tk) memory. Values are checked on the CPU alone:
            elsewhere an entry that names no page reads the first or the last. `posattn.PagedCache` keeps such a cache.
        k_rotated: the keys were turned by `position`'s rotation where they were put, as in a cache with a `rotation`:
            queries alone are turned here. Not with k_starts, from which positions would count.
        cu_seqlens_q, cu_seqlens_k: [documents + 1] integers, bounds of documents packed into B = 1. A document's
            queries see its own keys alone, and alignment and positions count inside the document.
        q_positions, k_positions: [T], [1, T] or [B, T] integers, where tokens sit for `position`; the masks keep
            counting tokens. Of floats, for encodings that only turn or scale q and k.
        position_range: (first, last) between which all q_positions and k_positions lie. It spares a table's encoding
            the look at them that sizes its table: a wait for the device, and a break in a compiled graph.
        dropout_p: share of the softmax weights dropped, 0 <= dropout_p <= 1, seeded from torch.manual_seed.
        return_lse: also return the logits' log-sum-exp, natural log, float32 [B, Hq, Tq]; differentiable.
        deterministic: sum parameter gradients in a fixed order; so does torch.use_deterministic_algorithms.
        backend: "auto", or "cpu", "cuda", "triton" or "reference", which runs or raises its reason not to.
        mesh: the sequence is cut over the ranks of this mesh of one dimension, or process group, and q, k and v are
            this rank's tokens, as `posattn.distributed.shard` gives them: the call goes by
            `posattn.distributed.attention`, whose way it chooses. DTensors go there by themselves. Options that place
            tokens (bias, mask, offset, lengths, positions, pages) are refused there; cu_seqlens, both the same, are the
            whole sequence's.

    Returns:
        [B, Hq, Tq, Dv] in q's dtype, or that and the log-sum-exp. Under autocast q, k and v are cast as torch casts
        those of its own scaled_dot_product_attention.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument with the wrong shape, device or value, or no backend that can run the call.
    """
    return_lse = validation.check_flag("return_lse", return_lse)
    # A literal, for torch.compile traces no call of a TypedDict with optional keys.
    options: Options = {
        "causal": causal,
        "window": window,
        "scale": scale,
        "softcap": softcap,
        "sinks": sinks,
        "bias": bias,
        "mask": mask,
        "offset": offset,
        "k_lengths": k_lengths,
        "k_starts": k_starts,
        "segments": segments,
        "block_table": block_table,
        "k_rotated": k_rotated,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "q_positions": q_positions,
        "k_positions": k_positions,
        "position_range": position_range,
        "dropout_p": dropout_p,
        "deterministic": deterministic,
        "backend": backend,
    }
    if mesh is not None or validation.is_dtensor(q):
        return _over_mesh(q, k, v, position, options, mesh, return_lse)
    out, lse = checked_attention(q, k, v, position, options, ops.attend)
    return (out, lse) if return_lse else out


_OVER_RANKS = ("causal", "window", "scale", "softcap", "sinks", "dropout_p", "deterministic", "backend")


def _over_mesh(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Encoding | None,
    options: Options,
    mesh: object,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """By posattn.distributed, which stands on top of this module and is imported when it is first asked for."""
    given: dict[str, object] = {name: value for name, value in options.items() if name in _OVER_RANKS}
    bounds = options["cu_seqlens_q"]
    if bounds is not None:
        if options["cu_seqlens_k"] is not bounds:
            raise ArgumentValueError("cu_seqlens_q, cu_seqlens_k: expected one tensor for both over a mesh, got two")
        given["documents"] = bounds
    for name, value in options.items():
        if name not in (*_OVER_RANKS, "cu_seqlens_q", "cu_seqlens_k") and value is not None and value is not False:
            raise ArgumentValueError(f"{name}: expected none over the ranks of a mesh, got one")
    distributed = import_module("posattn.distributed")
    found: Tensor | tuple[Tensor, Tensor] = distributed.attention(
        q, k, v, position, group=mesh, return_lse=return_lse, **given
    )
    return found


def checked_attention(
    q: Tensor, k: Tensor, v: Tensor, position: Encoding | None, options: Options, run: Run
) -> tuple[Tensor, Tensor]:
    """attention() of all its options, with `run` in the place of a backend: what it returns for the checked call."""
    block_table, k_lengths = options["block_table"], options["k_lengths"]
    pages = None
    if block_table is not None:
        block_table, k_lengths = validation.check_pages(q, k, v, block_table, k_lengths, options["cu_seqlens_k"])
        if _autocasts(q) or 0 in (q.shape[3], k.shape[3], v.shape[3]):  # what is cast or padded is not the whole pool
            k, v = (paging.gathered(pages, block_table, k_lengths) for pages in (k, v))
        else:
            pages = paging.Pages(k, v, block_table)
            k, v = pages.stand_ins()
    if _autocasts(q):
        q, k, v = (_autocast(tensor) for tensor in (q, k, v))
    plain = _plain_signature(q, k, v, options)
    seen = None if plain is None else _SEEN.get(plain)
    if seen is not None:
        mask, context = seen
        return _attend(
            q,
            k,
            v,
            position,
            mask,
            scale=options["scale"],
            bias=None,
            softcap=validation.check_softcap(options["softcap"]),
            dropout_p=options["dropout_p"],
            deterministic=validation.check_flag("deterministic", options["deterministic"]),
            backend=validation.check_backend(options["backend"]),
            run=run,
            context=context,
        )
    validation.check_qkv(q, k, v, ("q", "k", "v"), 4)
    validation.check_heads(q, k, v)
    causal, k_rotated = (validation.check_flag(name, options[name]) for name in ("causal", "k_rotated"))
    if k_rotated and options["k_starts"] is not None:
        raise ArgumentValueError("k_rotated, k_starts: expected one or the other, got both")
    left, right = validation.check_window(options["window"])
    cu_q, cu_k, max_q, max_k = validation.check_cu_seqlens(options["cu_seqlens_q"], options["cu_seqlens_k"], q, k)
    lengths, starts, end = validation.check_key_bounds(k_lengths, options["k_starts"], cu_q, q, k)
    offset, offset_range = validation.check_offset(options["offset"], cu_q, q, k, max_q, max_k)
    others = {"offset": offset, "k_lengths": lengths, "k_starts": starts, "cu_seqlens_q": cu_q}
    q_segments, k_segments = validation.check_segments(options["segments"], others, q, k)
    boolean, bias = validation.check_mask(options["mask"], q, k), validation.check_bias(options["bias"], q, k)
    positions = validation.check_positions(
        options["q_positions"], options["k_positions"], q, k, options["position_range"]
    )
    offsets = offset_bounds(offset, offset_range)
    if causal and offsets is not None and cu_q is None and not torch.compiler.is_compiling():
        end = min(end, max(offsets[1] + q.shape[2], 0))
    if end < k.shape[2]:  # slots of a cache that nobody sees: nothing is made for them
        max_k = end
        k, v, boolean, bias = k[:, :, :end], v[:, :, :end], _of_keys(boolean, end), _of_keys(bias, end)
        positions = positions[0], _of_keys(positions[1], end)
        lengths, starts = (None if bound is None else bound.clamp(max=end) for bound in (lengths, starts))
    mask = Mask(
        causal=causal,
        left=left,
        right=None if causal else right,  # causal is the closer limit
        boolean=boolean,
        offset=offset,
        k_lengths=lengths,
        k_starts=starts,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_q=max_q,
        max_k=max_k,
        offset_range=offset_range,
        q_segments=q_segments,
        k_segments=k_segments,
    )
    if plain is not None:
        if len(_SEEN) >= _MOST_SEEN:
            _SEEN.clear()
        _SEEN[plain] = mask, Context.of(q, k, mask)
    return _attend(
        q,
        k,
        v,
        position,
        mask,
        scale=options["scale"],
        softcap=validation.check_softcap(options["softcap"]),
        sinks=validation.check_sinks(options["sinks"], q),
        bias=bias,
        positions=positions,
        position_range=options["position_range"],
        dropout_p=options["dropout_p"],
        deterministic=validation.check_flag("deterministic", options["deterministic"]),
        backend=validation.check_backend(options["backend"]),
        pages=pages,
        k_rotated=k_rotated,
        run=run,
    )


# Options that say which tokens see which, or where they are: what a plain call has none of.
_PLACING = (
    "window",
    "sinks",
    "bias",
    "mask",
    "offset",
    "k_lengths",
    "k_starts",
    "segments",
    "block_table",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "q_positions",
    "k_positions",
    "position_range",
)
# The checked mask of plain calls and what encodings are told of them, by all that those depend on. Checks and these two
# dataclasses are a fifth of a small call's time.
_SEEN: dict[tuple[object, ...], tuple[Mask, Context]] = {}
_MOST_SEEN = 256


def _plain_signature(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[object, ...] | None:
    """What decides whether q, k and v are fit for a call with no option of _PLACING; None for any other call."""
    if torch.compiler.is_compiling() or not (type(q) is type(k) is type(v) is Tensor):
        return None
    given: Mapping[str, object] = options
    for name in _PLACING:
        if given[name] is not None:
            return None
    causal = given["causal"]
    if given["k_rotated"] is not False:
        return None
    if not (causal is True or causal is False) or q.is_nested or k.is_nested or v.is_nested:
        return None
    q_shape, v_shape = q.shape, v.shape
    if len(q_shape) != 4 or not q_shape[3] or not v_shape[-1]:
        return None
    shapes = (q_shape, k.shape, v_shape, causal)
    return (*shapes, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, q.layout, k.layout, v.layout)


@_overridable
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    enable_gqa: bool = False,
    *,
    position: Encoding | None = None,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, with a positional encoding.

    Shapes, broadcasting, masks and defaults are torch's. is_causal aligns top-left: query i sits at key position i, for
    the mask (key j is seen if j <= i) and for `position`. Without it, `position` places query i at i + (S - L).

    Args:
        query: [..., Hq, L, E]; the leading dimensions broadcast, and the one before L is the heads. All three may be
            nested tensors [B, Hq, L, E] of jagged layout: documents of different lengths.
        key: [..., H, S, E]; H is Hq, or 1, or with enable_gqa a divisor of Hq.
        value: [..., H, S, Ev].
        attn_mask: broadcasts to [..., Hq, L, S]; bool, True where a key is seen, or float32 or query's dtype, added; or
            torch.nn.attention.bias.causal_upper_left or causal_lower_right. One that rows share, [B, 1, Hq, L, S] for
            queries [B, N, Hq, L, E], is read as it is, and its gradient summed in a fixed order.
        dropout_p: share of the softmax weights dropped, 0 <= dropout_p <= 1, seeded from torch.manual_seed.
        is_causal: as above; together with attn_mask, both hold.
        scale: multiplies the products of queries and keys; 1 / sqrt(E) by default.
        enable_gqa: key and value heads are shared by groups of query heads.
        position: an encoding, a sum of encodings, or None.

    Returns:
        [..., Hq, L, Ev] in query's dtype; zeros in rows that may see no key.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument with the wrong shape, device or value, or no backend that can run the call.
    """
    top_left = is_causal
    if isinstance(attn_mask, CausalBias):
        validation.check_causal_bias(attn_mask, is_causal, query, key)
        top_left = attn_mask.variant == CausalVariant.UPPER_LEFT
        is_causal, attn_mask = True, None
    if _autocasts(query):
        query, key, value = (_autocast(tensor) for tensor in (query, key, value))
        attn_mask = None if attn_mask is None else _autocast(attn_mask)
    is_causal = validation.check_flag("is_causal", is_causal)
    enable_gqa = validation.check_flag("enable_gqa", enable_gqa)
    if jagged.is_jagged(query):
        documents = jagged.packed(query, key, value, attn_mask)
        mask = replace(documents.mask, causal=is_causal, offset=0 if is_causal else None)
        q, k, v, _, _ = sdpa_shapes.fold(*documents.tensors, None, enable_gqa)
        return documents.unpacked(_attend(q, k, v, position, mask, scale=scale, bias=None, dropout_p=dropout_p)[0])
    validation.check_qkv(query, key, value, ("query", "key", "value"), None)
    validation.check_attn_mask(attn_mask, query)
    parts = sdpa_shapes.parts(query, key, value, attn_mask)
    if parts is not None:
        dim, pieces = parts
        results = [
            scaled_dot_product_attention(*piece, dropout_p, is_causal, scale, enable_gqa, position=position)
            for piece in pieces
        ]
        return torch.stack(results, dim)
    q, k, v, attn_mask, shape = sdpa_shapes.fold(query, key, value, attn_mask, enable_gqa)
    boolean = bias = None
    if attn_mask is not None:
        attn_mask = validation.check_logit_shaped("attn_mask", attn_mask, q, k)
        boolean, bias = (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)
    offset = 0 if top_left else None
    mask = Mask(causal=is_causal, offset=offset, boolean=boolean, max_q=q.shape[2], max_k=k.shape[2])
    out, _ = _attend(q, k, v, position, mask, scale=scale, bias=bias, dropout_p=dropout_p)
    return out if out.shape == shape else out.reshape(shape)


def _of_keys(x: Tensor | None, end: int) -> Tensor | None:
    """The first `end` of x's last dimension, the keys', or all of one that serves every key."""
    return x if x is None or x.shape[-1] == 1 else x[..., :end]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Encoding | None,
    mask: Mask,
    *,
    scale: float | Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    positions: tuple[Tensor | None, Tensor | None] = (None, None),
    position_range: tuple[int, int] | None = None,
    deterministic: bool = False,
    backend: str = "auto",
    pages: paging.Pages | None = None,
    k_rotated: bool = False,
    run: Run = ops.attend,
    context: Context | None = None,
) -> tuple[Tensor, Tensor]:
    """Lower `position`, put the dense bias into its plan, draw a seed if anything is dropped, and run the call.

    k and v stand in for `pages`, where these are given: only their shapes count.
    """
    number, scale_tensor = validation.check_scale(scale, q.shape[3])
    dropout_p = validation.check_dropout(dropout_p)
    value_dim = v.shape[3]
    if q.shape[3] == 0:
        q, k = pad(q, (0, 1)), pad(k, (0, 1))  # kernels want a dimension; products stay 0
    if value_dim == 0:
        v = pad(v, (0, 1))
    if position is None:
        validation.check_no_positions(positions)
        plan, positions = Plan(bias=Bias()), (None, None)
    else:
        validation.check_position(position)
        fractions = positions[0] is not None and positions[0].is_floating_point()
        if fractions:
            validation.check_takes_fractions(position)
        context = context or Context.of(q, k, mask, *positions, position_range)
        plan = _lower(position, replace(context, k_rotated=True) if k_rotated else context, q, k)
        if plan.places is not None:
            positions = plan.places.q, plan.places.k
        elif fractions:
            positions = None, None  # of rotations and amplitudes alone, which are lowered
    if k_rotated:
        q, plan = _turned_queries(q, plan)
    if bias is not None:
        inner = plan.bias.dense
        dense = Dense(bias if inner is None else inner.bias + bias)
        plan = replace(plan, bias=replace(plan.bias, dense=dense))
    call = Call(
        q=q,
        k=k,
        v=v,
        plan=plan,
        mask=mask,
        scale=number,
        scale_tensor=scale_tensor,
        softcap=softcap,
        sinks=sinks,
        q_positions=positions[0],
        k_positions=positions[1],
        dropout_p=dropout_p % 1.0,
        # On q's device: a captured graph advances its generator with each replay.
        seed=torch.randint(2**62, (1,), dtype=torch.int64, device=q.device) if 0.0 < dropout_p < 1.0 else None,
        deterministic=deterministic or torch.are_deterministic_algorithms_enabled(),
        tokens_first=bool(q.stride(1) < q.stride(2)),
    )
    out, lse = run(call if pages is None else pages.put_into(call), backend)
    if dropout_p == 1.0:
        out = dropout(out, 1.0)
    return (out if value_dim else out[..., :0]), lse


def _turned_queries(q: Tensor, plan: Plan) -> tuple[Tensor, Plan]:
    """q as the plan turns it, for keys that are turned already, and a plan that turns nothing."""
    rotary = plan.rotary
    if rotary is None:
        raise ArgumentValueError("k_rotated: expected a position that rotates, got one that does not, or none")
    if plan.gated is not None:
        raise ArgumentValueError(
            "k_rotated: expected no CoPE beside a rotation, got one, which reads q before its turn"
        )
    return turn(q, rotary.q_cos, rotary.q_sin, rotary.interleaved), replace(plan, rotary=None)


def _lower(position: Encoding, context: Context, q: Tensor, k: Tensor) -> Plan:
    """The plan, computed outside autocast: tables are float32 whatever the model's precision."""
    off = torch.autocast(q.device.type, enabled=False) if _autocasts(q) else nullcontext()
    with off:
        plan = plan_checks.checked(position(context), type(position).__name__, q, k)
        if not torch.compiler.is_compiling():
            check_values(position, plan)
    return plan


def _autocasts(tensor: object) -> bool:
    """True under an autocast for this tensor's device; the meta device has none."""
    return isinstance(tensor, Tensor) and not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def _autocast(tensor: Tensor) -> Tensor:
    """Cast as torch's autocast casts an argument of its own scaled_dot_product_attention: float64 stays."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
