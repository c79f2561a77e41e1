"""`posattn demo`: train a small byte-level decoder with several encodings on real text, and compare them.

Each trains at length 128 and is scored at up to 2048; the fused call is measured beside naive PyTorch. A table goes to
the terminal, the plots and a JSON of every number to the output folder.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from posattn import backends
from posattn.arguments import Parser, positive, readable_file
from posattn.demo import corpus, train
from posattn.demo.contestants import CONTESTANTS
from posattn.demo.measure import Cost, Request, measure
from posattn.demo.model import Decoder, Shape
from posattn.demo.plots import plot_biases, plot_perplexity
from posattn.parity import plain_call

STEPS = 300
WINDOWS = 32


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="posattn demo", description=__doc__)
    parser.add_argument("--encodings", type=_names, default=list(CONTESTANTS), help=f"of {','.join(CONTESTANTS)}")
    parser.add_argument(
        "--text", type=readable_file, help="train on this file (default: the standard library's source)"
    )
    parser.add_argument("--steps", type=positive, default=STEPS, help="training steps an encoding (%(default)s)")
    parser.add_argument("--windows", type=positive, default=WINDOWS, help="places to score (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (%(default)s)")
    parser.add_argument(
        "--backend", default="auto", choices=("auto", *backends.NAMES), help="posattn's backend (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder of the results (%(default)s)")
    arguments = parser.parse_args(argv)
    parser.folder("--out", arguments.out)
    if arguments.backend in backends.FUSED:
        reason = backends.reason_against(arguments.backend, plain_call("cpu", torch.float32))
        if reason is not None:
            parser.error(
                f"--backend {arguments.backend}: expected one that trains here, got one that does not: {reason}"
            )
    try:
        return run(arguments)
    except corpus.TooShort as error:
        parser.error(f"--{error}")


def run(arguments: argparse.Namespace) -> int:
    """The whole demo; 0 when done, ValueError if the text is too short."""
    start = time.perf_counter()
    shape = Shape()
    longest = max(train.EVAL_LENGTHS)
    text = corpus.load(arguments.text, shortest=longest + 1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(f"{len(text.train):,} bytes to train on, {len(text.held_out):,} held out, from {text.source}")

    models: dict[str, Decoder] = {}
    results: dict[str, dict[str, Any]] = {}
    for name in arguments.encodings:
        began = time.perf_counter()
        model = Decoder(shape, partial(CONTESTANTS[name], shape), arguments.seed, arguments.backend)
        losses = train.train(model, text.train, arguments.steps, arguments.seed, name)
        trained = time.perf_counter()
        perplexity = train.perplexities(model, text.held_out, arguments.windows, name)
        models[name] = model
        results[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "losses": losses,
            "train_seconds": trained - began,
            "evaluation_seconds": time.perf_counter() - trained,
            "perplexity": perplexity,
        }
        shown = "  ".join(f"{length}: {value:.2f}" for length, value in perplexity.items())
        print(f"{name:12s} trained in {trained - began:.0f} s; perplexity at {shown}")

    threads = torch.get_num_threads()
    for name in tqdm(
        arguments.encodings, desc="measuring fused and naive calls", unit="encoding", leave=False, disable=None
    ):
        for side, backend in (("fused", arguments.backend), ("naive", "reference")):
            results[name][side] = asdict(measure(Request(name, longest, threads, backend)))

    plot_perplexity({name: result["perplexity"] for name, result in results.items()}, arguments.out / "perplexity.png")
    plot_biases(models, text.held_out, arguments.out / "biases.png")
    seconds = time.perf_counter() - start
    report = {
        "settings": {**vars(arguments), "text": text.source, "out": str(arguments.out), "threads": threads},
        "shape": asdict(shape),
        "train_length": train.TRAIN_LENGTH,
        "versions": {"posattn": version("posattn"), "torch": torch.__version__, "python": platform.python_version()},
        "machine": platform.machine(),
        "seconds": seconds,
        "encodings": results,
    }
    (arguments.out / "results.json").write_text(json.dumps(report, indent=1))
    print()
    print(table(results, longest))
    print(f"\n{seconds:.0f} s in all. {arguments.out}/: results.json, perplexity.png, biases.png")
    return 0


def table(results: dict[str, dict[str, Any]], longest: int) -> str:
    """Perplexities, then milliseconds and megabytes of a forward with backward, fused and naive."""
    lengths = train.EVAL_LENGTHS
    lines = [
        f"perplexity of the last {train.SCORED} bytes by input length (trained at {train.TRAIN_LENGTH}); "
        f"one attention call at {longest}, forward and backward",
        f"{'':12s}" + "".join(f"{length:>8d}" for length in lengths) + f"{'fused':>21s}{'naive':>22s}",
    ]
    for name, result in results.items():
        row = f"{name:12s}" + "".join(f"{result['perplexity'][length]:8.2f}" for length in lengths)
        for side in ("fused", "naive"):
            cost = Cost(**result[side])
            row += f"{1e3 * cost.both:10.0f} ms{cost.memory:6.0f} MB"
        lines.append(row)
    return "\n".join(lines)


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = set(names) - CONTESTANTS.keys()
    if unknown:
        raise argparse.ArgumentTypeError(f"expected names of {','.join(CONTESTANTS)}, got {','.join(sorted(unknown))}")
    return names
