"""transformers' continuous batching, `generate_batch`, with posattn: requests as packed documents, no mask.

generate_batch takes three kinds of names: "paged|eager" and "sdpa", for which it makes one dense mask over all tokens
and keys of the requests, and any name with "flash" in it, which it gives bounds of the requests instead. A model cannot
be loaded under such a name unless a library of that name is installed, so it is set for the time of a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from posattn.integrations.transformers.attention import attention_forward
from posattn.integrations.transformers.masks import attention_mask

# No digit: transformers would take "flash" and a 2 or a 3 for the library of that version, and look for it.
_NAME = "posattn_flash"


@contextmanager
def continuous_batching(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """`model` ready for `generate_batch`, and as it was afterwards; one with `attn_implementation="posattn"`.

        with continuous_batching(model):
            results = model.generate_batch(inputs, generation_config)

    Raises:
        TypeError: not a model of transformers.
        ValueError: a model that does not run posattn.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a PreTrainedModel, got {type(model).__name__}")
    names = {path: config._attn_implementation for path, config in _configs(model.config)}
    if AttentionInterface().get(names[()]) is not attention_forward:
        raise ValueError(
            f'model: expected one with attn_implementation="posattn", got {names[()]!r}; model.set_attn_implementation'
        )
    AttentionInterface.register(_NAME, attention_forward)
    AttentionMaskInterface.register(_NAME, attention_mask)
    try:
        model.config._attn_implementation = _NAME
        yield model
    finally:
        for path, config in _configs(model.config):
            config._attn_implementation_internal = names[path]


def _configs(config: PreTrainedConfig, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A config and those inside it, by the names of the attributes that lead there."""
    yield path, config
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            yield from _configs(inner, (*path, name))
