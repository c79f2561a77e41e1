"""One span of queries against one span of keys, placed by `offset`: forward, and backward with the whole row's output
and log-sum-exp, so that nothing is computed again."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posattn import backends, ops
from posattn.attention import Run, checked_attention
from posattn.distributed.layout import Span
from posattn.encodings.base import Context, Encoding
from posattn.errors import ArgumentValueError
from posattn.plan import Bias, Call, Plan


@dataclass(frozen=True)
class Settings:
    """The options of a call that all blocks share. left and right as a window's; right is 0 under a causal mask.
    documents: bounds in the whole sequence, ascending from 0, or None."""

    causal: bool
    left: int | None
    right: int | None
    scale: float | None
    softcap: float
    deterministic: bool
    backend: str
    documents: tuple[int, ...] | None
    absolute: bool  # the encoding asks where in the whole sequence a token sits, not only how far apart two are
    falls: bool  # its bias is one of the distance alone, which may put keys out of reach


@dataclass(frozen=True)
class Block:
    """Queries and keys that see one another: slices of the spans' tokens, and options of attention for them."""

    queries: slice
    keys: slice
    options: dict[str, Any]


def block_of(queries: Span, keys: Span, settings: Settings, device: torch.device) -> Block | None:
    """What of `keys` the `queries` may see; None if nothing, so that the pair is skipped."""
    bounds = settings.documents
    if bounds is None:
        q_first, q_end, k_first, k_end = queries.first, queries.end, keys.first, keys.end
    else:
        # Documents are runs, so those that both spans touch are a run too: from the last of the two first documents.
        first = max(_document(bounds, queries.first), _document(bounds, keys.first))
        last = min(_document(bounds, queries.end - 1), _document(bounds, keys.end - 1))
        if first > last:
            return None
        q_first, q_end = max(queries.first, bounds[first]), min(queries.end, bounds[last + 1])
        k_first, k_end = max(keys.first, bounds[first]), min(keys.end, bounds[last + 1])
    if settings.causal:
        k_end = min(k_end, q_end)
    elif settings.right is not None:
        k_end = min(k_end, q_end + settings.right)
    if settings.left is not None:
        k_first = max(k_first, q_first - settings.left)
    if q_first >= q_end or k_first >= k_end:
        return None
    options: dict[str, Any] = {"offset": q_first - k_first}
    if bounds is not None and _document(bounds, q_first) < _document(bounds, q_end - 1):
        # Several documents: both spans begin where the first of them does, or where the one span of keys does.
        documents = range(_document(bounds, q_first), _document(bounds, q_end - 1) + 1)
        edges = [bounds[document] for document in (*documents, documents[-1] + 1)]
        q_cuts = [min(max(edge, q_first), q_end) - q_first for edge in edges]
        k_cuts = [min(max(edge, k_first), k_end) - k_first for edge in edges]
        q_starts = [max(bounds[document], q_first) for document in documents]
        k_starts = [min(max(bounds[document], k_first), k_end) for document in documents]
        offsets = [q - k for q, k in zip(q_starts, k_starts)]
        for name, values in (("cu_seqlens_q", q_cuts), ("cu_seqlens_k", k_cuts), ("offset", offsets)):
            options[name] = torch.tensor(values, dtype=torch.int32, device=device)
    if settings.absolute and k_first > 0:  # keys from the first token on are where implicit positions put them
        q_positions, k_positions = (
            _positions(start, end, bounds, device) for start, end in ((q_first, q_end), (k_first, k_end))
        )
        options |= {"q_positions": q_positions, "k_positions": k_positions}
        least = min(q_first, k_first) if bounds is None else 0
        options["position_range"] = (least, max(q_end, k_end) - 1)
    queries_here = slice(queries.at + q_first - queries.first, queries.at + q_end - queries.first)
    return Block(queries_here, slice(k_first - keys.first + keys.at, k_end - keys.first + keys.at), options)


def _positions(start: int, end: int, bounds: tuple[int, ...] | None, device: torch.device) -> Tensor:
    """Where tokens start .. end - 1 sit, in the sequence or in their document."""
    index = torch.arange(start, end, device=device)
    if bounds is None:
        return index
    edges = torch.tensor(bounds, device=device)
    return index - edges[torch.searchsorted(edges, index, right=True) - 1]


def _document(bounds: tuple[int, ...], token: int) -> int:
    """The document that a token belongs to, empty ones aside."""
    return bisect_right(bounds, token) - 1


