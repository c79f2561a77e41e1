"""The page and the JSON of a session's findings."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from posattn.gpu.items import STAGES, Item
from posattn.gpu.session import again

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 64rem; margin: 0 auto; padding: 1rem; }
.wide { overflow-x: auto; } pre { overflow-x: auto; background: #f4f4f4; padding: .5rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } .bad { color: #b00020; font-weight: 700; }
"""


def write(folder: Path, about: Mapping[str, Any], items: Sequence[Item], found: Mapping[str, dict[str, Any]]) -> Path:
    """report.json and report.html in `folder`; the page's path."""
    left = [item.name for item in items if item.name not in found]
    data = {"about": dict(about), "left": left, "items": list(found.values())}
    (folder / "report.json").write_text(json.dumps(data, indent=1))
    path = folder / "report.html"
    path.write_text(page(about, items, found))
    return path


def page(about: Mapping[str, Any], items: Sequence[Item], found: Mapping[str, dict[str, Any]]) -> str:
    """One page, with nothing that is read from elsewhere."""
    by_stage = {stage: [item for item in items if item.stage == stage] for stage in STAGES}
    parts = [f"<p>{_text(', '.join(f'{key} {value}' for key, value in about.items()))}</p>", "<h2>All</h2>"]
    states = ("done", "failed", "error", "skipped")
    rows = []
    for stage, mine in by_stage.items():
        counts = [sum(found.get(item.name, {}).get("state") == state for item in mine) for state in states]
        rows.append([stage, *counts, len(mine) - sum(counts)])
    parts.append(table(["", *states, "left"], rows))
    parts += _failures(items, found)
    parts += _skips(found)
    for stage, heading, columns, cells in _TABLES:
        done = [found[item.name] for item in by_stage[stage] if found.get(item.name, {}).get("state") == "done"]
        rows = [row for one in done for row in cells(one)]
        if rows:
            parts += [f"<h2>{heading}</h2>", table(columns, rows)]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>posattn on a GPU</title>'
        f"<style>{_STYLE}</style></head><body><h1>posattn on a GPU</h1>\n{body}\n</body></html>\n"
    )


def table(columns: Iterable[Any], rows: Iterable[Sequence[Any]]) -> str:
    def line(cells: Iterable[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    return (
        '<div class="wide"><table>' + line(columns, "th") + "".join(line(row, "td") for row in rows) + "</table></div>"
    )


def _text(value: Any) -> str:
    return html.escape("" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value))


def _failures(items: Sequence[Item], found: Mapping[str, dict[str, Any]]) -> list[str]:
    bad = [item for item in items if found.get(item.name, {}).get("state") in ("failed", "error")]
    parts = [f'<h2 class="bad">{len(bad)} went wrong</h2>'] if bad else []
    for item in bad:
        one = found[item.name]
        why = one.get("traceback") or one.get("why") or "\n".join(one.get("wrong") or one.get("lines") or [])
        parts.append(f"<h3>{_text(item.name)}</h3><pre>{_text(again(item))}\n\n{_text(why)}</pre>")
    return parts


def _skips(found: Mapping[str, dict[str, Any]]) -> list[str]:
    why: dict[str, int] = {}
    for one in found.values():
        if one["state"] == "skipped":
            why[one["why"]] = why.get(one["why"], 0) + 1
    return ["<h2>Left out</h2>", table(["why", "items"], list(why.items()))] if why else []


def _parity_rows(one: dict[str, Any]) -> list[list[Any]]:
    _, backend, dtype, name = one["item"].split("/")
    return [[name, backend, dtype, one["worst"], one["of_allowed"]]]


def _bench_rows(one: dict[str, Any]) -> list[list[Any]]:
    _, mode, length, dim, _ = one["item"].split("/")
    sdpa = next((row["ms"] for row in one["rows"] if row["variant"] == "sdpa"), None)
    return [
        [row["variant"], mode, length, dim, row["ms"], None if sdpa is None else sdpa / row["ms"], row["share"]]
        for row in one["rows"]
    ]


def _tuning_rows(one: dict[str, Any]) -> list[list[Any]]:
    _, mode, dim, name = one["item"].split("/")
    return [[name, mode, dim, one["shipped_ms"], one["tuned_ms"], one["gain"]]]


def _cycles_rows(one: dict[str, Any]) -> list[list[Any]]:
    _, backend, which, dim, operand = one["item"].split("/")
    return [
        [operand, backend, which, dim, one["ms"], one["clock_mhz"], one["cycles"], one["modelled"], one["over_model"]]
    ]


_RULE = ["encoding or option", "backend", "dtype", "worst of", "of what the rule allows"]
_TABLES = (
    ("parity", "Parity", _RULE, _parity_rows),
    ("options", "Options", _RULE, _parity_rows),
    ("bench", "Times", ["", "pass", "N", "D", "ms", "over SDPA", "of the peak"], _bench_rows),
    ("tuning", "Tiles", ["", "pass", "D", "shipped, ms", "tuned, ms", "gain"], _tuning_rows),
    (
        "cycles",
        "Cycles of a 64 x 64 tile, beside the static model's",
        ["operand", "backend", "pass", "D", "ms", "clock, MHz", "cycles", "modelled", "over the model"],
        _cycles_rows,
    ),
)
