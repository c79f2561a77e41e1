"""Attention over a sequence that is cut over several machines, for every encoding over distances and for DAPE.

from posattn.distributed import attention, shard

q, k, v = (shard(x, group) for x in (q, k, v))                    # [B, H, T / P, D] of [B, H, T, D]
out = attention(q, k, v, posattn.DAPE(posattn.Kerple(12), 12), causal=True, group=group)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import posattn
from posattn import validation
from posattn.distributed import blocks
from posattn.distributed import cost as costs
from posattn.distributed.blocks import Settings
from posattn.distributed.cost import LINKS, MACHINES, Work
from posattn.distributed.cost import Link as Link
from posattn.distributed.gathered import GatherTokens, SumGradients
from posattn.distributed.group import Group, check_agreement, group_of
from posattn.distributed.layout import LAYOUTS as LAYOUTS
from posattn.distributed.layout import Span as Span
from posattn.distributed.layout import spans
from posattn.distributed.pairs import Pairs as Pairs
from posattn.distributed.pairs import count_pairs
from posattn.distributed.parameters import check_whole, differentiated, summed
from posattn.distributed.reach import falls
from posattn.distributed.ring import RingAttention
from posattn.distributed.ulysses import TokensOfHeads
from posattn.encodings.base import Encoding
from posattn.errors import ArgumentTypeError, ArgumentValueError

__all__ = [
    "all_gather_attention",
    "attention",
    "count_pairs",
    "ring_attention",
    "shard",
    "ulysses_attention",
    "unshard",
]

METHODS = ("auto", *costs.METHODS)
Meshes = Group | DeviceMesh | None
Window = int | tuple[int | None, int | None] | None


def shard(x: Tensor, group: Meshes = None, layout: str = "zigzag", dim: int = 2) -> Tensor:
    """This rank's tokens of x.

    Args:
        x: a tensor with the tokens of the whole sequence along `dim`.
        group: a process group, a mesh of one dimension, or None for all ranks.
        layout: "zigzag" or "contiguous", as in `ring_attention`.
        dim: of the tokens; 2 for [B, H, T, D].

    Returns:
        x with T / P tokens along `dim`.

    Raises:
        ValueError: a number of tokens that the ranks (and for "zigzag" two pieces each) do not divide.
    """
    found = group_of(group)
    ranks = found.size()
    if x.shape[dim] % ranks:
        raise ArgumentValueError(f"x: expected a number of tokens that {ranks} ranks divide, got {x.shape[dim]}")
    mine = spans(layout, x.shape[dim] // ranks, found.rank(), ranks)
    return torch.cat([x.narrow(dim, span.first, span.length) for span in mine], dim)


def unshard(x: Tensor, group: Meshes = None, layout: str = "zigzag") -> Tensor:
    """The whole sequence on every rank; differentiable.

    Args:
        x: this rank's [B, H, T / P, D], of the same shape on every rank.
        group, layout: as in `shard`.

    Returns:
        [B, H, T, D].
    """
    gathered: Tensor = GatherTokens.apply(group_of(group), layout, x)  # type: ignore[no-untyped-call]
    return gathered


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Encoding | None = None,
    *,
    group: Meshes = None,
    layout: str = "zigzag",
    causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    documents: Sequence[int] | Tensor | None = None,
    dropout_p: float = 0.0,
    sum_gradients: bool = True,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which keys and values go round the ranks while each attends from its own queries.

    Partial results are merged by their log-sum-exps in float32; the backward pass goes round again with the rows' own
    log-sum-exp and nothing computed twice. Memory is O(T / P). Pairs of shards that the mask empties are skipped. Every
    rank of the group has to call it, with the same options.

    Args:
        q: queries [B, Hq, T / P, D] of this rank; `shard` gives them.
        k, v: keys [B, Hkv, T / P, D] and values [B, Hkv, T / P, Dv] of the same tokens.
        position: an encoding, a sum of them, or None; DAPE too. It is placed by the tokens' indices in the whole
            sequence, and its tables are made for the distances of a pair of shards alone.
        group: a process group, a mesh of one dimension, or None for all ranks.
        layout: "zigzag" (rank r holds pieces r and 2 P - 1 - r of 2 P: equal work under a causal mask) or "contiguous".
        causal, window, scale, softcap, deterministic, backend: as in `posattn.attention`.
        sinks: a logit a head [Hq], the same on every rank.
        documents: bounds [0, ..., T] of packed documents in the whole sequence, with B = 1.
        dropout_p: 0. Kernels count their random numbers by the row and column in a call, which are not the sequence's.
        sum_gradients: sum the gradients of the encoding's parameters and of the sinks over the group. False leaves each
            rank its own share, for DDP or FSDP to reduce.
        return_lse: also return the log-sum-exp [B, Hq, T / P].

    Returns:
        [B, Hq, T / P, Dv], or that and the log-sum-exp.

    Raises:
        TypeError, ValueError: as `posattn.attention`; shapes, dtypes or options that differ between the ranks, on every
            rank; an encoding that a shard cannot have (a dense bias, positions of its own, a scaling by the call's
            length).
    """
    found = group_of(group)
    settings = _settings(
        "ring", found, layout, (q, k, v), position, causal, window, scale, softcap, sinks, documents,
        dropout_p, deterministic, backend, sum_gradients,
    )  # fmt: skip
    results: Any = RingAttention.apply(  # type: ignore[no-untyped-call]
        found, layout, settings, position, sum_gradients, q, k, v, sinks, *differentiated(position)
    )
    return tuple(results) if return_lse else results[0]


