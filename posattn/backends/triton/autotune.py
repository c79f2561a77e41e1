"""Opt-in tuning: POSATTN_TRITON_AUTOTUNE=1 times a kernel's shipped configurations on the device and keeps the best.

The choice is kept for the process and on disk (POSATTN_CACHE_DIR, else the user's cache directory), by device, kernel
family, and the shape class of the call. Without the variable nothing here runs and the shipped one is taken.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from posattn.backends.common.operands import k_max, q_max
from posattn.backends.triton.configs.launch_config import LaunchConfig, Table, configs_of, head_dim, kinds
from posattn.plan import Call

_chosen: dict[str, LaunchConfig] = {}


def enabled() -> bool:
    return os.environ.get("POSATTN_TRITON_AUTOTUNE", "0") not in ("", "0")


def _directory() -> Path:
    given = os.environ.get("POSATTN_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(given) if given else Path(base) / "posattn"


def key(name: str, device: str, call: Call) -> str:
    """Calls that share a choice: same device, kernel, kind of plan and dimension, and lengths up to a power of two.

    Rotary counts, for decoding rotates keys in the kernel, which larger tiles have no room for.
    """
    plan = " ".join(["rotary", *kinds(call)] if call.plan.rotary is not None else kinds(call))
    lengths = ((q_max(call) - 1).bit_length(), (k_max(call) - 1).bit_length())
    mask = call.mask
    masked = "causal" if mask.causal else "window" if mask.left is not None or mask.right is not None else "full"
    return "|".join(map(str, (name, device, plan, head_dim(call), call.q.dtype, *lengths, masked)))


def candidates(table: Table, arch: str, call: Call) -> list[LaunchConfig]:
    """The shipped configurations of this architecture and dimension, whatever plan they were chosen for."""
    by_dim = configs_of(table, arch)
    dim = min(d for d in by_dim if d >= head_dim(call))
    of_kind = [config for name, config in by_dim[dim].items() if (name == "float32") == (kinds(call) == ["float32"])]
    return list(dict.fromkeys(of_kind))


def _stored(path: Path) -> dict[str, LaunchConfig]:
    """The choices on disk; those that this version cannot read are left out, to be made and written anew."""
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    configs = {}
    for entry, values in entries.items() if isinstance(entries, dict) else ():
        try:
            configs[entry] = LaunchConfig(**values)
        except TypeError:
            continue
    return configs


def pick(
    name: str, device: str, call: Call, configs: Iterable[LaunchConfig], time: Callable[[LaunchConfig], float]
) -> LaunchConfig:
    """The fastest of `configs` by `time` (milliseconds), from memory or disk if it was found before. One that the
    device cannot hold counts as infinitely slow."""
    entry = key(name, device, call)
    if entry not in _chosen:
        path = _directory() / "triton_tiles.json"
        stored = _stored(path)
        if entry not in stored:
            stored[entry] = min(dict.fromkeys(configs), key=time)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps({name: asdict(config) for name, config in stored.items()}, indent=1))
            partial.replace(path)
        _chosen[entry] = stored[entry]
    return _chosen[entry]


def milliseconds(run: Callable[[LaunchConfig], object]) -> Callable[[LaunchConfig], float]:
    """Times `run` on the current device with Triton's own harness."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    def time(config: LaunchConfig) -> float:
        try:
            return float(do_bench(lambda: run(config)))
        except OutOfResources:
            return float("inf")

    return time


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device).replace("|", " ")
