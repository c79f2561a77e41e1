"""`posattn plot`: what an encoding does to the logits, a map a head; and pictures of attention weights."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from posattn import reference, targets
from posattn.arguments import Parser, writable_file
from posattn.encodings.base import Context, Encoding
from posattn.errors import ArgumentValueError
from posattn.parity import positions_for
from posattn.plan import Bias, Call, Mask, Plan


@dataclass(frozen=True)
class Maps:
    """values [n, Tq, Tk], float64, a panel each with its name; `caption` says what the values are."""

    values: Tensor
    panels: tuple[str, ...]
    caption: str


@torch.no_grad()
def maps_of(position: Encoding, num_heads: int, head_dim: int, tokens: int, seed: int = 0) -> Maps:
    """What `position` does to the logits of `tokens` queries and keys.

    A bias is shown as it is. What depends on the logits (DAPE) is shown for those of normal random q and k. A rotary
    encoding adds nothing: for four of its pairs of dimensions, from the first to the last, the cosine of the angle
    between an equal query and key once they are turned.
    """
    position = position.double()
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, num_heads, tokens, head_dim, dtype=torch.float64, generator=generator) for _ in range(2))
    places = {name: value[None] for name, value in positions_for(position, tokens, tokens).items()}
    plan = position.lower(Context.of(q, k, Mask(), **places))
    where = "; segments of three tokens" if places else ""
    if (
        plan.rotary is not None
        and not (plan.mix or plan.gated or plan.relative or plan.bias)
        and plan.amplitude is None
    ):
        turns: tuple[Tensor, ...] = (plan.rotary.q_cos, plan.rotary.q_sin, plan.rotary.k_cos, plan.rotary.k_sin)
        count = turns[0].shape[-1]
        pairs = torch.linspace(0, count - 1, min(count, 4)).long()
        if turns[0].dim() == 4:  # heads differ: a pair of each of them
            heads = torch.arange(len(pairs)) % num_heads
            turns = tuple(x[0].repeat_interleave(num_heads // x.shape[1], 0) for x in turns)
            q_cos, q_sin, k_cos, k_sin = (x[heads, :, pairs] for x in turns)
            panels = [f"head {head}, pair {pair} of {count}" for head, pair in zip(heads.tolist(), pairs.tolist())]
        else:
            q_cos, q_sin, k_cos, k_sin = (x[0].T[pairs] for x in turns)
            panels = [f"pair {pair} of {count}" for pair in pairs.tolist()]
        cosines = q_cos[:, :, None] * k_cos[:, None] + q_sin[:, :, None] * k_sin[:, None]
        sizes = q_cos**2 + q_sin**2
        grown = "" if torch.allclose(sizes, sizes[:, :1]) else ", times what they grow by"
        caption = f"adds nothing; colour: cosine of the angle between equal q and k after their turns{grown}{where}"
        return Maps(cosines, tuple(panels), caption)
    if plan.places is not None:
        places = {"q_positions": plan.places.q, "k_positions": plan.places.k}
    call = Call(q, k, k, plan, Mask(), head_dim**-0.5, **places)
    before = replace(call, plan=Plan(rotary=plan.rotary, bias=Bias()))
    added = reference.call_logits(call) - reference.call_logits(before)
    caption = "colour: what is added to the logit"
    if plan.mix or plan.gated or plan.relative or plan.amplitude is not None:
        caption += ", which depends on the logits: here of random q and k"
    if plan.rotary is not None:
        caption += "; not shown: q and k are turned too"
    return Maps(added[0], tuple(f"head {head}" for head in range(num_heads)), caption + where)


def draw(maps: Maps, title: str, path: Path) -> None:
    """Write the maps as a picture, a colour scale a panel. ImportError without matplotlib; ValueError for a file name
    that ends in no format it knows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    count = maps.values.shape[0]
    columns = min(count, 4)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(3.1 * columns, 2.9 * rows + 0.8), layout="constrained")
    known = figure.canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in known:
        raise ArgumentValueError(
            f"--out: expected a file name that ends in one of {', '.join(known)}, got {path.name!r}"
        )
    grid = figure.subplots(rows, columns, squeeze=False)
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="0.85")
    for panel, axes in enumerate(grid.flat):
        if panel >= count:
            axes.axis("off")
            continue
        values = maps.values[panel]
        image = axes.imshow(values.masked_fill(values.isinf(), math.nan).numpy(), cmap=colours, interpolation="nearest")
        axes.set_title(maps.panels[panel], fontsize=9)
        axes.tick_params(labelsize=7)
        bar = figure.colorbar(image, ax=axes, shrink=0.75)
        bar.ax.tick_params(labelsize=7)
        bar.ax.ticklabel_format(useOffset=False)
    forbidden = "; grey: forbidden" if maps.values.isinf().any() else ""
    figure.suptitle(f"{title}\n{maps.caption}{forbidden}", fontsize=10)
    figure.supxlabel("key position", fontsize=9)
    figure.supylabel("query position", fontsize=9)
    figure.savefig(path, dpi=120)


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
    parser = Parser(
        prog="posattn plot",
        description=__doc__,
        epilog="posattn plot my_module:MyEncoding    draws an encoding of yours",
    )
    parser.add_argument(
        "encoding",
        metavar="ENCODING",
        nargs="?",
        help="a name that --list shows; or module:name or file.py:name, where name is an encoding, its class or a "
        "function that makes it",
    )
    parser.add_argument("--list", action="store_true", help="list the encodings")
    parser.add_argument("--out", type=writable_file, help="the picture (default: ENCODING.png)")
    parser.add_argument("--heads", type=int, default=4, help="heads (%(default)s)")
    parser.add_argument("--head-dim", type=int, default=64, help="head dimension (%(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens on each side (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what starts at random (%(default)s)")
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    if options.list:
        print("\n".join(targets.examples_of(options, parser, every=True)))
        return 0
    if options.encoding is None:
        parser.error("ENCODING: expected a name (--list shows them) or module:name, got none")
    found = targets.chosen(options, parser)
    if options.out is not None and len(found) > 1:
        parser.error(f"--out: expected one encoding with it, got {', '.join(found)} of {options.encoding}")
    for name, position in found.items():
        path = options.out or Path(f"{name.replace(' ', '-')}.png")
        maps = maps_of(position, position.num_heads or options.heads, options.head_dim, options.tokens, options.seed)
        try:
            draw(maps, f"{name}, as it is initialised", path)
        except ModuleNotFoundError as error:
            print(f"posattn plot needs {error.name}: pip install matplotlib tqdm", file=sys.stderr)
            return 1
        except ArgumentValueError as error:
            parser.error(str(error))
        print(path)
    return 0
