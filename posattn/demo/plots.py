"""The demo's pictures: perplexity against length, and what each trained encoding adds to the logits."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
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
TICKS = range(0, MAP_LENGTH + 1, TRAIN_LENGTH)


def plot_perplexity(perplexity: dict[str, dict[int, float]], path: Path) -> None:
    """`perplexity` by encoding and length; both axes logarithmic."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    ends: list[tuple[float, str, str]] = []
    for name, marker in zip(perplexity, "osD^vP*X"):
        points = perplexity[name]
        colour = f"C{len(ends)}"
        axes.plot(list(points), list(points.values()), marker=marker, color=colour)
        ends.append((list(points.values())[-1], name, colour))
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
    axes.spines[["top", "right"]].set_visible(False)
    label_ends(axes, ends, max(lengths))
    figure.savefig(path, dpi=120)


@torch.no_grad()
def plot_biases(models: dict[str, Decoder], text: Tensor, path: Path) -> None:
    """One row an encoding, as trained, in the first layer; DAPE's is computed on the first bytes of `text`."""
    figure = Figure(figsize=(2.5 * COLUMNS, 2.15 * len(models) + 0.7), layout="constrained")
    figure.suptitle(
        f"What each trained encoding does in the first layer, to the first {MAP_LENGTH} bytes held out\n"
        f"colour: added to the logit (RoPE, which adds nothing: the cosine by which a pair turns); training saw "
        f"distances below {TRAIN_LENGTH}\ncolour limits leave out the outer 2% on either side; white: keys after "
        "their query, which are hidden",
        fontsize=9,
    )
    grid = figure.subplots(len(models), COLUMNS, squeeze=False)
    future = torch.ones(MAP_LENGTH, MAP_LENGTH, dtype=torch.bool).triu(1)
    for row, (name, model) in zip(grid, models.items()):
        what, maps = effective_bias(model, text[:MAP_LENGTH].long())
        unit = "cosine" if what == "pair" else "added to the logit"
        for axes, index in zip(row, torch.linspace(0, len(maps) - 1, COLUMNS).long().tolist()):
            values = maps[index]
            seen = values[~future]
            image = axes.imshow(
                values.masked_fill(future, torch.nan).numpy(),
                vmin=seen.quantile(0.02).item(),
                vmax=seen.quantile(0.98).item(),
                interpolation="nearest",
            )
            axes.set_title(f"{name}, {what} {index}", fontsize=8)
            axes.set_xticks(TICKS)
            axes.set_yticks(TICKS)
            axes.tick_params(labelsize=6)
            bar = figure.colorbar(image, ax=axes, shrink=0.8)
            bar.ax.tick_params(labelsize=6)
            bar.ax.ticklabel_format(useOffset=False)
            bar.set_label(unit, fontsize=6)
    figure.supxlabel("key position, bytes", fontsize=9)
    figure.supylabel("query position, bytes", fontsize=9)
    figure.savefig(path, dpi=110)


def label_ends(axes: Axes, ends: list[tuple[float, str, str]], last: float) -> None:
    """Each line's name at its end, in its colour; those of lines that end close together are moved apart. `axes` has a
    logarithmic scale in y."""
    low, high = (math.log(bound) for bound in axes.get_ylim())
    step = 0.055 * (high - low)
    place = -math.inf
    for value, name, colour in sorted(ends):
        place = max(place + step, math.log(value))
        axes.annotate(
            name,
            (last, math.exp(place)),
            xytext=(8, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=9,
            annotation_clip=False,
        )


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
