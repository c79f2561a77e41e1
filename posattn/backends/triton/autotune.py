"""Opt-in tuning: POSATTN_TRITON_AUTOTUNE=1 times a kernel's shipped configurations on the device and keeps the best.

The choice is kept for the process and on disk (POSATTN_CACHE_DIR, else the user's cache directory), by device, kernel
family, and the shape class of the call. Without the variable nothing here runs and the shipped one is taken.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict

import torch

from posattn.backends.common import disk_cache
from posattn.backends.common.operands import k_max, q_max
from posattn.backends.triton.configs.launch_config import LaunchConfig, Table, configs_of, head_dim, kinds
from posattn.plan import Call

_FILE = "triton_tiles.json"

_chosen: dict[str, LaunchConfig] = {}


def enabled() -> bool:
    return os.environ.get("POSATTN_TRITON_AUTOTUNE", "0") not in ("", "0")


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


def _stored() -> dict[str, object]:
    """The choices on disk, whatever they hold: only what is one of a call's configs is taken from them."""
    try:
        entries = json.loads(disk_cache.read(_FILE) or b"{}")
    except ValueError:
        return {}
    return entries if isinstance(entries, dict) else {}


def pick(
    name: str, device: str, call: Call, configs: Iterable[LaunchConfig], time: Callable[[LaunchConfig], float]
) -> LaunchConfig:
    """The fastest of `configs` by `time` (milliseconds), from memory or disk if it was found before. One that the
    device cannot hold counts as infinitely slow."""
    entry = key(name, device, call)
    if entry not in _chosen:
        choices = list(dict.fromkeys(configs))
        stored = _stored()
        found = next((config for config in choices if asdict(config) == stored.get(entry)), None)
        if found is None:
            found = min(choices, key=time)
            content = {**stored, entry: asdict(found)}
            disk_cache.write(_FILE, json.dumps(content, indent=1).encode())
        _chosen[entry] = found
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
