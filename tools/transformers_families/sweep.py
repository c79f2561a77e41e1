"""One family: its tiny model with eager attention and with posattn, what differs, and which way each mask went."""

from __future__ import annotations

import copy
import inspect
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModel, PreTrainedModel

import posattn.integrations.transformers as integration
from posattn.integrations.transformers import attention, masks
from tools.transformers_families.tiny import FITS, tiny_config

BATCH, TOKENS = 2, 13
ATTEMPTS = 2.0  # after so many seconds of the processor no other size is tried, after twice as many no other input
MOST_PARAMETERS = 40_000_000
TOLERANCE = 2e-5  # of outputs in float32 through two to eight layers of random weights


# Its recurrence reads the rows of padding too, where eager attention averages over keys that nothing sees, and torch's
# and ours give zeros: without padding all agree.
UNPADDED = ("recurrent_gemma",)


@dataclass
class Finding:
    """What was seen of a family. error is the largest difference from eager over the largest value."""

    family: str
    way: str = ""
    error: float | None = None
    reason: str = ""
    counts: Counter[str] = field(default_factory=Counter)


def look_at(family: str, kind: Any, convert: bool = False) -> Finding:
    """Run the family; what cannot be made or run with eager attention has its reason in the finding."""
    finding = Finding(family)
    try:
        eager, fit, inputs, expected = _made(kind)
    except Exception as problem:  # a family that no tiny size and no input of these fits
        finding.way, finding.reason = "not made", _line(problem)
        return finding
    try:
        config = tiny_config(kind, fit)
        config._attn_implementation = "posattn"
        model = AutoModel.from_config(config).eval()
    except Exception as problem:
        finding.way, finding.reason = "refuses the name", _line(problem)
        return finding
    model.load_state_dict(eager.state_dict())
    try:
        with watched(finding.counts):
            got = outputs(model, inputs)
    except Exception as problem:
        finding.way, finding.reason = "fails", _line(problem)
        return finding
    finding.error = difference(expected, got, inputs.get("attention_mask"))
    finding.way = way(finding.counts)
    return finding


def _made(kind: Any) -> tuple[PreTrainedModel, dict[str, int | None], dict[str, Any], dict[str, Tensor]]:
    """A model that runs with eager attention, how it is small, its inputs and outputs; the first problem if none."""
    first: Exception | None = None
    begun = time.process_time()
    for fit in FITS:
        if time.process_time() - begun > ATTEMPTS:
            break
        torch.manual_seed(0)
        try:
            config = tiny_config(kind, fit)
            config._attn_implementation = "eager"
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in AutoModel.from_config(config).parameters())
            if size > MOST_PARAMETERS:
                raise ValueError(f"{size} parameters are not few")
            eager = AutoModel.from_config(config).eval()
        except Exception as problem:
            first = first or problem
            continue
        spread(eager)
        for inputs in sample_inputs(eager):
            if time.process_time() - begun > 2 * ATTEMPTS:
                break
            try:
                expected = outputs(eager, inputs)
            except Exception as problem:
                first = first or problem
                continue
            if expected:
                return eager, fit, inputs, expected
    raise first or RuntimeError("no output of floating numbers")


def outputs(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)  # some families mask at random
    with torch.no_grad():
        return tensors(model(**copy.deepcopy(inputs)))


def _line(problem: Exception) -> str:
    text = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {text[0][:110]}" if text else type(problem).__name__


def way(counts: Counter[str]) -> str:
    fused, dense, own = counts["fused"], counts["dense"] + counts["eager function"], counts["own"]
    if fused + dense == 0:
        return "own attention, from the mask" if own else "own attention or none"
    name = "fused" if not dense else "dense" if not fused else "fused and dense"
    return f"{name}; own attention too" if own else name


