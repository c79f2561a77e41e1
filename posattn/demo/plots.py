"""The demo's pictures: perplexity against length, and what each trained encoding adds to the logits."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from torch import Tensor

import posattn
from posattn.demo.model import Decoder
from posattn.demo.train import TRAIN_LENGTH
from posattn.encodings.base import Context
from posattn.plan import Mask

matplotlib.use("Agg")

COLUMNS = 4
MAP_LENGTH = 2 * TRAIN_LENGTH


def plot_perplexity(perplexity: dict[str, dict[int, float]], path: Path) -> None:
    """`perplexity` by encoding and length; both axes logarithmic."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, marker in zip(perplexity, "osD^vP*X"):
        points = perplexity[name]
        axes.plot(list(points), list(points.values()), marker=marker, label=name)
    axes.axvline(TRAIN_LENGTH, color="0.6", linestyle=":", zorder=0)
    axes.text(TRAIN_LENGTH, 0.98, " training length", transform=axes.get_xaxis_transform(), color="0.4", va="top")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({length for points in perplexity.values() for length in points})
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.set_xlabel("input length, bytes")
    axes.set_ylabel("perplexity of the last 256 bytes")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


@torch.no_grad()
def plot_biases(models: dict[str, Decoder], text: Tensor, path: Path) -> None:
    """One row an encoding, as trained, in the first layer; DAPE's is computed on the first bytes of `text`."""
    figure = Figure(figsize=(2.1 * COLUMNS, 2.0 * len(models)), layout="constrained")
    grid = figure.subplots(len(models), COLUMNS, squeeze=False)
    future = torch.ones(MAP_LENGTH, MAP_LENGTH, dtype=torch.bool).triu(1)
    for row, (name, model) in zip(grid, models.items()):
        what, maps = effective_bias(model, text[:MAP_LENGTH].long())
        for axes, index in zip(row, torch.linspace(0, len(maps) - 1, COLUMNS).long().tolist()):
            values = maps[index]
            seen = values[~future]
            image = axes.imshow(
                values.masked_fill(future, torch.nan).numpy(),
                vmin=seen.quantile(0.02).item(),
                vmax=seen.quantile(0.98).item(),
                interpolation="nearest",
            )
            axes.set_title(f"{what} {index}", fontsize=8)
            axes.set_xticks([])
            axes.set_yticks([])
            figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=6)
        row[0].set_ylabel(f"{name}\nquery")
    for axes in grid[-1]:
        axes.set_xlabel("key")
    figure.savefig(path, dpi=110)


def effective_bias(model: Decoder, tokens: Tensor) -> tuple[str, Tensor]:
    """What the first layer's encoding adds to the logits of `tokens` [T], as maps [n, T, T], and what n counts.

    An additive encoding's is its bias by head; DAPE's is the bias and its correction, which the text decides; a rotary
    one adds nothing, so the cosine by which it turns a pair is shown, from the fastest pair to the slowest.
    """
    first = model.layers()[0]
    encoding = first.attention.encoding
    q, k, _ = first.attention.split(first.norm_attention(model.embedding(tokens[None])))
    logits = (q @ k.transpose(-1, -2))[0] * q.shape[-1] ** -0.5
    plan = encoding.lower(Context.of(q, k, Mask()))
    if plan.rotary is not None:
        cos, sin = plan.rotary.q_cos[0].T, plan.rotary.q_sin[0].T
        maps = cos[:, :, None] * cos[:, None, :] + sin[:, :, None] * sin[:, None, :]
        what = "pair"
    elif isinstance(encoding, posattn.DAPE) and encoding.inner is not None:
        bias = encoding.inner.bias(*logits.shape[-2:])
        maps = bias + encoding.mlp(torch.cat([logits, bias]).movedim(0, -1)).movedim(-1, 0)
        what = "head"
    else:
        maps = encoding.bias(*logits.shape[-2:])
        what = "head"
    return what, maps
