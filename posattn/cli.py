"""The command `posattn`: one word says what to do, the rest goes to the module that does it."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from posattn.arguments import Parser

# Imported only when asked for: the demo and the bench bring plotting and progress bars with them.
COMMANDS = {
    "info": ("posattn.cli", "versions, backends and why one is unavailable, instruction sets, threads"),
    "check": ("posattn.check_command", "every encoding, or one of your own, on this machine's backends"),
    "plot": ("posattn.plot", "a heat map of what an encoding, or one of your own, does to the logits"),
    "demo": ("posattn.demo", "train and compare five encodings on real text"),
    "experiments": ("posattn.experiments", "the papers' results at the size of this machine"),
    "gpu": ("posattn.gpu", "the first hour on a GPU: parity, sanitizer, tuning, times and cycles in one report"),
    "bench": ("posattn.bench", "time and memory beside other ways to do the same"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    parser = Parser(
        prog="posattn",
        description="Attention with any positional encoding, exact and fused.",
        epilog="\n".join(f"{name:13}{about}" for name, (_, about) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"posattn {_version('posattn')}")
    parser.add_argument("command", choices=COMMANDS, help="what to do; `posattn COMMAND --help` says more")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    if chosen.command == "info":
        return info(chosen.arguments)
    try:
        module = importlib.import_module(COMMANDS[chosen.command][0])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "posattn":
            raise
        print(f"posattn {chosen.command} needs {error.name}: pip install matplotlib tqdm", file=sys.stderr)
        return 1
    status: int = module.main(chosen.arguments)
    return status


def info(argv: Sequence[str]) -> int:
    """Print what this machine has; always 0."""
    Parser(prog="posattn info", description=COMMANDS["info"][1]).parse_args(argv)
    import torch

    print(f"posattn    {_version('posattn')}")
    print(f"Python     {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"torch      {torch.__version__}")
    print(f"triton     {_version('triton')}")
    print(f"devices    {', '.join(_devices())}")
    print(f"threads    {torch.get_num_threads()}, as torch.get_num_threads() says")
    print()
    for name, state in _backends():
        print(f"{name:11}{state}")
    return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    import torch

    cards = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    return ["cpu", *(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in cards)]


def _backends() -> list[tuple[str, str]]:
    """Each backend, and either "available" with what it runs on or the reason why it is not."""
    import torch

    from posattn import backends
    from posattn.parity import plain_call

    rows = []
    for name in backends.FUSED:
        device = "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"
        reason = backends.reason_against(name, plain_call(device))
        state = "available" if reason is None else f"unavailable: {reason}"
        if name == "cpu" and reason is None:
            state += f", {_native()}"
        rows.append((name, state))
    rows.append(("reference", "available: plain PyTorch, for float64 and where asked for, in O(N^2) memory"))
    return rows


def _native() -> str:
    native = importlib.import_module("posattn._cpu")
    return f"{native.isa()} of {', '.join(native.isas())}; parallel regions on {native.runtime()}"


if __name__ == "__main__":
    sys.exit(main())
