"""What an encoding adds to the logits of the last query, by head and key: DAPE's for several inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import posattn
from posattn.experiments.model import Transformer
from posattn.experiments.statistics import distance_trend

matplotlib.use("Agg")

COLUMNS = 256  # of a picture: keys are averaged in as many groups


@dataclass(frozen=True)
class Added:
    """`values` [H, T]: what `label` adds to the logits of the last of T tokens in layer `layer`."""

    label: str
    layer: int
    values: Tensor

    def trends(self) -> list[float]:
        """By head: below 0 it is local, above 0 anti-local."""
        return [distance_trend(row.tolist()) for row in self.values.double().cpu()]


@torch.no_grad()
def added(model: Transformer, tokens: Tensor, label: str) -> list[Added]:
    """For each layer, what its encoding adds to the logits of the last of `tokens` [T]; none for a rotary one.

    DAPE adds its bias and its network's correction, which depend on the tokens. Memory is O(T).
    """
    model.eval()
    found = []
    x = model.embed(tokens[None])
    for index, block in enumerate(model.layers()):
        attention = block.attention
        encoding = attention.encoding
        if isinstance(encoding, posattn.DAPE) and encoding.inner is not None and encoding.form == "concat-residual":
            q, k, _ = attention.split(block.norm_attention(x))
            logits = (q[0, :, -1:] @ k[0].transpose(-1, -2))[:, 0] * q.shape[-1] ** -0.5  # [H, T]
            bias = encoding.inner.bias(1, len(tokens))[:, 0].to(logits)
            found.append(Added(label, index, bias + encoding.mlp(torch.cat([logits, bias]).T).T))
        elif encoding is not None and encoding.has_bias:
            found.append(Added(label, index, encoding.bias(1, len(tokens))[:, 0]))
        x = block(x)
    return found


def draw(rows: Sequence[Added], title: str) -> Figure:
    """A picture a row: heads down, keys across, each head from its own smallest to its own largest value."""
    figure = Figure(figsize=(8.0, 1.25 * len(rows) + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axes, row in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows):
        heads, keys = row.values.shape
        values = _grouped(row.values.float().cpu().numpy())
        low, high = values.min(1, keepdims=True), values.max(1, keepdims=True)
        image = axes.imshow(
            (values - low) / np.maximum(high - low, 1e-12),
            aspect="auto",
            interpolation="nearest",
            extent=(0, keys, heads - 0.5, -0.5),
        )
        axes.set_title(row.label, fontsize=8, loc="left")
        axes.set_ylabel("head", fontsize=8)
        axes.set_yticks(range(heads), [str(head) if head % 2 == 0 else "" for head in range(heads)])
        axes.tick_params(labelsize=7)
        if row is rows[-1]:
            axes.set_xlabel(f"key position; the query is at {keys - 1}", fontsize=8)
        else:
            axes.set_xticklabels([])
    bar = figure.colorbar(image, ax=figure.axes, location="top", ticks=(0, 1), shrink=0.5, aspect=50)
    bar.ax.set_xticklabels(["a head's least", "a head's most"], fontsize=7)
    bar.set_label("added to the logit", fontsize=8)
    return figure


def draw_lines(groups: Iterable[Sequence[Added]], head: int, title: str) -> Figure:
    """One head of one layer over the keys: a panel a group, a line each of its members."""
    groups = list(groups)
    figure = Figure(figsize=(8.0, 2.3 * len(groups) + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axes, group in zip(figure.subplots(len(groups), squeeze=False)[:, 0], groups):
        for row in group:
            values = _grouped(row.values[head : head + 1].float().cpu().numpy())[0]
            places = np.linspace(0, row.values.shape[1] - 1, len(values))
            axes.plot(places, values, linewidth=0.9, label=row.label)
        axes.set_ylabel("added to the logit", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.axes[-1].set_xlabel("key position", fontsize=8)
    return figure


def _grouped(values: np.ndarray) -> np.ndarray:
    """Means [H, at most COLUMNS] of neighbouring keys."""
    keys = values.shape[1]
    if keys <= COLUMNS:
        return values
    edges = np.linspace(0, keys, COLUMNS + 1).astype(int)
    return np.add.reduceat(values, edges[:-1], axis=1) / np.diff(edges)
