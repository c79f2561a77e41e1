"""One HTML page and one JSON file of all that an output folder holds: tables, tests, pictures, settings, machine."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from posattn.experiments.chomsky_tasks import TASKS
from posattn.experiments.contestants import DECODERS, ENCODERS, PAIRS
from posattn.experiments.published import PERPLEXITY
from posattn.experiments.statistics import (
    accuracy_table,
    losses_frame,
    paired,
    perplexity_table,
)

matplotlib.use("Agg")

TEMPLATE = Path(__file__).with_name("report.html.jinja")
MARKERS = "osD^vP*Xhd<>p8"


def write(out: Path) -> Path:
    """report.html and report.json in `out`, from the finished runs below it; the page's path. ValueError if there are
    none."""
    data = collect(out)
    if not any(data[part] for part in ("extrapolation", "chomsky", "ablations")):
        raise ValueError(f"out: expected a folder with finished experiments, got {out}")
    (out / "report.json").write_text(json.dumps(data, indent=1))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string(TEMPLATE.read_text()).render(**sections(data, out))
    path = out / "report.html"
    path.write_text(page)
    return path


def collect(out: Path) -> dict[str, Any]:
    """All results below `out`, and what `machine.json`, `speed.json` and `heatmaps.json` say."""

    def results(part: str, order: Sequence[str]) -> list[dict[str, Any]]:
        found = [json.loads(path.read_text()) for path in (out / part).rglob("result.json")]
        return sorted(found, key=lambda result: (order.index(result["contestant"]), result["seed"]))

    def one(name: str) -> Any:
        path = out / name
        return json.loads(path.read_text()) if path.exists() else None

    ablations = [
        json.loads(path.read_text()) | {"size": _size_of(path.relative_to(out / "ablations"))}
        for path in sorted((out / "ablations").rglob("result.json"))
    ]
    return {
        "about": one("about.json"),
        "extrapolation": results("extrapolation", list(DECODERS)),
        "speed": one("speed.json"),
        "chomsky": results("chomsky", list(ENCODERS)),
        "ablations": ablations,
        "heatmaps": one("heatmaps.json"),
        "curves": _curves(out / "extrapolation"),
    }


def _size_of(path: Path) -> str:
    """A run of a size lies one folder deeper: size/length/variant/seed/result.json."""
    return path.parts[0] if len(path.parts) == 5 else ""


def _curves(folder: Path) -> list[dict[str, Any]]:
    """Training losses in at most 100 means, of the first seed of each contestant."""
    found = []
    paths = folder.glob("*/*/seed0/metrics.jsonl")
    for path in sorted(paths, key=lambda path: (int(path.parts[-4]), list(DECODERS).index(path.parts[-3]))):
        losses = [json.loads(line)["loss"] for line in path.read_text().splitlines()]
        step = max(1, len(losses) // 100)
        means = [sum(losses[i : i + step]) / len(losses[i : i + step]) for i in range(0, len(losses), step)]
        name, length = path.parts[-3], int(path.parts[-4])
        found.append({"train_length": length, "contestant": name, "every": step, "losses": means})
    return found


def sections(data: dict[str, Any], out: Path) -> dict[str, Any]:
    """What the template shows."""
    shown: dict[str, Any] = {"about": data["about"], "extrapolation": [], "chomsky": None, "ablations": None}
    losses = losses_frame(data["extrapolation"])
    for train_length, here in losses.groupby("train_length"):
        table = perplexity_table(here)
        curves = [curve for curve in data["curves"] if curve["train_length"] == train_length]
        shown["extrapolation"].append(
            {
                "train_length": train_length,
                "table": grid(table, "contestant", "length", "perplexity", "half_width", lowest=True),
                "picture": picture(perplexity_figure(table, int(train_length))),
                "curves": picture(curves_figure(curves)) if curves else None,
                "tests": _tests(here, int(train_length)),
                "published": _published(table, int(train_length)),
            }
        )
    shown["speed"] = data["speed"]
    if data["chomsky"]:
        accuracy = accuracy_table(data["chomsky"])
        accuracy["task"] = accuracy["task"].map(lambda task: task + (" †" if TASKS[task].permutable else ""))
        order = [name + (" †" if task.permutable else "") for name, task in TASKS.items()]
        accuracy = accuracy.sort_values("task", key=lambda names: names.map(order.index), kind="stable")
        shown["chomsky"] = {
            "best": grid(accuracy, "task", "contestant", "best", None, lowest=False, digits=1),
            "mean": grid(accuracy, "task", "contestant", "mean", None, lowest=False, digits=1),
            "seeds": int(accuracy["seeds"].max()),
            "picture": picture(accuracy_figure(data["chomsky"])),
        }
    if data["ablations"]:
        named = [
            result | {"contestant": ", ".join(filter(None, (result["size"], result["contestant"])))}
            for result in data["ablations"]
        ]
        table = perplexity_table(losses_frame(named))
        shown["ablations"] = grid(table, "contestant", "length", "perplexity", "half_width", lowest=True)
    shown["heatmaps"] = data["heatmaps"]
    shown["heatmap_pictures"] = [
        embedded((out / name).read_bytes()) for name in ("heatmaps.png", "heads.png") if (out / name).exists()
    ]
    return shown


def grid(
    table: pd.DataFrame, row: str, column: str, value: str, half: str | None, lowest: bool, digits: int = 2
) -> dict[str, Any]:
    """`columns`, and `rows` of a name and cells (text, whether it is the best); the best of a column is marked, or of a
    row where high is good."""
    columns, names = list(dict.fromkeys(table[column])), list(dict.fromkeys(table[row]))
    cells = {(one[row], one[column]): one for one in table.to_dict("records")}
    rows = []
    for name in names:
        found = []
        for place in columns:
            one = cells.get((name, place))
            if one is None:
                found.append(("", False))
                continue
            across = [(other, place) for other in names] if lowest else [(name, other) for other in columns]
            values = [cells[key][value] for key in across if key in cells]
            text = number(one[value], digits)
            if half is not None and not math.isnan(one[half]):
                text += f" ± {number(one[half], digits)}"
            found.append((text, one[value] == (min(values) if lowest else max(values))))
        rows.append((name, found))
    return {"columns": columns, "rows": rows}


def number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if value < 1000 else f"{value:.2e}"


def _tests(losses: pd.DataFrame, train_length: int) -> list[dict[str, Any]]:
    there = set(losses["contestant"])
    return [
        {"first": first, "second": second, "length": length, "within": length <= train_length}
        | {"test": paired(losses, first, second, length)}
        for first, second in PAIRS
        if {first, second} <= there
        for length in sorted(set(losses["length"]))
    ]


def _published(table: pd.DataFrame, train_length: int) -> list[dict[str, Any]]:
    """Orderings: who is lower at a length in the article, and who is here; only of pairs that both have."""
    ours = {(one["contestant"], one["length"]): one["perplexity"] for one in table.to_dict("records")}
    theirs = PERPLEXITY.get(train_length, {})
    rows = []
    for i, first in enumerate(theirs):
        for second in list(theirs)[i + 1 :]:
            for length in theirs[first].keys() & theirs[second].keys():
                if (first, length) in ours and (second, length) in ours:
                    lower = min((first, second), key=lambda name: theirs[name][length])
                    here = min((first, second), key=lambda name: ours[name, length])
                    figures = f"{first} {theirs[first][length]}, {second} {theirs[second][length]}"
                    rows.append({"length": length, "theirs": lower, "ours": here, "figures": figures})
    return sorted(rows, key=lambda row: row["length"])


def perplexity_figure(table: pd.DataFrame, train_length: int) -> Figure:
    """Perplexity by input length, both logarithmic, with intervals."""
    figure = Figure(figsize=(8.0, 4.6), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(table["contestant"]))
    for index, name in enumerate(names):
        rows = table[table["contestant"] == name]
        axes.errorbar(
            rows["length"],
            rows["perplexity"],
            yerr=rows["half_width"].fillna(0.0),
            marker=MARKERS[index % len(MARKERS)],
            markersize=4,
            linewidth=1,
            capsize=2,
            color=f"C{index % 10}",
            linestyle="-" if index < 10 else "--",
            label=name,
        )
    axes.axvline(train_length, color="0.6", linestyle=":", zorder=0)
    axes.text(train_length, 1.01, "trained to here", transform=axes.get_xaxis_transform(), color="0.4", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted(set(table["length"]))
    axes.set_xticks(lengths, [str(length) for length in lengths])
    _plain_numbers(axes)
    axes.set_xlabel("input length, bytes")
    axes.set_ylabel("perplexity of the last bytes")
    _legend(axes)
    return figure


def curves_figure(curves: Sequence[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(8.0, 3.6), layout="constrained")
    axes = figure.subplots()
    for index, curve in enumerate(curves):
        steps = [curve["every"] * (i + 0.5) for i in range(len(curve["losses"]))]
        style = "-" if index < 10 else "--"
        axes.plot(steps, curve["losses"], style, linewidth=0.9, color=f"C{index % 10}", label=curve["contestant"])
    axes.set_xlabel("training step (first seed)")
    axes.set_ylabel("loss, nats a byte")
    _legend(axes)
    return figure


def accuracy_figure(results: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy by length, a panel a task, the best seed of each contestant."""
    tasks = [task for task in TASKS if any(result["task"] == task for result in results)]
    names = list(dict.fromkeys(result["contestant"] for result in results))
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(2.9 * columns, 2.1 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axes, task in zip(panels, tasks):
        for index, name in enumerate(names):
            runs = [r["accuracies"] for r in results if r["task"] == task and r["contestant"] == name]
            if runs:
                best = max(runs, key=lambda accuracies: sum(accuracies.values()))
                lengths = [int(length) for length in best]
                axes.plot(lengths, [100 * x for x in best.values()], linewidth=1, color=f"C{index % 10}", label=name)
        classes = TASKS[task].answers
        axes.axhline(100 / classes, color="0.6", linestyle=":", linewidth=0.8)
        axes.set_title(task, fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    figure.supxlabel("length (dotted: guessing among all classes)", fontsize=8)
    figure.supylabel("symbols right, %", fontsize=8)
    return figure


def _plain_numbers(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    ticks = [mantissa * 10.0**power for power in range(-1, 8) for mantissa in (1, 2, 5)]
    shown = [tick for tick in ticks if low <= tick <= high]
    if len(shown) < 2:  # too narrow for round numbers
        shown = [float(f"{low + (high - low) * i / 4:.4g}") for i in range(5)]
    if len(shown) > 8:
        shown = [tick for tick in shown if math.log10(tick) % 1 == 0]
    axes.set_yticks(shown, [f"{tick:g}" for tick in shown])


def _legend(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def picture(figure: Figure) -> str:
    """The figure as a data address."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return embedded(buffer.getvalue())


def embedded(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