@contextmanager
def watched(counts: Counter[str]) -> Any:
    """Count how attention is asked for while a model runs."""
    inside = []
    call, values, eager = attention.posattn.attention, masks.values_of, attention._eager_function

    def attend(q: Tensor, k: Tensor, v: Tensor, position: Any = None, **options: Any) -> Tensor:
        square = [x for x in (options.get("mask"), options.get("bias")) if x is not None and x.shape[-2] > 1]
        counts["dense" if square and q.shape[2] > 1 else "fused"] += 1
        return call(q, k, v, position, **options)

    def forward(*args: Any, **kwargs: Any) -> Any:
        inside.append(1)
        try:
            return integration.attention_forward(*args, **kwargs)
        finally:
            inside.pop()

    def values_of(mask: Any) -> Tensor:
        counts["dense values" if inside else "own"] += 1
        return values(mask)

    def eager_function(*args: Any) -> Any:
        found = eager(*args)
        counts["eager function"] += found is not None
        return found

    AttentionInterface.register("posattn", forward)
    try:
        with (
            mock.patch.object(attention.posattn, "attention", attend),
            mock.patch.object(masks, "values_of", values_of),
            mock.patch.object(attention, "_eager_function", eager_function),
        ):
            yield
    finally:
        integration.register()


def spread(model: PreTrainedModel) -> None:
    """Larger weights, so that attention is no average and a wrong mask shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.is_floating_point():
                parameter.normal_(0.0, 1.0 / max(parameter[0].numel(), 1) ** 0.5)


def sample_inputs(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Inputs by the names that the model takes, the likeliest first; what else it needs is made up by its name."""
    for inputs in _likely_inputs(model):
        if inputs:
            yield _completed(model, inputs)


