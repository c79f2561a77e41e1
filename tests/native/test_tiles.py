"""The kernels for AMX's tiles, on tiles emulated to the bit, so that a processor without them proves the same source.

tests/native/main.cpp runs them over its edge cases beside the other instruction sets and, where the processor has tiles
of its own, compares the bits.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

import posattn
from posattn import _cpu
from posattn.backends import cpu
from posattn.parity import examples
from tests.native.builds import ALWAYS_TILES, PLAINLY, driver, module, run
from tests.tolerance import assert_parity

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif("avx512bf16" not in _cpu.isas(), reason="all but the tiles is AVX-512 with BF16"),
]


@pytest.fixture(scope="module")
def emulated() -> ModuleType:
    built = module(f"tiles-{sysconfig.get_platform()}", "-DPOSATTN_ISAS=amx_emulated", ALWAYS_TILES, *PLAINLY)
    built.set_isa("amx_emulated")
    return built


@pytest.fixture(autouse=True)
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "edge_cases" not in request.node.name:
        monkeypatch.setattr(cpu, "native", request.getfixturevalue("emulated"))


# bfloat16 numbers are multiplied as they are, float16's as sums of two of them, float32's of three.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def tensors(
    heads: int, kv_heads: int, q_len: int, k_len: int, dim: int, value_dim: int = 0, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    shapes = ((heads, q_len, dim), (kv_heads, k_len, dim), (kv_heads, k_len, value_dim or dim))
    return [torch.randn(1, *shape).to(dtype) for shape in shapes]


@pytest.mark.parametrize(
    "step", [pytest.param("5", marks=pytest.mark.slow), pytest.param("1", marks=pytest.mark.sweep)]
)
def test_edge_cases(step: str) -> None:
    isas = "baseline;avx512bf16;amx_emulated" + (";amx" if "amx" in _cpu.isas() else "")
    run(
        driver(f"tiles-cases-{sysconfig.get_platform()}", "posattn_cases", f"-DPOSATTN_ISAS={isas}", ALWAYS_TILES), step
    )


@each_dtype
@pytest.mark.parametrize("name", ["RoPE", "ALiBi", "ALiBi signed", "Kerple", "T5Bias", "FIRE", "RelativeTable2D"])
def test_encodings(name: str, dtype: torch.dtype) -> None:
    encoding = examples(4, 20, 196)[name]
    assert_parity(*tensors(4, 2, 150, 196, 20, dtype=dtype), encoding, {"causal": True}, "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
# Past a tile of 512 keys, and a group of rows past the first block.
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (70, 3)}, {"window": (None, 2)}], ids=str)
@pytest.mark.parametrize("name", [None, "ALiBi", "FIRE"])
def test_many_keys(name: str | None, options: dict[str, object], dtype: torch.dtype) -> None:
    encoding = examples(1, 64, 700)[name] if name else None
    assert_parity(*tensors(1, 1, 75, 661, 64, dtype=dtype), encoding, options, "cpu")


@each_dtype
@pytest.mark.parametrize(("dim", "value_dim"), [(1, 1), (7, 33), (32, 16), (64, 80), (100, 64), (256, 250), (512, 300)])
def test_head_dimensions(dim: int, value_dim: int, dtype: torch.dtype) -> None:
    assert_parity(*tensors(2, 1, 67, 97, dim, value_dim, dtype), None, {"causal": True}, "cpu")


@each_dtype
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 5.0},
        {"dropout_p": 0.3},
        {"sinks": torch.tensor([0.3, -2.0])},
        {"bias": torch.linspace(-3.0, 3.0, 2 * 75 * 90).view(2, 75, 90)},
        {"mask": torch.arange(75 * 90).view(75, 90) % 3 != 0},
        {"scale": -0.2},
        {"k_lengths": torch.tensor([50])},
        {
            "cu_seqlens_q": torch.tensor([0, 33, 33, 75], dtype=torch.int32),
            "cu_seqlens_k": torch.tensor([0, 20, 50, 90], dtype=torch.int32),
        },
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_options(options: dict[str, object], causal: bool, dtype: torch.dtype) -> None:
    assert_parity(*tensors(2, 2, 75, 90, 40, dtype=dtype), posattn.ALiBi(2), options | {"causal": causal}, "cpu")


@each_dtype
def test_references_rise_with_logits_that_outgrow_them(dtype: torch.dtype) -> None:
    q, k, v = tensors(2, 2, 70, 600, 32, dtype=dtype)
    k = k * torch.linspace(40.0, 0.1, 600)[:, None].to(dtype)  # the last keys are read first
    assert_parity(q, k, v, None, {"scale": 2.0}, "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_logits_beyond_the_fast_path(dtype: torch.dtype) -> None:
    q, k, v = tensors(1, 1, 40, 130, 16, dtype=dtype)
    q[0, 0, 5] *= 1e12
    assert_parity(q, k, v, None, {}, "cpu")


@each_dtype
@pytest.mark.parametrize("row", [3, 69])
def test_a_nan_stays_in_its_row(row: int, dtype: torch.dtype) -> None:
    q, k, v = tensors(1, 1, 70, 130, 16, dtype=dtype)
    q[0, 0, row, 0] = torch.nan
    out = posattn.attention(q, k, v, backend="cpu")
    assert torch.equal(out.isnan().any(-1).nonzero()[:, 2], torch.tensor([row]))


@each_dtype
def test_a_key_of_infinity_weighs_all_or_nothing(dtype: torch.dtype) -> None:
    q, k, v = (torch.full((1, 1, tokens, 1), value, dtype=dtype) for tokens, value in ((4, 1.0), (70, 0.0), (70, 1.0)))
    k[0, 0, 7], v[0, 0, 7] = -torch.inf, 100.0
    assert posattn.attention(q, k, v, backend="cpu").float().flatten().tolist() == [1.0] * 4


# Largest numbers at which parts are used, and such as have no parts or lose theirs to flushing.
@pytest.mark.parametrize("power", [-100, -61, -59, 59, 61, 90])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_sizes_of_float32(name: str, power: int) -> None:
    q, k, v = tensors(1, 1, 40, 70, 33, dtype=torch.float32)
    for x in (q, k, v):
        x /= x.abs().max()  # so that the largest is 2^power
    q, k, scale = q * 4, k * 4, 1.0
    by = 2.0**power
    if name == "value":
        v = v * by
    else:
        q, k, scale = (q * by, k, scale / by) if name == "query" else (q, k * by, scale / by)
    unit = by if name == "value" else 1.0
    exact = posattn.attention(q.double(), k.double(), v.double(), scale=scale, backend="reference") / unit

    def error(backend: str) -> float:
        got = posattn.attention(q, k, v, scale=scale, backend=backend).double() / unit
        return (got - exact).abs().max().item()

    assert error("cpu") < 2 * error("reference") + 2e-7


# dS is as small as the output's gradient; at -100 its smallest elements are still normal numbers.
@pytest.mark.parametrize("power", [-100, -61, -59, 59, 61])
def test_sizes_of_gradients(power: int) -> None:
    by = 2.0**power

    def gradients(dtype: torch.dtype, backend: str) -> list[Tensor]:
        torch.manual_seed(3)
        leaves = [x.to(dtype).requires_grad_() for x in tensors(1, 1, 40, 70, 33, dtype=torch.float32)]
        out = posattn.attention(*leaves, backend=backend)
        grad = torch.randn(out.shape)
        return list(torch.autograd.grad(out, leaves, (grad / grad.abs().max() * by).to(dtype)))

    exact, naive = gradients(torch.float64, "reference"), gradients(torch.float32, "reference")
    for got, near, expected in zip(gradients(torch.float32, "cpu"), naive, exact):
        error, allowed = ((x.double() - expected).abs().max().item() / by for x in (got, near))
        assert error < 2 * allowed + 2e-7


@pytest.fixture
def medium() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def errors() -> list[float]:
    """Largest errors of output and gradients in float32, each of the largest number."""
    found = []
    torch.manual_seed(1)
    tensors_ = tensors(2, 1, 70, 130, 64, dtype=torch.float32)
    results = []
    for dtype, backend in ((torch.float32, "cpu"), (torch.float64, "reference")):
        leaves = [x.to(dtype).requires_grad_() for x in tensors_]
        out = posattn.attention(*leaves, causal=True, backend=backend)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for got, exact in zip(*results):
        found.append(((got.double() - exact).abs().max() / exact.abs().max()).item())
    return found


def test_highest_precision_is_all_of_float32() -> None:
    assert all(error < 1e-6 for error in errors())


@pytest.mark.usefixtures("medium")
def test_medium_precision_is_sixteen_bits() -> None:
    assert all(2e-6 < error < 6e-5 for error in errors())
