"""Tiny models in twos, eager attention beside posattn on the same weights, and what they differ by."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

import posattn.integrations.transformers  # noqa: F401 - registers the name
from tools.transformers_families.sweep import spread

logging.set_verbosity_error()

SMALL: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
TOKENS = 21
IDS = torch.randint(3, 90, (2, TOKENS), generator=torch.Generator().manual_seed(0))


def padded(**hidden: slice) -> Tensor:
    """A 2-D mask; row0= and row1= give what is hidden of each."""
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    for name, part in hidden.items():
        mask[int(name[3:]), part] = 0
    return mask


PADDINGS = {
    "none": None,
    "left": padded(row0=slice(0, 5)),
    "right": padded(row1=slice(-6, None)),
    "holes": padded(row0=slice(7, 9), row1=slice(0, 2)),
}


def pair(
    config: PretrainedConfig, auto: Any = AutoModelForCausalLM, reference: str = "eager", name: str = "posattn"
) -> tuple[nn.Module, nn.Module]:
    """(reference, posattn), in eval mode; weights large enough that a wrong mask shows."""
    torch.manual_seed(0)
    first = auto.from_config(copy.deepcopy(config), attn_implementation=reference).eval()
    spread(first)
    second = auto.from_config(copy.deepcopy(config), attn_implementation=name).eval()
    second.load_state_dict(first.state_dict())
    return first, second


def disagreement(first: nn.Module, second: nn.Module, **inputs: Any) -> tuple[float, float]:
    """The largest difference of outputs, and of gradients, each over the largest value of its kind."""
    outputs, gradients = [], []
    for model in (first, second):
        model.zero_grad()
        out = model(**inputs)
        out = out.logits if hasattr(out, "logits") else out.last_hidden_state
        seen = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
        if seen is not None and seen.shape == out.shape[:2]:
            out = out[seen.bool()]
        out.pow(2).mean().backward()
        outputs.append(out.detach())
        gradients.append(
            {n.removeprefix("_orig_mod."): p.grad for n, p in model.named_parameters() if p.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(g.abs().max() for g in gradients[0].values())
    worst = max((gradients[0][n] - gradients[1][n]).abs().max() for n in gradients[0])
    return float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()), float(worst / largest)


def generated(model: nn.Module, padding: Tensor | None, **options: Any) -> Tensor:
    return model.generate(
        IDS, attention_mask=padding, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, **options
    )
