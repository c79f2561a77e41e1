"""The mended Triton interpreter computes bfloat16 as PyTorch does, and loops as compiled kernels do, in a process where
it is switched on."""

import os
import subprocess
import sys
from pathlib import Path

BFLOAT16 = """
import torch, triton, triton.language as tl
from tests.ptxsim import interpreter
interpreter.mend()
interpreter.mend()

@triton.jit
def kernel(X, Y, Sum, Less, Product, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x, y = tl.load(X + i), tl.load(Y + i)
    tl.store(Sum + i, x + y)
    tl.store(Less + i, x < y)
    square = i[:, None] * SIZE + i[None, :]
    tl.store(Product + square, tl.dot(tl.load(X + square), tl.load(Y + square)))

torch.manual_seed(0)
x, y = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
total, less, product = torch.empty(16).bfloat16(), torch.empty(16, dtype=torch.bool), torch.empty(16, 16)
kernel[(1,)](x, y, total, less, product, SIZE=16)
assert torch.equal(total, x[0] + y[0])
assert torch.equal(less, x[0] < y[0])
torch.testing.assert_close(product, x.float() @ y.float())
"""

LOOPS = """
import torch, triton, triton.language as tl
from tests.ptxsim import interpreter
interpreter.mend()

@triton.jit
def kernel(Out, first, last):
    for i in range(first, last):
        for j in tl.range(first, last, 2):
            for PART in tl.static_range(2):
                part: tl.constexpr = PART
                tl.store(Out + i * 8 + j + part, (i.to(tl.int64) << 40) + j.to(tl.int64))

out = torch.zeros(5, 8, dtype=torch.int64)
kernel[(1,)](out, 1, 5)
expected = torch.zeros_like(out)
expected[1:, 1:5] = (torch.arange(1, 5)[:, None] << 40) + torch.tensor([1, 1, 3, 3])
assert torch.equal(out, expected), out
"""


def test_the_mended_interpreter(tmp_path: Path) -> None:
    programs = tmp_path / "bfloat16.py", tmp_path / "loops.py"  # Triton reads a kernel's source from its file
    for program, text in zip(programs, (BFLOAT16, LOOPS), strict=True):
        program.write_text(text)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "import runpy, sys; [runpy.run_path(path) for path in sys.argv[1:]]", *programs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