def _completed(model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, and what the model needs beside them that its name tells."""
    generator = torch.Generator().manual_seed(2)
    main = inputs.get("input_ids", next(iter(inputs.values())))
    images = inputs.get("pixel_values", torch.zeros(BATCH, 3, 32, 32))
    made: dict[str, Any] = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.default is not parameter.empty or name in inputs:
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name.endswith("_ids"):
            made[name] = torch.randint(4, 100, (BATCH, TOKENS), generator=generator)
        elif name == "pixel_values_videos":
            made[name] = torch.randn(BATCH, 2, *images.shape[1:], generator=generator)
        elif "pixel_values" in name:
            made[name] = torch.randn(images.shape, generator=generator)
        elif name in ("input_features_mask", "padding_mask"):
            made[name] = torch.ones(main.shape[:2], dtype=torch.long)
        elif name == "inputs_embeds":
            made[name] = torch.randn(BATCH, TOKENS, model.config.hidden_size, generator=generator)
    return made | inputs


def _likely_inputs(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Token ids padded on the left, images, sound."""
    takes = inspect.signature(model.forward).parameters
    needs = {
        n for n, p in takes.items() if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    text: dict[str, Any] = {}
    if "input_ids" in takes:
        text["input_ids"] = torch.randint(4, 100, (BATCH, TOKENS), generator=generator)
        text["input_ids"][:, -1] = 2  # the end, where some families take a text's one vector from
        if "attention_mask" in takes:
            text["attention_mask"] = torch.ones(BATCH, TOKENS, dtype=torch.long)
            text["attention_mask"][0, : 0 if model.config.model_type in UNPADDED else 4] = 0
    if "decoder_input_ids" in takes:
        text["decoder_input_ids"] = torch.randint(4, 100, (BATCH, 7), generator=generator)
    if "bbox" in takes:
        text["bbox"] = torch.randint(0, 30, (BATCH, TOKENS, 2), generator=generator).sort(-1).values.repeat(1, 1, 2)
    vision = getattr(model.config, "vision_config", model.config)
    size = getattr(vision, "image_size", 32) or 32
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    channels = getattr(vision, "num_channels", 3)
    image = {"pixel_values": normal(BATCH, channels, height, width)}
    if model.main_input_name == "pixel_values" and "input_ids" not in needs:
        yield image
    if "inputs_embeds" in needs:
        yield {"inputs_embeds": normal(BATCH, TOKENS, model.config.hidden_size)}
    if text:
        yield text
        if "pixel_values" in takes:
            yield text | image
        if "decoder_input_ids" in text:
            yield {name: x for name, x in text.items() if name != "decoder_input_ids"}
    if "input_ids" in text:
        # A recurrent hybrid may know no padding, a cache of tiny layers no length.
        yield {"input_ids": text["input_ids"], "use_cache": False}
        yield {"input_ids": text["input_ids"]}
    if "pixel_values" in takes:
        yield image
        yield {"pixel_values": normal(BATCH, channels, 64, 64)}
        yield {"pixel_values": normal(BATCH, channels, 224, 224)}
        yield {"pixel_values": normal(BATCH, 8, channels, height, width)}
    if "grid_thw" in takes:
        side, patch = 4, getattr(model.config, "patch_size", 8)
        grid = torch.tensor([[1, side, side]] * BATCH)
        for temporal in (getattr(model.config, "temporal_patch_size", 1), 1):
            rows = normal(BATCH * side * side, channels * temporal * patch * patch)
            for name in ("hidden_states", "pixel_values"):
                if name in takes:
                    yield {name: rows, "grid_thw": grid}
    decoder = {name: x for name, x in text.items() if name == "decoder_input_ids"}
    if "input_values" in takes:
        yield {"input_values": normal(BATCH, 4000)} | decoder
        yield {"input_values": normal(BATCH, 1, 4000)}
        yield {"input_values": normal(BATCH, 1024, 128)}
        yield {"input_values": normal(BATCH, 64, getattr(model.config, "num_mel_bins", 80))} | decoder
    if "input_features" in takes:
        for bins in {getattr(model.config, "num_mel_bins", 80), 80, 128, 16}:
            for shape in ((BATCH, 128, bins), (BATCH, bins, 128), (BATCH, bins, 3000)):
                yield {"input_features": normal(*shape)} | decoder
                mask = {
                    name: torch.ones(BATCH, 128, dtype=torch.long) for name in ("attention_mask", "input_features_mask")
                }
                yield {"input_features": normal(*shape)} | {n: m for n, m in mask.items() if n in needs}
    if "past_values" in needs:
        yield {"past_values": normal(BATCH, 64, 1)}


def tensors(output: Any) -> dict[str, Tensor]:
    """The floating tensors of an output that attention decides, by name."""
    items = output.items() if hasattr(output, "items") else enumerate(output)
    skip = ("attentions", "cache", "past_key_values")
    found: dict[str, Tensor] = {}
    for name, value in items:
        if isinstance(value, Tensor) and value.is_floating_point() and not any(s in str(name) for s in skip):
            found[str(name)] = value
        elif isinstance(value, tuple) and not any(s in str(name) for s in skip):
            for i, part in enumerate(value):
                if isinstance(part, Tensor) and part.is_floating_point():
                    found[f"{name}.{i}"] = part
        elif hasattr(value, "items"):
            found |= {f"{name}.{inner}": x for inner, x in tensors(value).items()}
    return found


def difference(expected: dict[str, Tensor], got: dict[str, Tensor], seen: Tensor | None) -> float:
    worst = 0.0
    for name, a in expected.items():
        b = got.get(name)
        if b is None or a.shape != b.shape:
            return float("inf")
        if seen is not None and a.shape[:2] == seen.shape:
            a, b = a[seen.bool()], b[seen.bool()]
        alike = (a == b) | (a.isnan() & b.isnan())
        error = torch.where(alike, 0.0, (a.double() - b.double()).abs()).max() if a.numel() else torch.zeros(())
        worst = max(worst, (error / a[a.isfinite()].abs().max().clamp(min=1e-6)).item() if a.isfinite().any() else 0.0)
    return worst