def _checked(
    q: Tensor, k: Tensor, v: Tensor, position: Encoding | None, block: Block, settings: Settings, run: Run
) -> tuple[Tensor, Tensor]:
    window = None if settings.left is None and settings.right is None else (settings.left, settings.right)
    options: dict[str, Any] = {
        "causal": settings.causal,
        "window": window,
        "scale": settings.scale,
        "softcap": settings.softcap or None,
        "sinks": None,
        "bias": None,
        "mask": None,
        "offset": None,
        "k_lengths": None,
        "k_starts": None,
        "segments": None,
        "block_table": None,
        "k_rotated": False,
        "cu_seqlens_q": None,
        "cu_seqlens_k": None,
        "q_positions": None,
        "k_positions": None,
        "position_range": None,
        "dropout_p": 0.0,
        "deterministic": settings.deterministic,
        "backend": settings.backend,
        **block.options,
    }
    return checked_attention(q, k, v, position, options, run)  # type: ignore[arg-type]


@torch.no_grad()
def forward(
    q: Tensor, k: Tensor, v: Tensor, position: Encoding | None, block: Block, settings: Settings
) -> tuple[Tensor, Tensor]:
    """out and lse of a block's queries over its keys alone."""
    return _checked(q, k, v, position, block, settings, ops.attend)


def backward(
    tensors: tuple[Tensor, Tensor, Tensor],
    position: Encoding | None,
    parameters: list[Tensor],
    block: Block,
    settings: Settings,
    whole: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
) -> list[Tensor | None]:
    """What a block adds to the gradients of q, k, v and the parameters. `whole` are out and lse of the rows over all
    keys of the sequence, `grads` theirs."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]

    def run(call: Call, backend: str) -> tuple[Tensor, Tensor]:
        if backends.goes_to_reference(call, backend):
            return _reweighted(call, backend, whole)
        return ops.attend_known(call, backend, *whole)

    with torch.enable_grad():
        out, lse = _checked(leaves[0], leaves[1], leaves[2], position, block, settings, run)
        grad_out, grad_lse = grads
        given = [grad_out, torch.zeros_like(lse) if grad_lse is None else grad_lse]
        return list(torch.autograd.grad([out, lse], [*leaves, *parameters], given, allow_unused=True))


def _reweighted(call: Call, backend: str, whole: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Numbers of no use with the gradients of the whole row: plain PyTorch's block, by its share of the row."""
    out, lse = ops.attend(call, backend)
    whole_out, whole_lse = whole
    share = (lse - whole_lse).exp().nan_to_num(0.0).detach()
    # d whole_out = sum of share (d out + (out - whole_out) d lse), d whole_lse = sum of share d lse.
    centred = (out.detach() - whole_out) * share[..., None]
    seen = lse.masked_fill(lse.isinf(), 0.0)
    return share[..., None] * out + centred * seen[..., None], share * seen


def probe(position: Encoding | None, heads: int, head_dim: int, device: torch.device) -> tuple[Plan, bool]:
    """The plan of two tokens, and whether it depends on where tokens sit, not only on how far apart they are.
    ValueError for one that a shard cannot have by itself."""
    if position is None:
        return Plan(bias=Bias()), False
    if position.needs_positions:
        raise ArgumentValueError(
            f"position: expected an encoding over indices, got {type(position).__name__}, which needs its own positions"
        )
    for module in position.modules():
        scaling = getattr(module, "scaling", None)
        if scaling is not None and scaling.dynamic and getattr(scaling, "length", None) is None:
            raise ArgumentValueError(
                f"position: expected a scaling that knows its length, got {scaling}, which goes by the length of the "
                "call, and a shard's is not the sequence's; give it length="
            )
    with torch.enable_grad():
        plan = position.lower(Context(2, 2, heads, head_dim, device, torch.float32, causal=True))
    if plan.mix is not None and plan.mix.w1.dim() == 3:
        raise ArgumentValueError(
            "position: expected a mix of one key at a time, got one with a kernel over keys, which would end where a "
            "shard's do"
        )
    if plan.gated is not None:
        raise ArgumentValueError("position: expected no CoPE, got one, whose positions count the keys of all shards")
    if plan.relative is not None:
        raise ArgumentValueError(
            "position: expected no relative keys, got some, which no fused kernel of a shard computes"
        )
    biases = [plan.bias, *([] if plan.mix is None else [plan.mix.inner])]
    if any(bias.dense is not None for bias in biases):
        raise ArgumentValueError(
            "position: expected no dense bias, got one, whose queries and keys are the whole sequence's"
        )
    if any(bias.decay is not None for bias in biases):
        raise ArgumentValueError(
            "position: expected no decay, got one, whose queries and keys are the whole sequence's"
        )
    placed = plan.places is not None or plan.amplitude is not None
    return plan, placed or any(bias.profile is not None for bias in biases)
