"""The attention of models: what a layer of transformers asks for, as one call of posattn.attention."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging

import posattn
from posattn.encodings.base import Context, Encoding
from posattn.integrations.transformers.masks import AttentionMask, Rule, rule_of, values_of
from posattn.plan import Bias, Plan, Table

logger = logging.get_logger(__name__)

MAX_HEAD_DIM = {"cpu": 1024, "cuda": 256 if torch.version.hip else 512}  # of posattn's kernels, by device
# Arguments of families' own eager functions that are understood here, or that say nothing about the result.
_UNDERSTOOD = frozenset(
    (
        "module",
        "query",
        "key",
        "value",
        "attention_mask",
        "scaling",
        "dropout",
        "is_causal",
        "sliding_window",
        "softcap",
        "s_aux",
        "position_bias",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "position_ids",
        "output_attentions",
        "deterministic",
    )
)


class DistanceTable(Encoding):
    """values [H, L] over the distances first .. first + L - 1: a bias that the model itself computed, O(N)."""

    def __init__(self, values: Tensor, first: int) -> None:
        super().__init__()
        self.values = values
        self.first = first

    def build(self, context: Context) -> Plan:
        return Plan(bias=Bias(table=Table(self.values.to(context.table_dtype(self.values)), self.first)))


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    position: Encoding | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers' AttentionInterface asks for it.

    Args:
        module: the layer; its `is_causal` says what `is_causal` does not.
        query: [B, Hq, Tq, D].
        key, value: [B, Hkv, Tk, D].
        attention_mask: an `AttentionMask`; or [B or 1, Hq or 1, Tq, Tk], bool (True where a key is seen) or float
            (added); or None: causal or not, by is_causal.
        dropout, scaling, softcap: as in `posattn.attention` (dropout_p, scale, softcap).
        sliding_window: tokens that a query sees, itself included; where there is no mask and attention is causal. A
            mask says it by itself.
        s_aux: [Hq], attention sinks.
        position_bias: [1 or B, Hq, Tq, Tk], added; from a layer that `convert` changed, a table [1, Hq, 1, Tq + Tk - 1]
            over the distances from 1 - Tq on, or nothing that counts.
        position: an encoding of posattn.
        kwargs: what other implementations need. A family whose own eager function takes something that is not
            understood here runs that function.

    Returns:
        [B, Tq, Hq, D], and None: attention weights are eager attention's to give.
    """
    unknown = [name for name, given in kwargs.items() if given is not None and name not in _UNDERSTOOD]
    own = _eager_function(type(module), tuple(unknown)) if unknown else None
    if own is not None:
        given = {"s_aux": s_aux, "softcap": softcap, "position_bias": position_bias, "sliding_window": sliding_window}
        return own(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            **{name: x for name, x in given.items() if x is not None}, **kwargs,
        )  # fmt: skip
    if kwargs.get("output_attentions"):
        logger.warning_once(
            'posattn gives no attention weights, and returns None for them; attn_implementation="eager" has them.'
        )
    causal = bool(is_causal if is_causal is not None else getattr(module, "is_causal", True))
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux, "dropout_p": dropout}
    if attention_mask is None and kwargs.get("cu_seq_lens_q") is not None and query.shape[0] == 1:
        options |= {"causal": causal, "cu_seqlens_q": kwargs["cu_seq_lens_q"], "cu_seqlens_k": kwargs["cu_seq_lens_k"]}
    else:
        options |= mask_options(attention_mask, query, key, causal)
    if attention_mask is None and causal and sliding_window is not None:
        options["window"] = (sliding_window - 1, 0)
    if position_bias is not None:
        form = getattr(module, "_posattn_bias", "dense")
        if form == "table":
            position = DistanceTable(position_bias[0, :, 0], 1 - query.shape[2])
        elif form == "dense":
            bias = options.get("bias")
            options["bias"] = position_bias if bias is None else position_bias + bias
    if max(query.shape[3], value.shape[3]) > MAX_HEAD_DIM.get(query.device.type, 256):
        beyond = options.keys() & ({"bias", "cu_seqlens_q"} | ({"window"} if attention_mask is None else set()))
        if position is None and softcap is None and s_aux is None and not beyond:
            return _by_torch(module, query, key, value, attention_mask, causal, dropout, scaling)
        options["backend"] = "reference"
    out = posattn.attention(query, key, value, position, **options)
    return out.transpose(1, 2).contiguous(), None


def _by_torch(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    dropout: float,
    scaling: float | None,
) -> tuple[Tensor, None]:
    """Heads too wide for posattn's kernels (Gemma 4's global layers): torch's own, with a mask of what a rule says."""
    rule = rule_of(mask) if isinstance(mask, AttentionMask) else None
    if rule is not None:
        plain = rule_options(rule, query.device) == {"causal": True, "offset": 0} and rule.q_len == rule.k_len
        causal, mask = plain, None if plain else rule.dense(query.device)
    elif isinstance(mask, AttentionMask):
        mask = values_of(mask)
    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal)


def mask_options(mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> dict[str, Any]:
    """The options of posattn.attention for a mask of any kind; `causal` counts where there is none."""
    if mask is None:
        return {"causal": causal}
    if isinstance(mask, AttentionMask):
        rule = _fitting(mask, query, key)
        if rule is not None:
            return rule_options(rule, query.device)
        mask = values_of(mask)
        mask = ~mask if mask.dtype == torch.bool else mask
    return {"mask" if mask.dtype == torch.bool else "bias": mask[..., : key.shape[2]]}


def _fitting(mask: Tensor | None, query: Tensor, key: Tensor) -> Rule | None:
    """The rule of a mask, if it has one, for so many rows, queries and keys."""
    rule = rule_of(mask) if isinstance(mask, AttentionMask) else None
    sizes = query.shape[0], query.shape[2], key.shape[2]
    return rule if rule is not None and (rule.batch, rule.q_len, rule.k_len) == sizes else None


def rule_options(rule: Rule, device: torch.device) -> dict[str, Any]:
    """The options of posattn.attention that say what a rule says."""
    if rule.allowed is not None:
        return {"mask": rule.allowed}
    options: dict[str, Any] = {"causal": rule.causal}
    if rule.left is not None or rule.right is not None:
        options["window"] = (rule.left, rule.right)
    if rule.documents is not None:
        options["segments"] = rule.documents
        if any(x is not None for x in (rule.starts, rule.ends, rule.keys)):
            options["mask"] = rule.seen_keys(device)[:, None, None, :]
        return options
    if rule.starts is not None:
        options["k_starts"] = rule.starts
    if rule.ends is not None:
        options["k_lengths"] = rule.ends
    if rule.keys is not None:
        options["mask"] = rule.keys[:, None, None, :]
    if isinstance(rule.offset, Tensor):
        options["offset"] = rule.offset.to(device, torch.int32).expand(rule.batch)
    elif rule.causal or len(options) > 1:
        options["offset"] = rule.offset
    return options


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _eager_function(
    layer: type[nn.Module], names: tuple[str, ...]
) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """The family's own eager attention if it takes one of `names`, else None."""
    if (layer, names) not in _EAGER:
        modules = (sys.modules.get(cls.__module__) for cls in layer.__mro__)
        functions = (getattr(module, "eager_attention_forward", None) for module in modules)
        function = next((f for f in functions if f is not None), None)
        takes = function is not None and not set(names).isdisjoint(inspect.signature(function).parameters)
        _EAGER[layer, names] = function if takes else None
    return _EAGER[layer, names]


_EAGER: dict[tuple[type[nn.Module], tuple[str, ...]], Callable[..., tuple[Tensor, Tensor | None]] | None] = {}
