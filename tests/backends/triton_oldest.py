"""Compiles one launch of every kernel family for sm_80, sm_90 and gfx942 with whatever Triton is imported.

A program of its own (test_triton_oldest.py runs it with the oldest release that is supported).
"""

from __future__ import annotations

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.ptxsim.triton_run import launch_options, specialise
from tools.gpu_budget.shipped import shipped

_TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# How labels of launches begin that together hold every function of the plain family, for NVIDIA and for AMD, and every
# kernel of HeadMix.
_LAUNCHES = {
    "sm_80": ("profile", "rotary", "mix, D = 64, bfloat16, Tq = 2048"),
    "sm_90": ("table",),
    "gfx942": ("slope",),
}


def main() -> int:
    print("triton", triton.__version__)
    seen = set()
    for arch, begins in _LAUNCHES.items():
        for launch in shipped((arch,), dims=(64,), dtypes=(torch.bfloat16,)):
            name = arch, launch.kernel.__name__, launch.label
            if not launch.label.startswith(begins) or name in seen:
                continue
            signature, constants, attrs, _ = specialise(launch.kernel, launch.args, launch.constexprs)
            options = launch_options(launch.num_warps, launch.num_stages, launch.registers)
            source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attrs)
            triton.compile(source, target=_TARGETS[arch], options=options)
            seen.add(name)
            print(*name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
