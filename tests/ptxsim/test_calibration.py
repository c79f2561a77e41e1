"""The machine on kernels that real GPUs have proved: right numbers, no finding, on sm_80, sm_90 and sm_100."""

import itertools
import math

import pytest
import torch

from tests.ptxsim import Options, Report, run_triton
from tests.ptxsim import calibration as kernels

ARCHS = pytest.mark.parametrize("arch", [80, 90])


def blank(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An output that shows where nothing was written."""
    return torch.full(shape, float("nan"), dtype=dtype)


def run_matmul(
    a: torch.Tensor, b: torch.Tensor, arch: int, tile: tuple[int, int, int], **options: object
) -> torch.Tensor:
    (m, k), n = a.shape, b.shape[1]
    out = blank(m, n)
    args = [a, b, out, m, n, k, *a.stride(), *b.stride(), *out.stride()]
    names = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tile, strict=True))
    grid = (math.ceil(m / tile[0]), math.ceil(n / tile[1]))
    run_triton(kernels.matmul, grid, args, arch, 4, 3, names, Options(**options)).check()
    return out


@ARCHS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("a_t", "b_t"), list(itertools.product([False, True], repeat=2)))
def test_matmul_of_any_layout(arch: int, dtype: torch.dtype, a_t: bool, b_t: bool) -> None:
    """On sm_90 the four layouts are the K-major and MN-major descriptors of wgmma."""
    m, n, k = 96, 80, 112
    a = torch.randn(k, m, dtype=dtype).T if a_t else torch.randn(m, k, dtype=dtype)
    b = torch.randn(n, k, dtype=dtype).T if b_t else torch.randn(k, n, dtype=dtype)
    out = run_matmul(a, b, arch, (64, 64, 32))
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("tile", [(64, 16, 16), (64, 32, 64), (128, 128, 32)])
def test_matmul_of_every_swizzle(tile: tuple[int, int, int]) -> None:
    """Rows of 32, 64 and 128 bytes have descriptors of their own on sm_90."""
    a, b = torch.randn(130, 70, dtype=torch.float16), torch.randn(70, 136, dtype=torch.float16)
    torch.testing.assert_close(run_matmul(a, b, 90, tile).double(), a.double() @ b.double(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("a_t", "b_t"), list(itertools.product([False, True], repeat=2)))
def test_matmul_by_tensor_memory(dtype: torch.dtype, a_t: bool, b_t: bool) -> None:
    """Products of 64 and of 128 rows on sm_100; float32 by tf32, in which these numbers are exact."""
    m, n, k = 96, 80, 112
    a, b = (torch.randint(-8, 9, shape).to(dtype) for shape in ((m, k), (k, n)))
    a, b = (x.T.contiguous().T if transposed else x for x, transposed in ((a, a_t), (b, b_t)))
    out = run_matmul(a, b, 100, (128 if a_t else 64, 64, 32), late=b_t)
    assert torch.equal(out.double(), a.double() @ b.double())


@pytest.mark.parametrize("core", [80, 90])
def test_a_modelled_tensor_core_is_a_little_worse_than_float64(core: int) -> None:
    a, b = torch.randn(64, 256, dtype=torch.float16), torch.randn(256, 64, dtype=torch.float16)
    want = a.double() @ b.double()
    exact, modelled = (run_matmul(a, b, 80, (64, 64, 32), tensor_core=c).double() - want for c in (0, core))
    assert exact.abs().max() < modelled.abs().max() < 20 * exact.abs().max()


@ARCHS
@pytest.mark.parametrize("columns", [1, 100, 1000])
def test_softmax(arch: int, columns: int) -> None:
    x = torch.randn(5, columns) * 10
    y = torch.full_like(x, float("nan"))
    block = max(16, 1 << (columns - 1).bit_length())
    run_triton(kernels.softmax, (5,), [x, y, columns, columns], arch, constexprs={"BLOCK": block}).check()
    torch.testing.assert_close(y, x.softmax(1))


@ARCHS
def test_layer_norm_and_its_locked_gradient(arch: int) -> None:
    x, w, b = torch.randn(6, 300), torch.randn(300), torch.randn(300)
    y, mean, rstd = torch.full_like(x, float("nan")), blank(6), blank(6)
    args = [x, w, b, y, mean, rstd, 300, 1e-5]
    run_triton(kernels.layer_norm, (6,), args, arch, constexprs={"BLOCK": 128}).check()
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (300,), w, b, 1e-5))
    grad, grad_w, lock = torch.randn(6, 300), torch.zeros(300), torch.zeros(1, dtype=torch.int32)
    args = [x, mean, rstd, grad, grad_w, lock, 300]
    run_triton(kernels.layer_norm_weight_gradient, (6,), args, arch, constexprs={"BLOCK": 512}).check()
    want = (grad * (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()).sum(0)
    torch.testing.assert_close(grad_w, want, rtol=1e-4, atol=1e-4)


@ARCHS
@pytest.mark.parametrize("reverse", [False, True])
def test_column_sums(arch: int, reverse: bool) -> None:
    x, out = torch.randn(70, 33), torch.zeros(33)
    tile = {"BLOCK_M": 32, "BLOCK_N": 64}
    options = Options(reverse=reverse)
    run_triton(kernels.column_sums, (3,), [x, out, 70, 33], arch, constexprs=tile, options=options).check()
    torch.testing.assert_close(out, x.sum(0), rtol=1e-5, atol=1e-5)


@ARCHS
@pytest.mark.parametrize("block", [64, 512])
def test_sort_and_prefix_sum(arch: int, block: int) -> None:
    x = torch.randn(3, block)
    y, totals = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    run_triton(kernels.sort_rows, (3,), [x, y, totals], arch, constexprs={"BLOCK": block}).check()
    assert torch.equal(y, x.sort(1).values)
    torch.testing.assert_close(totals, x.cumsum(1), rtol=1e-4, atol=1e-4)


def run_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arch: int, causal: bool, **options: object
) -> tuple[Report, torch.Tensor, torch.Tensor]:
    heads, tokens, dim = q.shape
    out, lse = torch.full_like(q, float("nan")), blank(heads, tokens)
    args = [q, k, v, out, lse, dim**-0.5, tokens, q.stride(0), q.stride(1)]
    consts = {"CAUSAL": causal, "D": dim, "BLOCK_M": 64, "BLOCK_N": 32}
    grid = (math.ceil(tokens / 64), heads)
    return run_triton(kernels.attention, grid, args, arch, 4, 3, consts, Options(**options)), out, lse


@ARCHS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
# Triton compiles a length of one, and one that is a multiple of 16, each anew.
@pytest.mark.parametrize("tokens", [63, 97, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 64, 160))])
def test_fused_attention(arch: int, dtype: torch.dtype, tokens: int) -> None:
    q, k, v = (torch.randn(2, tokens, 64, dtype=dtype) for _ in range(3))
    for causal, late in ((True, True), (False, False)):
        check_attention(q, k, v, arch, causal, late)


def test_fused_attention_by_tensor_memory() -> None:
    """Scores and weights in tensor memory: the second product's A operand is there."""
    q, k, v = (torch.randn(2, 97, 64, dtype=torch.float16) for _ in range(3))
    for late in (True, False):
        report = check_attention(q, k, v, 100, True, late)
        assert any(name.startswith("tcgen05.mma") for name in report.opcodes)


def check_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arch: int, causal: bool, late: bool) -> Report:
    tokens, dtype = q.shape[1], q.dtype
    report, out, lse = run_attention(q, k, v, arch, causal, late=late, seed=tokens)
    report.check()
    scores = q.double() @ k.double().mT / 8
    if causal:
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
    want = scores.softmax(-1) @ v.double()
    naive = (scores.to(dtype).softmax(-1) @ v).double()
    assert (out.double() - want).abs().max() <= 2 * (naive - want).abs().max() + torch.finfo(dtype).eps
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    return report


def test_the_tensor_cores_of_each_architecture_are_used() -> None:
    q, k, v = (torch.randn(1, 64, 64, dtype=torch.float16) for _ in range(3))
    ampere, hopper = (run_attention(q, k, v, arch, True)[0].opcodes for arch in (80, 90))
    assert any(name.startswith("mma.sync") for name in ampere)
    assert any(name.startswith("wgmma.mma_async") for name in hopper)
