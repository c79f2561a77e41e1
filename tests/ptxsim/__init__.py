"""The PTX machine: runs the PTX of a GPU kernel on the CPU and reports what a GPU could punish. See docs/gpu-proof.md."""

from .kernel import Findings, Kernel, Options, Report
from .triton_run import compile_triton, run_triton

__all__ = ["Findings", "Kernel", "Options", "Report", "compile_triton", "run_triton"]
