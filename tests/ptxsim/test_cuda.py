"""The machine on PTX from NVIDIA's compilers: shared memory, shuffles, atomics, directed rounding, structs."""

import struct
from types import SimpleNamespace

import pytest
import torch

from posattn.backends.cuda.params import Arguments
from tests.ptxsim import Fault, Findings, Kernel, run_cuda
from tests.ptxsim.cuda_source import MISSING, available, compile_cuda

pytestmark = pytest.mark.skipif(not available(), reason=MISSING)

SOURCE = r"""
extern "C" __global__ void block_sum(const float* x, float* total, int n) {
  __shared__ float parts[4];
  float sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  BARRIER;
  if (threadIdx.x == 0) atomicAdd(total, parts[0] + parts[1] + parts[2] + parts[3]);
}

extern "C" __global__ void functions(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = expf(x[i]) + logf(fabsf(x[i]) + 1.0f) / sqrtf(1.0f + x[i] * x[i]) + __fmul_rz(x[i], 3.0f);
}

struct Tensor { const float* from; float* to; int rows, columns; };

extern "C" __global__ void transpose(const __grid_constant__ Tensor t) {
  extern __shared__ float tile[];
  for (int i = threadIdx.x; i < t.rows * t.columns; i += blockDim.x) tile[i] = t.from[i];
  BARRIER;
  for (int i = threadIdx.x; i < t.rows * t.columns; i += blockDim.x)
    t.to[i] = tile[i % t.rows * t.columns + i / t.rows];
}
"""


@pytest.fixture(scope="module")
def ptx() -> str:
    return compile_cuda(SOURCE.replace("BARRIER", "__syncthreads()"))


def test_block_sum(ptx: str) -> None:
    x, total = torch.randn(1000), torch.zeros(1)
    Kernel(ptx, "block_sum").launch((3,), (128,), [x, total, 1000], read_only=(0,)).check()
    torch.testing.assert_close(total, x.sum().reshape(1), rtol=1e-5, atol=1e-5)


def test_a_missing_barrier_is_found() -> None:
    kernel = Kernel(compile_cuda(SOURCE.replace("BARRIER", "")), "block_sum")
    with pytest.raises(Findings, match="shared_race"):
        kernel.launch((3,), (128,), [torch.randn(1000), torch.zeros(1), 1000]).check()


def test_accurate_functions(ptx: str) -> None:
    """expf needs fma.rm, the division and the square root their own correct rounding."""
    x = torch.randn(300) * 20
    y = torch.full_like(x, float("nan"))
    Kernel(ptx, "functions").launch((3,), (128,), [x, y, 300]).check()
    d = x.double()
    want = d.exp() + (d.abs() + 1).log() / (1 + d * d).sqrt() + 3 * d
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-5)


def transpose(ptx: str, *, rows: int = 6, read_only: bool = True, swap: bool = False) -> torch.Tensor:
    """What the kernel makes of a [6, 40] tensor when it is told that it has `rows` rows."""
    kernel = SimpleNamespace(ptx=ptx, name="transpose", arch="sm_80")
    x, y = torch.randn(6, 40), torch.zeros(40, 6)
    tensors = (y, x) if swap else (x, y)
    image = struct.pack("QQii", *(tensor.data_ptr() for tensor in tensors), rows, 40)
    arguments = Arguments(image, tensors=(x, y), read_only=(x,) if read_only else ())
    run_cuda(kernel, (1,), (64,), 4 * rows * 40, arguments).check()
    assert torch.equal(y, x.T)
    return y


def test_tensors_inside_a_struct(ptx: str) -> None:
    transpose(ptx)
    transpose(ptx, read_only=False)


def test_a_tensor_inside_a_struct_has_bounds(ptx: str) -> None:
    with pytest.raises(Fault, match="global memory out of bounds: 4 bytes by lane"):
        transpose(ptx, rows=7)
    with pytest.raises(Fault, match="write to a read-only tensor"):
        transpose(ptx, swap=True)


def test_a_struct_travels_with_its_tensors(ptx: str) -> None:
    kernel = SimpleNamespace(ptx=ptx, name="transpose", arch="sm_80")
    with pytest.raises(TypeError, match="bytes that carry their tensors, got bytes"):
        run_cuda(kernel, (1,), (64,), 0, bytes(24))
