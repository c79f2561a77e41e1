"""The launch seam: every Triton kernel of the package starts here, so a test can put another machine behind it.

Where there is no GPU, tests replace `launch` with one that runs the kernel's PTX on a machine in software, and
`has_device` with one that accepts CPU tensors. Both are looked up in this module at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch


def launch(
    kernel: Any,
    grid: Sequence[int],
    args: Sequence[Any],
    constexprs: Mapping[str, Any],
    num_warps: int,
    num_stages: int,
    registers: int | None = None,
) -> None:
    """Run a @triton.jit function: `args` are its leading parameters in order (None for an absent tensor). `registers`
    bounds a thread's, where it is not for ptxas to choose."""
    # Triton 3.10 will no longer fuse a multiply and an add by itself; the kernels' instruction counts are with it.
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if registers is not None:  # an option that AMD's compiler does not know
        options["maxnreg"] = registers
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, torch.Tensor))):
        kernel[tuple(grid)](*args, **constexprs, **options)


def has_device(device: torch.device) -> bool:
    """True if kernels can run on tensors of this device ("cuda" is also HIP's name in torch)."""
    return device.type == "cuda"


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


Launch = Callable[[Any, Sequence[int], Sequence[Any], Mapping[str, Any], int, int, int | None], None]
