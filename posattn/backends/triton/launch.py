"""The launch seam: every Triton kernel of the package starts here, so a test can put another machine behind it.

Where there is no GPU, tests replace `launch` with one that runs the kernel's PTX on a machine in software, and
`has_device` with one that accepts CPU tensors. Both are looked up in this module at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from posattn.backends.common.arch import architecture, processors

__all__ = ["Launch", "architecture", "has_device", "launch", "processors"]


def tensors(args: Iterable[Any]) -> Iterator[torch.Tensor]:
    """All tensors among arguments and, of tuples, their members."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, tuple):
            yield from tensors(arg)


def launch(
    kernel: Any,
    grid: Sequence[int],
    args: Sequence[Any],
    constexprs: Mapping[str, Any],
    num_warps: int,
    num_stages: int,
    registers: int | None = None,
) -> None:
    """Run a @triton.jit function: `args` are its leading parameters in order, (named) tuples of numbers, tensors and
    None for an absent one, or one of these. `registers` bounds a thread's, where it is not for ptxas to choose."""
    # Triton 3.10 will no longer fuse a multiply and an add by itself; the kernels' instruction counts are with it.
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if registers is not None:  # an option that AMD's compiler does not know
        options["maxnreg"] = registers
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(next(tensors(args))):
        kernel[tuple(grid)](*args, **constexprs, **options)


def has_device(device: torch.device) -> bool:
    """True if kernels can run on tensors of this device ("cuda" is also HIP's name in torch)."""
    return device.type == "cuda"


Launch = Callable[[Any, Sequence[int], Sequence[Any], Mapping[str, Any], int, int, int | None], None]
