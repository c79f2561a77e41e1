"""`posattn plot`: a heat map per head of what an encoding adds to the logits; and pictures of attention weights."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from posattn.attention import attention
from posattn.encodings.base import Encoding
from posattn.errors import ArgumentValueError
from posattn.parity import examples_of, positions_for


@torch.no_grad()
def effective_bias(position: Encoding, num_heads: int, head_dim: int, tokens: int) -> Tensor:
    """What `position` adds to the logits of identical tokens (q = k = 1), float64 [H, T, T].

    For an additive encoding that is its bias; for a rotary one what turning does to <1, 1>; for DAPE the bias with its
    correction. The logits are read back from attention over one-hot values: log(softmax) + log-sum-exp.
    """
    ones = torch.ones(1, num_heads, tokens, head_dim, dtype=torch.float64)
    values = torch.eye(tokens, dtype=torch.float64).expand(1, num_heads, -1, -1)

    def logits(encoding: Encoding | None) -> Tensor:
        weights, lse = attention(
            ones, ones, values, encoding, return_lse=True, **positions_for(encoding, tokens, tokens)
        )
        return (weights.log() + lse[..., None])[0]

    return logits(position) - logits(None)


def draw(bias: Tensor, title: str, path: Path) -> None:
    """Write [H, T, T] as a picture, one panel a head, all on one colour scale. ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heads = bias.shape[0]
    columns = min(heads, 4)
    rows = math.ceil(heads / columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(3 * columns, 2.8 * rows), squeeze=False, layout="constrained"
    )
    finite = bias[bias.isfinite()]
    low, high = finite.min().item(), finite.max().item()
    for head, axes in enumerate(grid.flat):
        if head >= heads:
            axes.axis("off")
            continue
        image = axes.imshow(bias[head].numpy(), vmin=low, vmax=high, cmap="viridis")
        axes.set_title(f"head {head}", fontsize=9)
    figure.suptitle(title)
    figure.supxlabel("key position")
    figure.supylabel("query position")
    figure.colorbar(image, ax=grid, label="added to the logit")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_weights(
    weights: Tensor, path: Path | str, *, rows: Sequence[int] | None = None, heads: Sequence[int] | None = None
) -> None:
    """Write attention weights, `posattn.weights`'s [1, heads, rows, Tk] or [heads, rows, Tk], as a picture.

    One panel a head, on one colour scale from 0: a line for each row where there are up to three, else a map.

    Args:
        weights: of one sequence.
        path: the picture.
        rows, heads: what the rows and heads are called, where they are not 0, 1, ...

    Raises:
        ValueError: weights of several sequences, or another number of names than of rows or heads.
        ImportError: without matplotlib.
    """
    if weights.dim() == 4 and weights.shape[0] == 1:
        weights = weights[0]
    if weights.dim() != 3 or not weights.numel():
        raise ArgumentValueError(
            f"weights: expected [heads, rows, keys] of one sequence, none of them 0, got {list(weights.shape)}"
        )
    names = {"heads": heads, "rows": rows}
    for (name, given), count in zip(names.items(), weights.shape):
        if given is not None and len(given) != count:
            raise ArgumentValueError(f"{name}: expected {count} names, got {len(given)}")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = weights.detach().float().cpu().numpy()
    count, queries, keys = shown.shape
    columns = min(count, 4)
    size = (3.2 * columns, 2.6 * math.ceil(count / columns))
    figure, grid = pyplot.subplots(
        math.ceil(count / columns), columns, figsize=size, squeeze=False, layout="constrained", sharex=True, sharey=True
    )
    row_names = [str(row) for row in (range(queries) if rows is None else rows)]
    top = max(float(shown.max()), 1e-12)
    for head, axes in enumerate(grid.flat):
        if head >= count:
            axes.axis("off")
            continue
        axes.set_title(f"head {head if heads is None else heads[head]}", fontsize=9)
        if queries <= 3:
            for row, line in zip(row_names, shown[head]):
                axes.plot(range(keys), line, linewidth=1, label=f"query {row}")
            axes.set_ylim(0, 1.05 * top)
        else:
            image = axes.imshow(shown[head], vmin=0, vmax=top, cmap="viridis", aspect="auto", interpolation="nearest")
            ticks = range(0, queries, max(queries // 6, 1))
            axes.set_yticks(list(ticks), [row_names[row] for row in ticks])
    figure.supxlabel("key")
    if queries <= 3:
        figure.supylabel("weight")
        grid[0, 0].legend(fontsize=8, frameon=False)
    else:
        figure.supylabel("query")
        figure.colorbar(image, ax=grid, label="weight")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw one encoding; 0 when written, 1 without matplotlib."""
    parser = argparse.ArgumentParser(prog="posattn plot", description=__doc__)
    parser.add_argument("encoding", metavar="ENCODING", help="a name that --list shows", nargs="?")
    parser.add_argument("--list", action="store_true", help="list the encodings")
    parser.add_argument("--out", type=Path, help="the picture (default: ENCODING.png)")
    parser.add_argument("--heads", type=int, default=4, help="heads (%(default)s)")
    parser.add_argument("--head-dim", type=int, default=64, help="head dimension (%(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens on each side (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters that start at random (%(default)s)")
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    catalogue = examples_of(options, parser)
    if options.list:
        print("\n".join(catalogue))
        return 0
    found = {name.lower(): name for name in catalogue}
    name = found.get((options.encoding or "").lower())
    if name is None:
        parser.error(f"ENCODING: expected one of {', '.join(catalogue)}, got {options.encoding!r}")
    path = options.out or Path(f"{name.replace(' ', '-')}.png")
    bias = effective_bias(catalogue[name], options.heads, options.head_dim, options.tokens)
    try:
        draw(bias, f"{name}, as it is initialised", path)
    except ModuleNotFoundError as error:
        print(f"posattn plot needs {error.name}: pip install 'posattn[plot]'", file=sys.stderr)
        return 1
    print(path)
    return 0
