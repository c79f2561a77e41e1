"""A few lines of PTX as a kernel: each lane loads its inputs, runs the lines and stores its results."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .kernel import Kernel, Options, Report

_HEADER = ".version 8.6\n.target sm_90a\n.address_size 64\n"


def _bits(tensor: torch.Tensor) -> int:
    return 8 * tensor.element_size()


def snippet(
    body: str,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    *,
    declare: str = "",
    shared: int = 0,
    grid: Sequence[int] = (1,),
    options: Options | None = None,
    extra: Sequence[torch.Tensor] = (),
    maps: Sequence[bytes] = (),
) -> Report:
    """Runs `body` once for each element of the inputs and outputs, which all have as many elements as there are lanes.

    In the body, %a0, %a1, ... hold the lane's inputs (as bits), %d0, %d1, ... become its outputs, %t is its index,
    %x0, %x1, ... are the addresses of the `extra` tensors, %s the shared address of `shared` bytes, and %p, %q are
    predicates; `declare` may add registers. %m0, %m1, ... are the addresses of tensor maps (of `extra` tensors).
    """
    everything = [*inputs, *outputs, *extra]
    lanes = (inputs[0] if inputs else outputs[0]).numel()
    parts = [_HEADER, ".extern .shared .align 1024 .b8 dynamic[];\n", ".visible .entry snippet("]
    params = [f".param .u64 p{i}" for i in range(len(everything))]
    params += [f".param .align 64 .b8 map{i}[128]" for i in range(len(maps))]
    parts.append(", ".join(params) + ")\n{\n")
    parts.append(".reg .pred %p, %q;\n.reg .b32 %t, %s;\n.reg .b64 %base, %at;\n" + declare + "\n")
    for letter, group in (("a", inputs), ("d", outputs)):
        # PTX has no 8-bit registers: 8-bit values live in 16-bit ones.
        parts += [f".reg .b{max(16, _bits(tensor))} %{letter}{i};\n" for i, tensor in enumerate(group)]
    parts += [f".reg .b64 %x{i};\n" for i in range(len(extra))]
    parts += [f".reg .b64 %m{i};\nmov.b64 %m{i}, map{i};\n" for i in range(len(maps))]
    parts.append("mov.u32 %t, %tid.x;\nmov.u32 %s, dynamic;\n")

    def place(i: int, tensor: torch.Tensor) -> str:
        return f"ld.param.u64 %base, [p{i}];\nmad.wide.u32 %at, %t, {tensor.element_size()}, %base;\n"

    for i, tensor in enumerate(inputs):
        parts.append(place(i, tensor) + f"ld.global.b{_bits(tensor)} %a{i}, [%at];\n")
    for i in range(len(extra)):
        parts.append(f"ld.param.u64 %x{i}, [p{len(inputs) + len(outputs) + i}];\n")
    parts.append(body + "\n")
    for i, tensor in enumerate(outputs):
        parts.append(place(len(inputs) + i, tensor) + f"st.global.b{_bits(tensor)} [%at], %d{i};\n")
    parts.append("ret;\n}\n")
    kernel = Kernel("".join(parts))
    return kernel.launch(grid, (lanes,), [*everything, *maps], shared=shared, options=options)
