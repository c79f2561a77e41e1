"""The pictures of docs/lab/scale.md, and its tables between their marks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from posattn.distributed.cost import LINKS, METHODS, Cost, Work, cost, impossible
from tools.scale_model.machines import HEAD_DIM, machine

DOCS = Path(__file__).resolve().parents[2] / "docs" / "lab"
RANKS = tuple(2**n for n in range(3, 13))
TOKENS = tuple(2**n for n in range(17, 27))
# A layer of a model with 8 key heads for 32 query heads; and the same with a key head for each.
GROUPED = Work(8, 1, 32, 8, 2**20, HEAD_DIM, HEAD_DIM)
WHOLE = replace(GROUPED, kv_heads=32)
NETS = ("nvlink", "infiniband", "ethernet")
COLOURS = {"ring": "tab:blue", "all_gather": "tab:orange", "ulysses": "tab:green"}
NAMES = {"ring": "ring", "all_gather": "all-gather", "ulysses": "Ulysses"}
LIMIT = 40e9  # bytes of a rank that one layer's attention may take


def costs(work: Work, net: str, chip: str = "H100", encoding: str = "none") -> dict[str, Cost]:
    """By method, what can do the work."""
    kernels = machine(chip, encoding)
    return {m: cost(m, work, LINKS[net], kernels) for m in METHODS if impossible(m, work) is None}


def winner(work: Work, net: str, limit: float = LIMIT) -> str | None:
    """The method of the least time of those whose memory fits; None if none does."""
    fitting = {m: c for m, c in costs(work, net).items() if c.memory <= limit}
    return min(fitting, key=lambda m: fitting[m].seconds) if fitting else None


def draw() -> None:
    DOCS.mkdir(exist_ok=True)
    _maps(DOCS / "scale-winners.svg")
    _lines(DOCS / "scale-time.svg")
    page = DOCS / "scale.md"
    text = page.read_text()
    for name, table in (("time", _times()), ("balance", _balance())):
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, rest = text.split(start)
        text = before + start + table + end + rest.split(end)[1]
    page.write_text(text)


def _amount(n: float) -> str:
    return f"{n / 2**20:.0f} M" if n >= 2**20 else f"{n / 2**10:.0f} K"


def _maps(picture: Path) -> None:
    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    for row, (title, work) in enumerate((("8 key heads", GROUPED), ("32 key heads", WHOLE))):
        for column, net in enumerate(NETS):
            axes = figure.add_subplot(2, 3, 3 * row + column + 1)
            for x, ranks in enumerate(RANKS):
                for y, tokens in enumerate(TOKENS):
                    found = winner(replace(work, ranks=ranks, tokens=tokens), net)
                    axes.bar(x, 1, 1, y - 0.5, color=COLOURS.get(found or "", "0.85"), edgecolor="white", linewidth=0.5)
            axes.set_xticks(range(0, len(RANKS), 3), [str(n) for n in RANKS[::3]])
            axes.set_yticks(range(0, len(TOKENS), 3), [_amount(n) for n in TOKENS[::3]])
            axes.set_xlim(-0.5, len(RANKS) - 0.5)
            axes.set_ylim(-0.5, len(TOKENS) - 0.5)
            axes.set_title(f"{net}, {title}", fontsize=10)
            axes.set_xlabel("ranks" if row else "")
            axes.set_ylabel("" if column else "tokens")
    patches = [Patch(color=COLOURS[m], label=NAMES[m]) for m in METHODS]
    patches.append(Patch(color="0.85", label=f"more than {LIMIT / 1e9:.0f} GB a rank"))
    figure.legend(handles=patches, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(picture, metadata={"Date": None})


def _lines(picture: Path) -> None:
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    efficiency, memory, hidden = figure.subplots(1, 3)
    for net, style in zip(NETS, ("-", "--", ":")):
        for method in METHODS:
            points = [(p, costs(replace(WHOLE, ranks=p), net).get(method)) for p in RANKS]
            seen = [(p, c) for p, c in points if c is not None]
            alone = costs(replace(WHOLE, ranks=1), net)["ring"].kernels
            label = f"{NAMES[method]}, {net}"
            ranks = [p for p, _ in seen]
            _line(efficiency, ranks, [alone / p / c.seconds for p, c in seen], method, style, label)
            if net == "infiniband":
                _line(memory, ranks, [c.memory / 1e9 for _, c in seen], method, "-", NAMES[method])
        shown = [costs(replace(WHOLE, ranks=64, tokens=t), net)["ring"].hidden for t in TOKENS]
        _line(hidden, TOKENS, shown, "ring", style, net)
    for axes, title, x in (
        (efficiency, "Time of one rank / P / time, 1 M tokens", "ranks"),
        (memory, "GB a rank, 1 M tokens", "ranks"),
        (hidden, "Share of a ring's messages hidden, 64 ranks", "tokens"),
    ):
        axes.set_xscale("log", base=2)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(x)
        axes.legend(fontsize=6, frameon=False)
        axes.grid(alpha=0.3)
    ticks = TOKENS[::3]
    hidden.set_xticks(ticks, [_amount(t) for t in ticks])
    for axes in (efficiency, memory):
        axes.set_xticks(RANKS[::3], [str(p) for p in RANKS[::3]])
    for axes in (efficiency, hidden):
        axes.set_ylim(0, 1.05)
    memory.set_yscale("log")
    figure.savefig(picture, metadata={"Date": None})


def _line(axes: Axes, x: object, y: list[float], method: str, style: str, label: str) -> None:
    axes.plot(x, y, style, color=COLOURS[method], label=label, linewidth=1.3)  # type: ignore[arg-type]


def _times() -> str:
    """Markdown: a layer's milliseconds, GB a rank and hidden share, by ranks and tokens, over InfiniBand."""
    lines = [
        "| tokens | ranks | kernels, ms | ring, ms (hidden) | all-gather, ms | Ulysses, ms | GB a rank: ring, gather |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for tokens, ranks in ((2**17, 8), (2**20, 8), (2**20, 32), (2**20, 256), (2**23, 64), (2**26, 512), (2**26, 4096)):
        found = costs(replace(WHOLE, ranks=ranks, tokens=tokens), "infiniband")
        ring, gather, ulysses = (found.get(m) for m in METHODS)
        assert ring is not None
        assert gather is not None
        last = "" if ulysses is None else f"{1e3 * ulysses.seconds:.0f}"
        lines.append(
            f"| {_amount(tokens)} | {ranks} | {1e3 * ring.kernels:.0f} | {1e3 * ring.seconds:.0f} ({ring.hidden:.0%}) "
            f"| {1e3 * gather.seconds:.0f} | {last} | {ring.memory / 1e9:.1f}, {gather.memory / 1e9:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _balance() -> str:
    """Markdown: contiguous shards' time over a zigzag's, under a causal mask."""
    lines = ["| ranks | " + " | ".join(map(str, RANKS[::3])) + " |", "| --- |" + " --- |" * len(RANKS[::3])]
    cells = []
    for ranks in RANKS[::3]:
        work = replace(WHOLE, ranks=ranks, tokens=2**17 * ranks)
        one, other = (costs(replace(work, layout=layout), "infiniband")["ring"] for layout in ("contiguous", "zigzag"))
        cells.append(f"{one.seconds / other.seconds:.2f}")
    lines.append("| contiguous / zigzag | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
