"""The launch seam: every CUDA kernel of the package starts here, so a test can put another machine behind it.

Where there is no GPU, tests replace `launch` with one that runs the kernel's PTX on a machine in software, and the
device's properties with that machine's. All are looked up in this module at each call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from posattn.backends.common.arch import architecture, processors
from posattn.backends.cuda import compiler
from posattn.backends.cuda.compiler import Kernel
from posattn.backends.cuda.params import Arguments, Values, pack

__all__ = ["architecture", "has_device", "launch", "processors", "run"]


def run(
    source: str,
    entry: str,
    struct: str,
    constants: tuple[Any, ...],
    values: Values,
    grid: tuple[int, ...],
    threads: int,
    shared_bytes: int,
    device: torch.device,
) -> None:
    """Compile (or find) a kernel and launch it; a grid without blocks needs neither."""
    if 0 in grid:
        return
    arch = architecture(device)
    target = "sm_90a" if arch == "sm_90" else arch  # with the instructions that only it has
    kernel = compiler.compile_kernel(source, entry, struct, constants, target)
    launch(kernel, grid, (threads,), shared_bytes, pack(struct, values))


def launch(kernel: Kernel, grid: Sequence[int], block: Sequence[int], shared_bytes: int, arguments: Arguments) -> None:
    """Start `kernel` on the current stream of its tensors' device. Allocates nothing and waits for nothing."""
    from cuda.bindings import driver

    tensor = arguments.tensors[0]
    image = ctypes.create_string_buffer(bytes(arguments), len(arguments))
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(image))
    sizes = [*grid, 1, 1][:3] + [*block, 1, 1][:3]
    with torch.cuda.device_of(tensor):
        _, function = _loaded(kernel, tensor.device.index, shared_bytes)
        stream = torch.cuda.current_stream().cuda_stream
        (error,) = driver.cuLaunchKernel(function, *sizes, shared_bytes, stream, ctypes.addressof(pointers), 0)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA cannot launch {kernel.name} (grid {tuple(grid)}): {error.name}")


@cache
def _loaded(kernel: Kernel, device: int, shared_bytes: int) -> tuple[Any, Any]:
    """The kernel on a device, allowed that much dynamic shared memory: its owner, and what the driver starts."""
    from cuda.bindings import driver
    from cuda.core import ObjectCode

    loaded = ObjectCode.from_cubin(kernel.cubin, name=kernel.name).get_kernel(kernel.name)
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (error,) = driver.cuKernelSetAttribute(attribute, shared_bytes, loaded.handle, device)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA grants {kernel.name} no {shared_bytes} bytes of shared memory: {error.name}")
    return loaded, driver.CUfunction(int(loaded.handle))


def has_device(device: torch.device) -> bool:
    """True if kernels can run on tensors of this device ("cuda" is also HIP's name in torch)."""
    return device.type == "cuda" and torch.version.hip is None
