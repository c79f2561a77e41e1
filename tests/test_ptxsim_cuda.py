"""The machine on PTX from NVIDIA's compilers: shared memory, shuffles, atomics, directed rounding, structs."""

import pytest
import torch

from tests.ptxsim import Findings, Kernel
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

extern "C" __global__ void transpose(const Tensor t) {
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


def test_tensors_inside_a_struct(ptx: str) -> None:
    x, y = torch.randn(6, 40), torch.zeros(40, 6)
    image = torch.tensor([x.data_ptr(), y.data_ptr()]).view(torch.uint8).tolist()
    sizes = torch.tensor([6, 40], dtype=torch.int32).view(torch.uint8).tolist()
    kernel = Kernel(ptx, "transpose")
    kernel.launch((1,), (64,), [bytes(image + sizes)], shared=960, buffers=[y], read_only_buffers=[x]).check()
    assert torch.equal(y, x.T.contiguous())
