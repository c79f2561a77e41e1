"""DAPE's ablations: hidden width, form, f(B) against f(A, B), and model sizes, as extrapolations of other models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from posattn.experiments import contestants
from posattn.experiments.extrapolation import Setting, perplexities, run_one
from posattn.experiments.presets import Preset

# Of the sizes; the widths and forms are those of the preset's own size.
BY_SIZE = ("Kerple", "form concat-residual")


def run_all(preset: Preset, seeds: int, setting: Setting, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Every variant and seed at the first training length, then Kerple and DAPE-Kerple by size; a line each."""
    variants = contestants.ablations(preset.ablation.widths)
    given = preset.extrapolation
    length = min(given.training)
    results = []
    for seed in range(seeds):
        for name in names or variants:
            results.append(run_one(name, length, seed, given, setting, variants) | {"size": "", "variant": name})
            print(f"{name:24s} seed {seed}: {perplexities(results[-1])}", flush=True)
        for size, shape in preset.ablation.shapes.items():
            sized = replace(given, shape=shape)
            there = replace(setting, out=setting.out / size)
            for name in BY_SIZE if names is None else ():
                result = run_one(name, length, seed, sized, there, variants)
                results.append(result | {"size": size, "variant": name})
                print(f"{size}, {name:24s} seed {seed}: {perplexities(result)}", flush=True)
    return results
