"""The peak memory of a call, over what the process held before it."""

from __future__ import annotations

import ctypes
import gc
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

MB = 1e6


def extra_peak(call: Callable[[], object], device: str = "cpu") -> float:
    """Megabytes (1e6 bytes) that `call` adds at its peak. On a CPU, use a fresh process.

    A CPU's is the resident set of the whole process, so it counts what no allocator reports. Pages that malloc keeps of
    what was freed would hide all that the call puts there, so they go back to the system first.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MB
    _give_back()
    _reset_peak()
    resident = _resident("VmRSS")
    call()
    return max(_resident("VmHWM") - resident, 0.0) / MB


def _give_back() -> None:
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


def _reset_peak() -> None:
    """Let VmHWM start again from the present; where it cannot, the peak since the process began has to do."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _resident(field: str) -> float:
    """Bytes of /proc/self/status, or of getrusage's peak where there is no /proc."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    match = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status: expected a line {field}, got none")
    return 1024.0 * int(match[1])
