"""The README's figure: time and memory of a training step beside torch's, from the figures in docs/figures/.

python -m tools.site.figure measure     # this processor: writes attention.json, then draws (minutes)
python -m tools.site.figure draw        # attention.svg from attention.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import torch

from posattn.bench import runner
from posattn.bench.cases import Case, Variant
from posattn.bench.report import environment

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "figures"
DATA, PICTURE = FOLDER / "attention.json", FOLDER / "attention.svg"
LENGTHS = (512, 1024, 2048, 4096, 8192)
# torch's bias is a [1, 12, T, T] mask, its gradient another: 8192 would take more than this machine has.
LONGEST_MASK = 4096
DTYPES = ("float32", "bfloat16")
LINES = {
    "sdpa-mask-build:Kerple": ("torch, learned bias as a mask", "tab:red", "o"),
    "sdpa": ("torch, no position at all", "0.5", "s"),
    "posattn:Kerple": ("posattn, learned bias (Kerple)", "tab:blue", "o"),
    "posattn:ALiBi learnable": ("posattn, learned ALiBi", "tab:cyan", "^"),
}


def measure() -> None:
    """Time every line in turn, then weigh each in a process of its own. Kept: medians with spread, and megabytes."""
    threads = torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES:
        for length in LENGTHS:
            case = Case(f"{dtype}-{length}", _variants(length), mode="both", dtype=dtype, q_len=length, k_len=length)
            rows += [asdict(row) for row in runner.run_case(case, "cpu", threads, print)]
            print(case.name, *(f"{row['variant']} {1e3 * row['median']:.1f} ms" for row in rows[-len(LINES) :]))
    for length in LENGTHS:
        case = Case(f"memory-{length}", _variants(length), mode="both", q_len=length, k_len=length, memory=True)
        rows += [asdict(row) for row in runner.run_case(case, "cpu", threads, print)]
    kept = ("variant", "dtype", "q_len", "batch", "heads", "head_dim", "threads", "median", "p20", "p80", "memory")
    data = {
        "environment": environment("cpu") | {"processor": processor()},
        "rows": [{key: _number(row[key]) for key in kept} for row in rows],
    }
    DATA.write_text(json.dumps(data, indent=1) + "\n")


def _variants(length: int) -> tuple[Variant, ...]:
    variants = [
        Variant("posattn", "Kerple"),
        Variant("posattn", "ALiBi learnable"),
        Variant("sdpa"),
        Variant("sdpa-mask-build", "Kerple"),
    ]
    return tuple(v for v in variants if length <= LONGEST_MASK or v.peer != "sdpa-mask-build")


def _number(value: Any) -> Any:
    """Four digits are more than the measurement has; NaN is not JSON."""
    if not isinstance(value, float):
        return value
    return None if value != value else float(f"{value:.4g}")


def processor() -> str:
    """The processor by its numbers: virtual machines often give no name that tells one from another."""
    text = Path("/proc/cpuinfo").read_text()

    def field(name: str) -> str:
        found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
        return found[1] if found else "unknown"

    name = re.sub(r"\((R|TM)\)| Processor| CPU", "", field("model name")).strip()
    features = [f for f, flag in (("AVX-512", "avx512f"), ("AMX", "amx_bf16")) if flag in field("flags").split()]
    numbers = ", ".join([f"family {field('cpu family')}", f"model {field('model')}", *features])
    return f"{name} ({numbers}), {os.cpu_count()} cores"


def series(rows: list[dict[str, Any]], variant: str, key: str, dtype: str = "float32") -> dict[int, float]:
    """`key` by length, for one line of the figure."""
    return {
        row["q_len"]: row[key]
        for row in rows
        if row["variant"] == variant and row["dtype"] == dtype and row[key] is not None
    }


def draw(picture: Path = PICTURE) -> None:
    """Three panels over the length: time beside torch's without a position, in either dtype, and megabytes.

    Times are shown as ratios: those of one length were taken in turn, those of two lengths minutes apart.
    """
    data = json.loads(DATA.read_text())
    rows, about = data["rows"], data["environment"]
    with matplotlib.rc_context({"svg.hashsalt": "posattn", "font.size": 9}):
        figure = Figure(figsize=(10.0, 3.7), layout="constrained")
        *speeds, memory = figure.subplots(1, 3)
        for axes, dtype in zip(speeds, DTYPES):
            base = series(rows, "sdpa", "median", dtype)
            for variant in LINES:
                times = series(rows, variant, "median", dtype)
                _line(axes, variant, {n: times[n] / base[n] for n in times})
            axes.set_title(f"time, {dtype}, over torch's with no position", fontsize=9)
            axes.set_yticks([0.25, 0.5, 1, 2, 4, 8, 16], ["1/4", "1/2", "1", "2", "4", "8", "16"])
        for variant in LINES:
            _line(memory, variant, series(rows, variant, "memory"))
        memory.set_title("memory beyond q, k, v, float32, MB", fontsize=9)
        memory.set_yticks([10, 100, 1000], ["10", "100", "1000"])
        for axes in (*speeds, memory):
            axes.set_xlabel("tokens")
            axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS], fontsize=7)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        handles, labels = memory.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
        shape = f"B = {rows[0]['batch']}, H = {rows[0]['heads']}, D = {rows[0]['head_dim']}, causal"
        threads = f"{rows[0]['threads']} thread" + ("s" if rows[0]["threads"] > 1 else "")
        figure.supxlabel(
            f"Forward and backward of one attention call, {shape}. {about['processor']}, {threads}, "
            f"torch {about['torch'].split('+')[0]}.",
            fontsize=8,
        )
        figure.savefig(picture, metadata={"Date": None})


def _line(axes: Axes, variant: str, points: dict[int, float]) -> None:
    label, colour, marker = LINES[variant]
    axes.loglog(list(points), list(points.values()), color=colour, marker=marker, ms=4, lw=1.5, label=label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "draw"))
    if parser.parse_args().what == "measure":
        measure()
    draw()


if __name__ == "__main__":
    main()
