"""Pictures of a results.csv: speed over SDPA by case, time and memory against length, share of the peak."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

matplotlib.use("Agg")

Record = dict[str, str]
COLOURS = {"posattn": "tab:blue", "eager": "tab:red"}
PEER_COLOUR = "0.65"
# Names of variants are peer:encoding; what the peers are.
PEERS = {
    "posattn": "posattn's fused kernels",
    "eager": "plain PyTorch, the [T, T] matrix in memory",
    "sdpa": "torch's scaled_dot_product_attention, no bias",
    "sdpa-mask": "sdpa with the bias as a mask made beforehand",
    "sdpa-mask-build": "sdpa with the bias as a mask, built in the call",
    "sdpa-mask-grad": "sdpa with a mask that takes a gradient",
    "flex": "FlexAttention, compiled",
    "flash-attn": "the flash-attn package",
}


def plot_all(results: Path, out: Path) -> list[Path]:
    """The pictures that the rows of `results` allow, as PNG files in the folder `out`."""
    with results.open(newline="") as file:
        records = list(csv.DictReader(file))
    by_case: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_case[record["case"]].append(record)
    made = []
    compared = {name: rows for name, rows in by_case.items() if any(row["variant"] == "sdpa" for row in rows)}
    if compared:
        made.append(_plot_speeds(compared, out / "speed.png"))
    shares = [row for row in records if row["peer"] == "posattn" and float(row["share"]) > 0]
    if shares:
        made.append(_plot_shares(shares, out / "share.png"))
    lengths = [rows for rows in by_case.values() if len({row["q_len"] for row in rows}) > 1]
    if lengths:
        made.append(_plot_lengths(lengths, out / "length.png"))
    return made


def _plot_speeds(by_case: dict[str, list[Record]], path: Path) -> Path:
    """Speed over SDPA without a bias: longer is faster, the line is SDPA."""
    columns = min(3, len(by_case))
    rows = -(-len(by_case) // columns)
    key = _key(record["peer"] for records in by_case.values() for record in records)
    figure = Figure(figsize=(max(4.6 * columns, 7.0), 2.9 * rows + 0.2 * len(key) + 0.4), layout="constrained")
    figure.suptitle(
        "Speed of one call over that of sdpa (torch's scaled_dot_product_attention) with no bias: the line at 1\n"
        "bars: median; whiskers: 20th to 80th percentile; names: peer:encoding\n" + "\n".join(key),
        fontsize=8,
    )
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, records) in zip(grid, by_case.items()):
        base = next(float(r["median"]) for r in records if r["variant"] == "sdpa")
        shown = records[::-1]
        speeds = [base / float(r["median"]) for r in shown]
        # The spread is the variant's own: its 20th and 80th percentile over SDPA's median.
        low = [speed - base / float(r["p80"]) for speed, r in zip(speeds, shown)]
        high = [base / float(r["p20"]) - speed for speed, r in zip(speeds, shown)]
        colours = [COLOURS.get(r["peer"], PEER_COLOUR) for r in shown]
        labels = [r["variant"] for r in shown]
        axes.barh(labels, speeds, xerr=[low, high], color=colours, error_kw={"lw": 0.8})
        for place, (speed, above) in enumerate(zip(speeds, high)):
            axes.text(speed + above, place, f" {speed:.2f}", va="center", fontsize=7)
        axes.axvline(1.0, color="k", lw=0.8)
        axes.set_xlim(0, 1.15 * max(speed + above for speed, above in zip(speeds, high)))
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("times as fast as sdpa with no bias (the line)", fontsize=7)
    for axes in grid[len(by_case) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=110)
    return path


def _plot_shares(records: list[Record], path: Path) -> Path:
    """posattn's share of the peak that was measured in the same minutes."""
    figure = Figure(figsize=(7.0, 1.4 + 0.2 * len(records)), layout="constrained")
    figure.suptitle("posattn's kernels; names: case, then posattn:encoding; the case's name has its dtype", fontsize=8)
    axes = figure.subplots()
    shown = records[::-1]
    places = range(len(shown))
    for kind, what in (("fma", "FMA"), ("bf16dot", "BF16 dot product"), ("read", "read bandwidth")):
        bars = [(place, 100 * float(r["share"])) for place, r in zip(places, shown) if r["peak_kind"] == kind]
        if bars:
            axes.barh(*zip(*bars), label=what)
    axes.set_yticks(places, [f"{r['case']}  {r['variant']}" for r in shown], fontsize=7)
    axes.margins(y=0.01)
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the peak measured in the same minutes")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=110)
    return path


def _plot_lengths(cases: list[list[Record]], path: Path) -> Path:
    """Time over the square of the length, and megabytes over the length: both flat where the growth is as it should."""
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    figure.suptitle(
        "Names: case, peer:encoding. Flat is as it should be: time grows with the square of the length, memory with it",
        fontsize=8,
    )
    time_axes, memory_axes = figure.subplots(1, 2)
    for records in cases:
        label = f"{records[0]['case']} {records[0]['peer']}:{records[0]['encoding']}"
        lengths = [int(r["q_len"]) for r in records]
        timed = [(n, 1e9 * float(r["median"]) / n**2) for n, r in zip(lengths, records) if float(r["median"]) > 0]
        weighed = [(n, 1e3 * float(r["memory"]) / n) for n, r in zip(lengths, records) if float(r["memory"]) > 0]
        _line(time_axes, timed, label)
        _line(memory_axes, weighed, label)
    time_axes.set_ylabel("ns per query and key")
    memory_axes.set_ylabel("extra kB per token")
    for axes in (time_axes, memory_axes):
        if axes.lines:  # last, since setting a limit stops the axes from growing with what is drawn
            axes.set_ylim(0.0, 1.1 * axes.dataLim.ymax)
    figure.savefig(path, dpi=110)
    return path


def _key(peers: Iterable[str]) -> list[str]:
    """A line for each peer that is shown: what it is."""
    shown = set(peers)
    return [f"{name}: {what}" for name, what in PEERS.items() if name in shown]


def _line(axes: Axes, points: list[tuple[int, float]], label: str) -> None:
    """A line with its name above its middle."""
    if points:
        colour = f"C{len(axes.lines)}"
        axes.plot([n for n, _ in points], [value for _, value in points], marker="o", color=colour)
        n, value = points[len(points) // 2]
        axes.annotate(
            label,
            (n, value),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color=colour,
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("length")
