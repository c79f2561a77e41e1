"""`posattn experiments`: what the articles about positional encodings claim, at a size for the machine at hand.

extrapolation trains decoders on short text and scores them on long, chomsky trains encoders on formal languages,
ablations varies DAPE, speed times training and reading beside eager attention, heatmaps draws what encodings add;
report writes one page of all that is in the folder, and all does everything. A run that was stopped goes on where it
was.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import posattn
from posattn import backends
from posattn.arguments import Parser, positive, readable_file
from posattn.demo import corpus
from posattn.experiments import ablations, chomsky, extrapolation, heatmaps, report, speed
from posattn.experiments.chomsky_tasks import TASKS
from posattn.experiments.contestants import DECODERS, ENCODERS
from posattn.experiments.extrapolation import Setting
from posattn.experiments.presets import PRESETS, Preset
from posattn.experiments.runs import OtherSettings

PARTS = ("extrapolation", "speed", "chomsky", "ablations", "heatmaps", "report")
LOCAL = 0.2  # of Spearman's correlation, from which a head counts as local or anti-local


def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="posattn experiments", description=__doc__, formatter_class=raw)
    parser.add_argument("part", choices=(*PARTS, "all"), help="what to do")
    parser.add_argument("--preset", choices=PRESETS, default="laptop", help="sizes (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("experiments-out"), help="folder of the runs (%(default)s)")
    parser.add_argument("--seeds", type=positive, help="how many (the preset's)")
    parser.add_argument("--steps", type=positive, help="of every training (the preset's)")
    parser.add_argument("--encodings", help=f"some of {', '.join(dict.fromkeys((*DECODERS, *ENCODERS)))}; split by ;")
    parser.add_argument("--tasks", help=f"some of {', '.join(TASKS)}; split by ;")
    parser.add_argument("--train-length", type=positive, action="append", help="some of the preset's, may be repeated")
    parser.add_argument("--text", type=readable_file, help="learn this file (default: the standard library's source)")
    parser.add_argument("--backend", default="auto", choices=("auto", *backends.NAMES), help="posattn's (%(default)s)")
    parser.add_argument("--device", default="cpu", help="of torch (%(default)s)")
    parser.add_argument("--remark", action="append", default=[], help="a sentence for the report, may be repeated")
    given = parser.parse_args(argv)
    parser.folder("--out", given.out)
    preset = _preset(given)
    decoders = _chosen(parser, "--encodings", given.encodings, DECODERS, ENCODERS)
    encoders = _chosen(parser, "--encodings", given.encodings, ENCODERS, DECODERS)
    tasks = _chosen(parser, "--tasks", given.tasks, TASKS, ())
    lengths = given.train_length or list(preset.extrapolation.training)
    unknown = [str(length) for length in lengths if length not in preset.extrapolation.training]
    if unknown:
        known = ", ".join(map(str, preset.extrapolation.training))
        parser.error(f"--train-length: expected some of {known}, got {', '.join(unknown)}")
    try:
        torch.empty(0, device=given.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device: expected one that torch has here, got {given.device!r}: {str(error).splitlines()[0]}")
    try:
        _do(given, preset, decoders, encoders, tasks, lengths)
    except (corpus.TooShort, OtherSettings) as error:
        parser.error(f"--{error}")
    except ValueError as error:
        if not str(error).startswith("out:"):
            raise
        parser.error(f"--{error}")
    return 0


def _do(
    given: argparse.Namespace,
    preset: Preset,
    decoders: list[str],
    encoders: list[str],
    tasks: list[str],
    lengths: list[int],
) -> None:
    began = time.monotonic()
    longest = max(preset.extrapolation.lengths)
    text = corpus.load(given.text, shortest=longest + 1)
    settings = (text, given.backend, given.device)
    setting = Setting(given.out / "extrapolation", *settings)

    def do_speed() -> None:
        length, long = min(lengths), preset.extrapolation.lengths[len(preset.extrapolation.lengths) // 2]
        rows = speed.tokens_per_second(preset.extrapolation, length, long, decoders, given.backend, given.device)
        found = {"train_length": length, "long": long, "rows": rows}
        (given.out / "speed.json").write_text(json.dumps(found, indent=1))

    work: dict[str, Callable[[], object]] = {
        "extrapolation": lambda: extrapolation.run_all(preset.extrapolation, decoders, preset.seeds, lengths, setting),
        "speed": do_speed,
        "chomsky": lambda: chomsky.run_all(
            preset.chomsky, tasks, encoders, preset.seeds, given.out / "chomsky", given.backend, given.device
        ),
        "ablations": lambda: ablations.run_all(preset, preset.seeds, Setting(given.out / "ablations", *settings)),
        "heatmaps": lambda: draw_heatmaps(preset, decoders, max(lengths), setting, given.out),
    }
    for part in PARTS[:-1] if given.part == "all" else (given.part,):
        if part in work:
            work[part]()
    _write_about(given, preset, time.monotonic() - began)
    if given.part in ("all", "report"):
        print(f"{report.write(given.out)}")


def draw_heatmaps(preset: Preset, names: Sequence[str], train_length: int, setting: Setting, out: Path) -> None:
    """heatmaps.png, heads.png and heatmaps.json, from the first seed's models trained at `train_length`."""
    given = preset.extrapolation
    tokens = min(8192, max(given.lengths))
    text = setting.text.held_out
    places = [0, (len(text) - tokens) // 2, len(text) - tokens]
    first_layer, groups, heads = [], [], []
    for name in names:
        contestant = DECODERS[name]
        run = extrapolation.run_of(name, train_length, 0, given, setting)
        if contestant.trained_as is not None or run.weights() is None:
            continue
        model = extrapolation.trained(name, contestant, given, setting, run)
        inputs = places if name.startswith("DAPE") else places[:1]
        group = []
        for number, place in enumerate(inputs):
            label = name if len(inputs) == 1 else f"{name}, input {number + 1}"
            found = heatmaps.added(model, text[place : place + tokens].long().to(setting.device), label)
            if not found:
                continue
            group.append(found[0])
            trends = [trend for layer in found for trend in layer.trends()]
            local, anti = sum(trend < -LOCAL for trend in trends), sum(trend > LOCAL for trend in trends)
            heads.append(
                {"label": label, "local": local, "anti_local": anti, "neither": len(trends) - local - anti}
                | {"trends": trends}
            )
        first_layer += group
        if group:
            groups.append(group)
    if not first_layer:
        print("heatmaps: no trained model that adds to the logits; run extrapolation first")
        return
    title = f"First layer, trained at {train_length}: what is added to the logits"
    heatmaps.draw(first_layer, title).savefig(out / "heatmaps.png", dpi=110)
    head = given.shape.heads // 2
    heatmaps.draw_lines(groups, head, f"{title}, head {head}").savefig(out / "heads.png", dpi=110)
    (out / "heatmaps.json").write_text(json.dumps({"query": tokens - 1, "heads": heads}, indent=1))


def _preset(given: argparse.Namespace) -> Preset:
    preset = PRESETS[given.preset]
    if given.seeds is not None:
        preset = replace(preset, seeds=given.seeds)
    if given.steps is not None:
        training = {n: replace(one, steps=given.steps) for n, one in preset.extrapolation.training.items()}
        preset = replace(
            preset,
            extrapolation=replace(preset.extrapolation, training=training),
            chomsky=replace(preset.chomsky, training=replace(preset.chomsky.training, steps=given.steps)),
        )
    return preset


def _chosen(parser: Parser, option: str, text: str | None, known: Collection[str], also: Collection[str]) -> list[str]:
    """Those of `known` that the option names, in its order; names of `also` belong to another part."""
    if text is None:
        return list(known)
    names = [name.strip() for name in text.split(";")]
    unknown = [name for name in names if name not in known and name not in also]
    if unknown:
        parser.error(f"{option}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return [name for name in names if name in known]


def _write_about(given: argparse.Namespace, preset: Preset, seconds: float) -> None:
    """about.json: the settings and the machine; minutes and remarks add up over calls."""
    path = given.out / "about.json"
    before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"minutes": 0.0, "remarks": []}
    about = {
        "preset": preset.name,
        "seeds": preset.seeds,
        "machine": _processor() if given.device == "cpu" else torch.cuda.get_device_name(given.device),
        "threads": torch.get_num_threads(),
        "posattn": posattn.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "minutes": before["minutes"] + seconds / 60,
        "remarks": list(dict.fromkeys([*before["remarks"], *given.remark])),
    }
    path.write_text(json.dumps(about, indent=1))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _commit() -> str:
    """Of the checkout that this runs from, if it does."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
