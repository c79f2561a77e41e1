"""`posattn check`: every encoding of posattn, or one of your own, on every backend of this machine."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Mapping, Sequence

import torch

from posattn import parity, targets
from posattn.arguments import Parser
from posattn.checking import Report, check
from posattn.encodings.base import Encoding

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: Sequence[str] | None = None) -> int:
    """A table of all encodings or a report of one; 0 if all is as it should be on every backend here, else 1."""
    parser = Parser(
        prog="posattn check",
        description=__doc__,
        epilog="posattn check my_module:MyEncoding    looks at an encoding of yours from all sides (posattn.check)",
    )
    parser.add_argument(
        "encoding",
        metavar="ENCODING",
        nargs="?",
        help="module:name or file.py:name, where name is an encoding, its class or a function that makes it; or one of "
        "those that `posattn plot --list` shows (default: a table of all of them)",
    )
    parser.add_argument("--tokens", type=int, default=75, help="tokens of the calls (%(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="query heads (%(default)s)")
    parser.add_argument("--head-dim", type=int, default=32, help="head dimension (%(default)s)")
    parser.add_argument("--dtype", choices=_DTYPES, action="append", help="repeat for several (default: all)")
    parser.add_argument(
        "--no-finite-differences", action="store_true", help="for an encoding with a straight-through estimator"
    )
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    places = [(device, backend) for device in devices for backend in parity.available(device)]
    if not places:
        print("no fused backend is available; `posattn info` says why")
        return 1
    if options.encoding is None:
        return _table(places, {"none": None, **targets.examples_of(options, parser)}, options)
    failed = 0
    for name, position in targets.chosen(options, parser).items():
        report = _report(position, options)
        print(f"{name}, {report}", flush=True)
        failed += not report.ok
    return 1 if failed else 0


def _report(position: Encoding, options: argparse.Namespace) -> Report:
    return check(
        position,
        num_heads=position.num_heads or options.heads,
        head_dim=options.head_dim,
        tokens=options.tokens,
        dtypes=[_DTYPES[name] for name in options.dtype or _DTYPES],
        finite_differences=not options.no_finite_differences,
    )


def _table(places: list[tuple[str, str]], catalogue: Mapping[str, Encoding | None], options: argparse.Namespace) -> int:
    print("Errors against a float64 reference, worst of output, log-sum-exp and gradients; naive is plain PyTorch.\n")
    print(f"{'encoding':24}{'backend':10}{'dtype':10}{'result':34}{'error':>10}{'naive':>10}{'allowed':>10}")
    failed = 0
    for row in _rows(places, catalogue, options):
        print(row[1], flush=True)
        failed += not row[0]
    print(f"\n{failed} failed" if failed else "\nall within twice naive PyTorch's error plus rounding")
    return 1 if failed else 0


def _rows(
    places: list[tuple[str, str]], catalogue: Mapping[str, Encoding | None], options: argparse.Namespace
) -> Iterator[tuple[bool, str]]:
    heads, tokens, dim = options.heads, options.tokens, options.head_dim
    for device, backend in places:
        for dtype_name in options.dtype or _DTYPES:
            if backend not in parity.available(device, _DTYPES[dtype_name]):
                continue  # a dtype that the backend does not compute in
            q, k, v = (torch.randn(1, heads, tokens, dim).to(device, _DTYPES[dtype_name]) for _ in range(3))
            for name, position in catalogue.items():
                placed = None if position is None else copy.deepcopy(position).to(device)
                extra = {n: p.to(device) for n, p in parity.positions_for(placed, tokens, tokens).items()}
                found = parity.measure(q, k, v, placed, {"causal": True, **extra}, backend)
                worst = max(found, key=lambda c: c.error / max(c.allowed, 1e-30))
                ok = all(c.ok for c in found)
                numbers = f"{worst.error:10.1e}{worst.naive_error:10.1e}{worst.allowed:10.1e}"
                verdict = "" if ok else f"  FAILED {worst.worst}"
                yield ok, f"{name:24}{backend:10}{dtype_name:10}{worst.name:34}{numbers}{verdict}"
