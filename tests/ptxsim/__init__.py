"""The PTX machine: runs the PTX of a GPU kernel on the CPU and reports what a GPU could punish.

docs/design/gpu-proof.md says how it is used and what it cannot see.
"""

from .cuda_run import run_cuda
from .kernel import Fault, Findings, Kernel, Options, Report, Unsupported
from .triton_run import compile_triton, run_triton

__all__ = [
    "Fault",
    "Findings",
    "Kernel",
    "Options",
    "Report",
    "Unsupported",
    "compile_triton",
    "run_cuda",
    "run_triton",
]
