"""The mask that models carry to their attention: the rule itself, and eager attention's dense mask to whoever computes.

transformers takes any name of an attention implementation, and more than forty of its families then build a mask by the
interface and run attention of their own, which adds the mask to the logits. No rule over sources or configs tells those
apart for good, so nothing is told apart: a mask is an `AttentionMask`, a tensor of the shape, dtype and values that
eager attention gets. `attention_forward` reads its rule, in O(N). Anything else that touches it gets the values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

from posattn.integrations.transformers.patterns import MaskFunction, Pattern, read_pattern


@dataclass(frozen=True)
class Rule:
    """Which keys each query sees; all conditions hold together. Query i sits at key i + offset.

    Args:
        batch, q_len, k_len: sizes.
        causal, left, right: as in `Pattern`, from the query's place among the keys.
        offset: int, or an int64 tensor of no dimensions (a static cache's).
        starts, ends: int32 [B]; keys before starts[b] and from ends[b] on are hidden (padding).
        keys: bool [B, k_len], the seen keys, where padding has holes.
        documents: int64 [B, T]; a query sees its own document. q_len = k_len = T.
        allowed: bool [B, 1 or H, q_len, k_len], for a rule that nothing else expresses.
    """

    batch: int
    q_len: int
    k_len: int
    causal: bool = False
    left: int | None = None
    right: int | None = None
    offset: int | Tensor = 0
    starts: Tensor | None = None
    ends: Tensor | None = None
    keys: Tensor | None = None
    documents: Tensor | None = None
    allowed: Tensor | None = None

    def dense(self, device: torch.device) -> Tensor:
        """bool [B, 1 or H, q_len, k_len], True where a key is seen."""
        if self.allowed is not None:
            return self.allowed
        key = torch.arange(self.k_len, device=device)
        query = torch.arange(self.q_len, device=device)[:, None] + self.offset
        rows = torch.arange(self.batch, device=device)[:, None, None, None]
        seen = Pattern(self.causal, self.left, self.right, self.documents).holds(query, key, rows)
        if self.starts is not None:
            seen = seen & (key >= self.starts[:, None, None, None])
        if self.ends is not None:
            seen = seen & (key < self.ends[:, None, None, None])
        if self.keys is not None:
            seen = seen & self.keys[:, None, None, :]
        return seen.expand(self.batch, -1 if seen.dim() == 4 else 1, self.q_len, self.k_len)

    def seen_keys(self, device: torch.device) -> Tensor:
        """bool [B, k_len], what padding leaves."""
        key = torch.arange(self.k_len, device=device)
        seen = torch.ones(self.batch, self.k_len, dtype=torch.bool, device=device) if self.keys is None else self.keys
        if self.starts is not None:
            seen = seen & (key >= self.starts[:, None])
        if self.ends is not None:
            seen = seen & (key < self.ends[:, None])
        return seen


_CONTENTS = ("causal", "left", "right", "offset", "starts", "ends", "keys", "documents", "allowed")


class AttentionMask(Tensor):
    """[B, 1, Tq, Tk]: 0 where a key is seen and the dtype's minimum where not, computed when something asks for it.

    A bool one, which a cast of the float one gives, is True where a key is hidden, as that cast of eager's mask is.
    """

    # The fields of its rule, one by one, since torch.compile follows tensors and numbers that are attributes.
    _causal: bool
    _left: int | None
    _right: int | None
    _offset: int | Tensor
    _starts: Tensor | None
    _ends: Tensor | None
    _keys: Tensor | None
    _documents: Tensor | None
    _allowed: Tensor | None
    _dense: Tensor | None
    _exposed: bool

    @staticmethod
    def __new__(cls, rule: Rule, dtype: torch.dtype, device: torch.device) -> AttentionMask:
        size = (rule.batch, 1 if rule.allowed is None else rule.allowed.shape[1], rule.q_len, rule.k_len)
        return torch.Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=device)

    def __init__(self, rule: Rule, dtype: torch.dtype, device: torch.device) -> None:
        self._dense = None
        self._exposed = False
        for name in _CONTENTS:
            setattr(self, f"_{name}", getattr(rule, name))

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        contents = {f"_{name}": getattr(self, f"_{name}") for name in _CONTENTS}
        tensors = [name for name, value in contents.items() if isinstance(value, Tensor)]
        plain = tuple((name, value) for name, value in contents.items() if name not in tensors)
        return tensors, (plain, self.dtype, self.device)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> AttentionMask:
        plain, dtype, device = context
        contents = {name.removeprefix("_"): value for name, value in (*plain, *inner.items())}
        return AttentionMask(Rule(size[0], size[2], size[3], **contents), dtype, device)

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionMask:
        return AttentionMask(_rule(self), self.dtype, self.device)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"AttentionMask({_rule(self)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        mask = args[0] if args and isinstance(args[0], AttentionMask) else None
        rule = None if mask is None else rule_of(mask)
        if mask is not None and rule is not None:
            same = _unchanged(func, mask, rule, args, kwargs)
            if same is not None:
                return same
        plain = tree_map(lambda x: values_of(x) if isinstance(x, AttentionMask) else x, (args, kwargs))
        out = func(*plain[0], **plain[1])
        if mask is not None and any(result.alias_info is not None for result in func._schema.returns):
            mask._exposed = True  # a view, or a write: from here on its values can be others
        return mask if func._schema.is_mutable and mask is not None and out is plain[0][0] else out


def rule_of(mask: AttentionMask) -> Rule | None:
    """What a mask stands for; None once somebody has a view of its values and can write into them."""
    return None if mask._exposed else _rule(mask)


def values_of(mask: AttentionMask) -> Tensor:
    """The dense mask, made once."""
    if mask._dense is not None:
        return mask._dense
    seen = _rule(mask).dense(mask.device)
    if mask.dtype == torch.bool:
        values = ~seen
    else:
        hidden = torch.finfo(mask.dtype).min
        values = torch.where(seen, torch.zeros((), dtype=mask.dtype, device=mask.device), hidden)
    if type(values) is Tensor:  # not a tracer's
        mask._dense = values
    return values


def _rule(mask: AttentionMask) -> Rule:
    return Rule(
        mask.shape[0],
        mask.shape[2],
        mask.shape[3],
        causal=mask._causal,
        left=mask._left,
        right=mask._right,
        offset=mask._offset,
        starts=mask._starts,
        ends=mask._ends,
        keys=mask._keys,
        documents=mask._documents,
        allowed=mask._allowed,
    )


def _unchanged(func: Any, mask: AttentionMask, rule: Rule, args: Any, kwargs: Any) -> AttentionMask | None:
    """The same rule again, from an operator that changes no more than where or in which dtype it lies."""
    aten = torch.ops.aten
    if func in (aten.detach.default, aten.alias.default, aten.clone.default, aten.lift_fresh.default):
        return AttentionMask(rule, mask.dtype, mask.device)
    if func is aten._to_copy.default:
        dtype, device = kwargs.get("dtype") or mask.dtype, torch.device(kwargs.get("device") or mask.device)
        if mask.dtype == torch.bool != dtype or not (dtype.is_floating_point or dtype == torch.bool):
            return None
        return AttentionMask(_moved(rule, device), dtype, device)
    if func is aten.slice.Tensor:
        dim, start, end, step = (*args[1:], *(None,) * 4)[:4]
        if not start and (end is None or end >= mask.shape[dim or 0]) and step in (None, 1):
            return AttentionMask(rule, mask.dtype, mask.device)
    return None


def _moved(rule: Rule, device: torch.device) -> Rule:
    contents = {name: getattr(rule, name) for name in _CONTENTS}
    moved: dict[str, Any] = {name: value.to(device) for name, value in contents.items() if isinstance(value, Tensor)}
    return replace(rule, **moved) if moved else rule


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask of one kind of layer, as transformers' AttentionMaskInterface asks for it.

    Args:
        batch_size, q_length, kv_length: sizes B, Tq, Tk.
        q_offset, kv_offset: the position of query 0 and of key 0; q_offset is a tensor for a static cache.
        mask_function: of (batch, head, query, key) positions, True where a key is seen.
        attention_mask: bool [B, tokens], True for tokens that are no padding.
        allow_is_bidirectional_skip: None may stand for a mask that hides nothing.
        use_vmap: mask_function is a user's, for one index each.
        dtype, device: of the mask that eager attention would get.

    Returns:
        An `AttentionMask`; None if it would hide nothing and may be None.
    """
    device = torch.device(device)
    pattern = None if use_vmap else read_pattern(mask_function)
    within = pattern is not None and (pattern.documents is not None or pattern.chunk is not None)
    if pattern is None or (within and not (q_length == kv_length and _start_together(q_offset, kv_offset))):
        allowed = masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        return AttentionMask(Rule(batch_size, q_length, kv_length, allowed=allowed), dtype, device)
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    rule = Rule(
        batch_size,
        q_length,
        kv_length,
        causal=pattern.causal,
        left=_within(pattern.left, q_length, kv_length),
        right=_within(pattern.right, q_length, kv_length),
        offset=q_offset - kv_offset,
    )
    if within:
        rule = replace(rule, documents=pattern.segments(batch_size, kv_length, device))
    if padding is not None:
        seen: dict[str, Any] = _padded(padding[:, kv_offset : kv_offset + kv_length])
        rule = replace(rule, **seen)
    hides = rule.causal or any(x is not None for x in (rule.left, rule.right, rule.starts, rule.keys, rule.documents))
    return AttentionMask(rule, dtype, device) if hides or not allow_is_bidirectional_skip else None


def _start_together(q_offset: int | Tensor, kv_offset: int) -> bool:
    """Whether queries and keys are the same tokens, as far as that is known: those of a sequence's start."""
    return not isinstance(q_offset, Tensor) and q_offset == 0 and kv_offset == 0


def _within(reach: int | None, q_length: int, kv_length: int) -> int | None:
    """A window's side, None where no key can lie beyond it."""
    return None if reach is None or reach >= max(q_length, kv_length) - 1 else reach


def _padded(padding: Tensor) -> dict[str, Tensor]:
    """What padding [B, Tk] adds to a rule: nothing, the range of seen keys, or the seen keys one by one.

    Looking costs a wait for the device, once a forward pass of the model, as torch's own masks do.
    """
    if is_tracing(padding):
        return {"keys": padding}
    keys = padding.shape[1]
    count = padding.sum(-1)
    start = padding.int().argmax(-1)
    end = keys - padding.flip(-1).int().argmax(-1)
    whole, full = torch.stack([((end - start) == count).all() & (count > 0).all(), (count == keys).all()]).tolist()
    if full:
        return {}
    return {"starts": start.int(), "ends": end.int()} if whole else {"keys": padding}
