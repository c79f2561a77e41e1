"""convert(model): what the name of an attention implementation does not reach."""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from transformers import PreTrainedConfig

from posattn.integrations.transformers.alibi import convert_alibi
from posattn.integrations.transformers.gpt_neo import convert_gpt_neo
from posattn.integrations.transformers.t5 import convert_t5

Model = TypeVar("Model", bound=nn.Module)

# Attention that no operand of a plan expresses yet.
_WAITING = {
    "DisentangledSelfAttention": "DeBERTa's disentangled attention needs relative keys, an operand that posattn does "
    "not have yet",
}


def convert(model: Model) -> Model:
    """Make a model of transformers attend by posattn, its attention that is no interface's included. In place.

    T5, mT5, UMT5 and those built like them (LongT5's decoder, Pop2Piano, Pix2Struct's text, Switch Transformers) get
    their biases as tables over the distance, O(N), and none [Tq, Tk] for attention to the encoder. BLOOM, MPT, Falcon
    (rotary or ALiBi) and GPT-Neo get posattn for attention of their own. The weights are the modules' own, and get the
    gradients; state_dict and save_pretrained give what they gave before. Other families lose and gain nothing but the
    name: what uses the interface is fused, what has attention of its own keeps it.

    Returns:
        The model.

    Raises:
        TypeError: not a module of PyTorch.
        ValueError: a family that waits for an operand (DeBERTa), unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    for module in model.modules():
        reason = _WAITING.get(type(module).__name__)
        if reason is not None:
            raise ValueError(f"model: {type(model).__name__} cannot be converted: {reason}; it runs as it is")
    convert_t5(model)
    convert_alibi(model)
    convert_gpt_neo(model)
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            config._attn_implementation = "posattn"
    return model
