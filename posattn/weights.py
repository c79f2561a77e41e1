"""The weights of attention, of the rows and heads that somebody wants to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import pad

from posattn import reference
from posattn.attention import Options, attention, checked_attention
from posattn.encodings._plans import head_slice
from posattn.encodings.base import Encoding
from posattn.errors import ArgumentTypeError, ArgumentValueError
from posattn.paging import gathered_call
from posattn.plan import Call

if TYPE_CHECKING:
    from typing_extensions import Unpack

_DEFAULTS = {
    name: parameter.default
    for name, parameter in signature(attention).parameters.items()
    if name in Options.__annotations__
}
# What changes how attention() is computed, and nothing of its weights.
_ABOUT_THE_RUN = ("dropout_p", "deterministic", "backend")


@overload
def weights(
    q: Tensor,
    k: Tensor,
    position: Encoding | None = None,
    *,
    rows: Sequence[int] | slice | Tensor | None = None,
    heads: Sequence[int] | slice | Tensor | None = None,
    return_lse: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...


@overload
def weights(
    q: Tensor,
    k: Tensor,
    position: Encoding | None = None,
    *,
    rows: Sequence[int] | slice | Tensor | None = None,
    heads: Sequence[int] | slice | Tensor | None = None,
    return_lse: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...


def weights(
    q: Tensor,
    k: Tensor,
    position: Encoding | None = None,
    *,
    rows: Sequence[int] | slice | Tensor | None = None,
    heads: Sequence[int] | slice | Tensor | None = None,
    return_lse: bool = False,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]:
    """The softmax weights that attention() gives these queries, in O(rows * Tk) memory: for looking at.

        posattn.weights(q, k, position, rows=[-1], heads=[0, 3], causal=True)       # [B, 2, 1, Tk]

    Plain PyTorch computes them, differentiably, in float32 (float64 if q is float64). Hidden keys weigh 0; a row sums
    to 1, to less where there are sinks, and to 0 where it may see no key.

    Args:
        q, k, position: as in `posattn.attention`.
        rows: queries: their indices, negative ones from the end, or a slice; all by default.
        heads: query heads, in the same words; all by default.
        return_lse: also return the log-sum-exp, natural log, [B, heads, rows].
        options: those of `posattn.attention`. The weights are those before any dropout.

    Returns:
        [B, heads, rows, Tk], or that and the log-sum-exp.

    Raises:
        TypeError, ValueError: an index that does not exist, and all that `posattn.attention` raises.
    """
    unknown = sorted(set(options) - set(_DEFAULTS))
    if unknown:
        raise ArgumentTypeError(f"weights() got an unexpected option {unknown[0]!r}; it takes those of attention()")
    given: Any = {**_DEFAULTS, **{name: x for name, x in options.items() if name not in _ABOUT_THE_RUN}}

    def run(call: Call, _: str) -> tuple[Tensor, Tensor]:
        call = gathered_call(call)
        queries = torch.tensor(_indices("rows", rows, call.q.shape[2]), dtype=torch.int64, device=call.q.device)
        chosen = _indices("heads", heads, call.q.shape[1])
        wide = call if call.q.dtype == torch.float64 else replace(call, q=call.q.float(), k=call.k.float())
        if call.plan.mix is not None or len(chosen) in (0, call.q.shape[1]):
            found, lse = reference.weights(wide, queries)
            if chosen != list(range(call.q.shape[1])):
                found, lse = found[:, chosen], lse[:, chosen]
            return found, lse
        parts = [reference.weights(_one_head(wide, head), queries) for head in chosen]
        return torch.cat([part for part, _ in parts], 1), torch.cat([part for _, part in parts], 1)

    # Nothing reads v, but it is checked, and k has a shape that will do.
    found, lse = checked_attention(q, k, k, position, given, run)
    # Slots behind all that a query may see were left out of the call.
    table = given["block_table"]
    slots = k.shape[2] if table is None else table.shape[1] * k.shape[1]
    found = pad(found, (0, slots - found.shape[-1]))
    return (found, lse) if return_lse else found


def _one_head(call: Call, head: int) -> Call:
    """The call of one query head."""
    key_head = head // (call.q.shape[1] // call.k.shape[1])
    mask = call.mask
    if mask.boolean is not None and mask.boolean.shape[1] > 1:
        mask = replace(mask, boolean=mask.boolean[:, head, None])
    return replace(
        call,
        q=call.q[:, head, None],
        k=call.k[:, key_head, None],
        v=call.v[:, key_head, None],
        plan=head_slice(call.plan, head, 1),
        mask=mask,
        sinks=None if call.sinks is None else call.sinks[head, None],
    )


def _indices(name: str, chosen: Sequence[int] | slice | Tensor | None, size: int) -> list[int]:
    """Each within 0 .. size - 1."""
    if chosen is None or isinstance(chosen, slice):
        return list(range(size)[slice(None) if chosen is None else chosen])
    if isinstance(chosen, Tensor):
        if chosen.dim() != 1 or chosen.dtype not in (torch.int32, torch.int64):
            raise ArgumentTypeError(
                f"{name}: expected integers of one dimension, got {chosen.dtype} {list(chosen.shape)}"
            )
        found: list[Any] = chosen.tolist()
    elif isinstance(chosen, (list, tuple, range)):
        found = list(chosen)
    else:
        raise ArgumentTypeError(f"{name}: expected a list of indices, a slice or None, got {chosen!r}")
    for index in found:
        if isinstance(index, bool) or not isinstance(index, int):
            raise ArgumentTypeError(f"{name}: expected integers, got {index!r}")
        if not -size <= index < size:
            raise ArgumentValueError(f"{name}: expected indices from {-size} to {size - 1}, got {index}")
    return [index % size for index in found]
