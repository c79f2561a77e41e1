"""What host code knows of each GPU architecture, by the names that launch configurations go by, and how work is split
over its processors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

# A split walks at least this many keys, so that the partial outputs stay small beside the keys read.
SPLIT_KEYS = 256
MAX_SPLITS = 64


@dataclass(frozen=True)
class SharedMemory:
    """Bytes that one block may ask for, and that a multiprocessor has for all its blocks."""

    block: int
    multiprocessor: int


_LARGE = SharedMemory(163 * 1024, 164 * 1024)
_LARGEST = SharedMemory(227 * 1024, 228 * 1024)
_LEAST = SharedMemory(99 * 1024, 100 * 1024)
_SHARED = {
    "sm_80": _LARGE,
    "sm_86": _LEAST,
    "sm_87": _LARGE,
    "sm_89": _LEAST,
    "sm_90": _LARGEST,
    "sm_100": _LARGEST,
    "sm_103": _LARGEST,
    "sm_110": _LARGEST,
    "sm_120": _LEAST,
    "sm_121": _LEAST,
    "gfx942": SharedMemory(64 * 1024, 64 * 1024),
}


def shared_memory(arch: str) -> SharedMemory:
    """Of an architecture ("sm_90", "sm_90a", "gfx942"); one that is not known is taken to have the least."""
    return _SHARED.get(arch.rstrip("af") if arch.startswith("sm_") else arch, _LEAST)


@cache
def _properties(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        name = str(properties.gcnArchName).split(":")[0]
    else:
        name = f"sm_{properties.major}{properties.minor}"
    return name, int(properties.multi_processor_count)


def architecture(device: torch.device) -> str:
    """The name that launch configurations go by: "sm_90", "gfx942", ..."""
    return _properties(device.index if device.index is not None else torch.cuda.current_device())[0]


def processors(device: torch.device) -> int:
    """How many streaming multiprocessors (compute units) the device has."""
    return _properties(device.index if device.index is not None else torch.cuda.current_device())[1]


def key_splits(programs: int, keys: int, processors: int) -> int:
    """In how many parts to cut the keys so that a few programs fill the device."""
    if programs == 0 or programs >= processors:
        return 1
    return max(1, min(2 * processors // programs, keys // SPLIT_KEYS, MAX_SPLITS))
