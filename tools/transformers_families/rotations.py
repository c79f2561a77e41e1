"""Whether from_hf gives a family's own rotation: the logits of its functions beside those of the encoding."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from posattn import MRoPE, RoPE
from posattn.integrations.transformers import from_hf

TOKENS = 9


def layer_types(config: PreTrainedConfig) -> list[str | None]:
    """The kinds of layers whose positions differ; [None] if all are alike; none without rotations."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [name for name, value in rope.items() if isinstance(value, dict)] or ([None] if rope else [])


def disagreement(config: PreTrainedConfig, layer_type: str | None) -> float | None:
    """The largest difference of q k^T over its largest value; None where the family's functions are not to be found."""
    encoding = from_hf(config, layer_type)
    if encoding is None:
        return None
    if not isinstance(encoding, (RoPE, MRoPE)):
        raise TypeError(f"config: expected one with rotations, got {type(encoding).__name__}")
    name = type(config).__module__.replace("configuration_", "modeling_")
    family = importlib.import_module(name)
    rotate = _function(family, config)
    classes = [
        item
        for label, item in vars(family).items()
        if inspect.isclass(item) and "RotaryEmbedding" in label and "Vision" not in label and item.__module__ == name
    ]
    if rotate is None or not classes:
        return None
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, TOKENS, encoding.head_dim, generator=generator).unbind()
    embedding = _first(classes, config)
    positions = torch.arange(TOKENS)[None]
    options = {"layer_type": layer_type} if "layer_type" in inspect.signature(embedding.forward).parameters else {}
    if isinstance(encoding, MRoPE):
        ids = torch.stack([positions, 2 * positions, positions + 3])
        encoding, angles = encoding.at(ids), embedding(q, ids, **options)
    else:
        angles = embedding(q, positions, **options)
    own_q, own_k = _rotated(rotate, q, k, angles)
    expected = own_q @ own_k.mT
    got = encoding.rotate(q) @ encoding.rotate(k).mT
    return float((expected - got).abs().max() / expected.abs().max())


def _function(family: Any, config: Any) -> Any:
    names = ["apply_rotary_pos_emb", "apply_rotary_emb", "apply_multimodal_rotary_pos_emb"]
    if getattr(config, "rope_interleave", False):
        names.insert(0, "apply_rotary_pos_emb_interleave")
    return next((getattr(family, name) for name in names if hasattr(family, name)), None)


def _first(classes: list[Any], config: PreTrainedConfig) -> Any:
    problem: Exception | None = None
    for item in classes:
        try:
            return item(config)
        except Exception as error:  # that of another part of a composite model
            problem = error
    raise problem or ValueError("no class")


def _rotated(rotate: Any, q: Tensor, k: Tensor, angles: Any) -> tuple[Tensor, Tensor]:
    """By the family's function, which takes (q, k, cos, sin), (x, cos, sin) or complex numbers for [B, T, H, D]."""
    if isinstance(angles, Tensor) and angles.is_complex():
        turned = rotate(q.transpose(1, 2), k.transpose(1, 2), angles)
        return turned[0].transpose(1, 2), turned[1].transpose(1, 2)
    cos, sin = angles
    if "k" not in inspect.signature(rotate).parameters:
        return rotate(q, cos, sin), rotate(k, cos, sin)
    try:
        out = rotate(q, k, cos, sin)
    except RuntimeError:  # the family cuts what turns from what passes in its attention
        width = cos.shape[-1]
        part = rotate(q[..., :width], k[..., :width], cos, sin)
        out = tuple(torch.cat([a, b[..., width:]], -1) for a, b in zip(part, (q, k)))
    return out[0], out[1]