def all_gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Encoding | None = None,
    *,
    group: Meshes = None,
    layout: str = "zigzag",
    causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    documents: Sequence[int] | Tensor | None = None,
    dropout_p: float = 0.0,
    sum_gradients: bool = True,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention from this rank's queries to the keys and values of all ranks, gathered at once.

    One collective each way and O(T) memory for keys and values: best where there are few key heads, or few ranks.

    Args:
        q, k, v, position, group, layout, causal, window, scale, softcap, sinks, documents: as in `ring_attention`.
        dropout_p, sum_gradients, return_lse, deterministic, backend: as there.

    Returns:
        [B, Hq, T / P, Dv] of this rank's tokens, or that and the log-sum-exp [B, Hq, T / P].

    Raises:
        TypeError, ValueError: as `ring_attention`.
    """
    found = group_of(group)
    settings = _settings(
        "all_gather", found, layout, (q, k, v), position, causal, window, scale, softcap, sinks, documents,
        dropout_p, deterministic, backend, sum_gradients,
    )  # fmt: skip
    keys, values = (GatherTokens.apply(found, layout, x) for x in (k, v))  # type: ignore[no-untyped-call]
    whole = Span(0, keys.shape[2], 0)
    if sum_gradients and sinks is not None:
        (sinks,) = SumGradients.apply(found, sinks)  # type: ignore[no-untyped-call]
    if sum_gradients and position is not None:
        position = summed(position, found)
    parts, lses = [], []
    for span in spans(layout, q.shape[2], found.rank(), found.size()):
        block = blocks.block_of(span, whole, settings, q.device)
        assert block is not None  # a token sees itself
        options: dict[str, Any] = {"causal": causal, "window": window, "scale": scale, "softcap": softcap}
        options["sinks"] = sinks
        options |= {"deterministic": deterministic, "backend": backend, "return_lse": True, **block.options}
        one = q[:, :, block.queries], keys[:, :, block.keys], values[:, :, block.keys]
        part, lse = posattn.attention(*one, position, **options)
        parts.append(part)
        lses.append(lse)
    out, lse = torch.cat(parts, 2), torch.cat(lses, 2)
    return (out, lse) if return_lse else out


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Encoding | None = None,
    *,
    group: Meshes = None,
    layout: str = "zigzag",
    causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    documents: Sequence[int] | Tensor | None = None,
    dropout_p: float = 0.0,
    sum_gradients: bool = True,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of this rank's share of the heads over the whole sequence: two exchanges of tokens for heads each way.

    Args:
        q, k, v, position, group, layout, causal, window, scale, softcap, sinks, documents: as in `ring_attention`.
        dropout_p, sum_gradients, return_lse, deterministic, backend: as there.

    Returns:
        [B, Hq, T / P, Dv] of this rank's tokens, or that and the log-sum-exp [B, Hq, T / P].

    Raises:
        TypeError, ValueError: as `ring_attention`; key heads that P does not divide; a DAPE, which mixes the
            logits of all heads.
    """
    found = group_of(group)
    ranks, rank = found.size(), found.rank()
    _settings(
        "ulysses", found, layout, (q, k, v), position, causal, window, scale, softcap, sinks, documents,
        dropout_p, deterministic, backend, sum_gradients,
    )  # fmt: skip
    if k.shape[1] % ranks:
        raise ArgumentValueError(f"k, v: expected a number of heads that {ranks} ranks divide, got {k.shape[1]}")
    if position is not None and any(isinstance(module, posattn.DAPE) for module in position.modules()):
        raise ArgumentValueError(
            "position: expected an encoding whose heads are apart, got a DAPE, which mixes the logits of all heads; "
            "ring_attention and all_gather_attention take it"
        )
    heads = q.shape[1] // ranks
    mine = slice(rank * heads, (rank + 1) * heads)
    if sum_gradients and sinks is not None:
        (sinks,) = SumGradients.apply(found, sinks)  # type: ignore[no-untyped-call]
    if sum_gradients and position is not None:
        position = summed(position, found)
    own = None if position is None else position.shard(rank * heads, heads)
    options: dict[str, Any] = {"causal": causal, "window": window, "scale": scale, "softcap": softcap}
    options |= {"sinks": None if sinks is None else sinks[mine], "return_lse": True}
    options |= {"deterministic": deterministic, "backend": backend}
    if documents is not None:
        bounds = torch.as_tensor(documents, dtype=torch.int32).to(q.device)
        options |= {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
    tensors = [TokensOfHeads.apply(found, layout, False, x) for x in (q, k, v)]  # type: ignore[no-untyped-call]
    out, lse = posattn.attention(tensors[0], tensors[1], tensors[2], own, **options)
    result: Tensor = TokensOfHeads.apply(found, layout, True, out)  # type: ignore[no-untyped-call]
    if not return_lse:
        return result
    lses: Tensor = TokensOfHeads.apply(found, layout, True, lse[..., None])  # type: ignore[no-untyped-call]
    return result, lses[..., 0]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Encoding | None = None,
    *,
    group: Meshes = None,
    method: str = "auto",
    link: str | Link | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the ranks of a group, by the way that takes the least time there.

    Args:
        q, k, v, position, group: as in `ring_attention`. Or q, k and v are DTensors [B, H, T, D] of one mesh, which
            says the ranks: cut along the batch, along the heads (the encoding and the sinks are cut with them; k and v
            may be replicated, for few key heads) or along the tokens (contiguous shards, over which the methods below
            go), each by a dimension of the mesh of its own. The encoding's parameters and the sinks may be DTensors of
            that mesh.
        method: "ring", "all_gather", "ulysses", or "auto": what `posattn.distributed.cost` says takes the least time
            for these sizes, this mask, this encoding (a DAPE cannot exchange heads) and this link. Gathering is
            considered where the gathered keys and values are at most twice the size of this rank's queries and their
            result, for its memory grows with the sequence.
        link: between the ranks: "nvlink", "infiniband", "ethernet", "gloo", or a `Link` of a latency and a bandwidth.
            None: gloo's for a group of gloo; else NVLink's for a group within a node (as torchrun's LOCAL_WORLD_SIZE
            says) and InfiniBand's beyond.
        options: the other arguments of `ring_attention`.

    Returns:
        [B, Hq, T / P, Dv] of this rank's tokens, or that and the log-sum-exp [B, Hq, T / P]. Of DTensors, DTensors
        placed as q is.

    Raises:
        TypeError, ValueError: as the method that is taken; an unknown method or link; placements of other kinds, or
            lengths that the ranks do not divide.
    """
    if method not in METHODS:
        raise ArgumentValueError(f"method: expected one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if any(map(validation.is_dtensor, (q, k, v))):
        return _of_dtensors(q, k, v, position, group, method, link, options)
    if method == "auto":
        method = chosen(q, k, v, position, group_of(group), link, options)
    by_name = {"ring": ring_attention, "all_gather": all_gather_attention, "ulysses": ulysses_attention}
    return by_name[method](q, k, v, position, group=group, **options)


def _of_dtensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Encoding | None,
    group: Meshes,
    method: str,
    link: str | Link | None,
    options: dict[str, Any],
) -> Any:
    # Here, for torch.distributed.tensor takes a while to import, and who has DTensors has imported it.
    from posattn.distributed import sharded

    if group is not None and group != getattr(q, "device_mesh", None):
        raise ArgumentValueError("group: expected None or the mesh of q, k and v, which are DTensors, got another")
    if "layout" in options:
        raise ArgumentValueError("layout: expected none for DTensors, whose shards are contiguous, got one")

    def alone(q: Tensor, k: Tensor, v: Tensor, position: Encoding | None, **options: Any) -> Any:
        documents = options.pop("documents", None)
        if documents is not None:
            bounds = torch.as_tensor(documents, dtype=torch.int32).to(q.device)
            options |= {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
        return posattn.attention(q, k, v, position, **options)

    over_tokens = partial(attention, method=method, link=link)
    return sharded.attention(q, k, v, position, dict(options), over_tokens, alone)


def chosen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Encoding | None,
    group: Group,
    link: str | Link | None,
    options: dict[str, Any],
) -> str:
    """What "auto" takes."""
    if isinstance(link, str) and link not in LINKS:
        raise ArgumentValueError(f"link: expected one of {', '.join(map(repr, LINKS))} or a Link, got {link!r}")
    if link is None:
        link = _link_of(group, q.device)
    elif not isinstance(link, (str, Link)):
        raise ArgumentTypeError(f"link: expected a name, a Link or None, got {type(link).__name__}")
    left, right = validation.check_window(options.get("window"))
    causal = bool(options.get("causal", False))
    work = Work(
        ranks=group.size(),
        batch=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        tokens=q.shape[2] * group.size(),
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        element=q.element_size(),
        causal=causal,
        window=None if left is None or not (causal or right is not None) else left + 1 + (0 if causal else right or 0),
        mixes=position is not None and any(isinstance(module, posattn.DAPE) for module in position.modules()),
        layout=options.get("layout", "zigzag"),
    )
    machine = MACHINES.get(q.device.type, MACHINES["cuda"])
    return costs.shortest(work, LINKS[link] if isinstance(link, str) else link, machine)


def _link_of(group: Group, device: torch.device) -> str:
    if device.type == "cpu":
        return "gloo"
    return "nvlink" if group.size() <= int(os.environ.get("LOCAL_WORLD_SIZE", "0")) else "infiniband"


def _settings(
    method: str,
    group: Group,
    layout: str,
    tensors: tuple[Tensor, Tensor, Tensor],
    position: Encoding | None,
    causal: bool,
    window: Window,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    documents: Sequence[int] | Tensor | None,
    dropout_p: float,
    deterministic: bool,
    backend: str,
    sum_gradients: bool,
) -> Settings:
    """The checked options, the same on every rank; nothing was sent before but one number."""
    q, k, v = tensors
    facts: list[object] = [tuple(x.shape) for x in tensors] + [str(x.dtype) for x in tensors]
    bounds = None if documents is None else tuple(torch.as_tensor(documents).tolist())
    facts += [
        method,
        layout,
        causal,
        window,
        scale,
        softcap,
        None if sinks is None else tuple(sinks.shape),
        bounds,
        dropout_p,
    ]
    parts = [] if position is None else list(position.modules())
    facts += [sum_gradients, *(type(part).__name__ for part in parts)]
    check_agreement(group, facts, q.device)
    validation.check_qkv(q, k, v, ("q", "k", "v"), 4)
    validation.check_heads(q, k, v)
    check_whole(position)
    if q.shape[2] != k.shape[2]:
        raise ArgumentValueError(
            f"k, v: expected keys of the same {q.shape[2]} tokens as the queries, got {k.shape[2]}"
        )
    spans(layout, q.shape[2], 0, group.size())
    causal = validation.check_flag("causal", causal)
    left, right = validation.check_window(window)
    if dropout_p:
        raise ArgumentValueError(
            f"dropout_p: expected 0.0, got {dropout_p}: kernels count their random numbers by the row, the column and "
            "the head in a call and take no first ones to count from, so that ranks would drop others than one call"
        )
    if scale is not None and not isinstance(scale, (int, float)):
        raise ArgumentTypeError(f"scale: expected a number or None, got {type(scale).__name__}")
    validation.check_sinks(sinks, q)
    total = q.shape[2] * group.size()
    if bounds is not None and (
        q.shape[0] != 1 or bounds[0] != 0 or bounds[-1] != total or any(a > b for a, b in pairwise(bounds))
    ):
        raise ArgumentValueError(
            f"documents: expected ascending bounds from 0 to {total}, with a batch of 1, got {list(bounds)} and a "
            f"batch of {q.shape[0]}"
        )
    plan, absolute = blocks.probe(position, q.shape[1], q.shape[3], q.device)
    return Settings(
        causal=causal,
        left=left,
        right=right,
        scale=None if scale is None else float(scale),
        softcap=validation.check_softcap(softcap),
        deterministic=validation.check_flag("deterministic", deterministic),
        backend=validation.check_backend(backend),
        documents=bounds,
        absolute=absolute,
        falls=falls(plan) and not absolute,
    )
