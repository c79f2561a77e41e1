"""The kernels for AMX's tiles, on tiles emulated to the bit, so that a processor without them proves the same source.

tests/native/main.cpp runs them over its edge cases beside the other instruction sets and, where the processor has tiles
of its own, compares the bits.
"""

from __future__ import annotations

import sysconfig
from types import ModuleType

import pytest
import torch
from torch import Tensor

import posattn
from posattn import _cpu
from posattn.backends import cpu
from posattn.parity import examples
from tests.native.builds import driver, module, run
from tests.tolerance import assert_parity

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif("avx512bf16" not in _cpu.isas(), reason="all but the tiles is AVX-512 with BF16"),
]


@pytest.fixture(scope="module")
def emulated() -> ModuleType:
    built = module(f"tiles-{sysconfig.get_platform()}", "-DPOSATTN_ISAS=amx_emulated")
    built.set_isa("amx_emulated")
    return built


@pytest.fixture(autouse=True)
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "edge_cases" not in request.node.name:
        monkeypatch.setattr(cpu, "native", request.getfixturevalue("emulated"))


def tensors(heads: int, kv_heads: int, q_len: int, k_len: int, dim: int, value_dim: int = 0) -> list[Tensor]:
    shapes = ((heads, q_len, dim), (kv_heads, k_len, dim), (kv_heads, k_len, value_dim or dim))
    return [torch.randn(1, *shape).bfloat16() for shape in shapes]


@pytest.mark.slow
def test_edge_cases() -> None:
    isas = "baseline;avx512bf16;amx_emulated" + (";amx" if "amx" in _cpu.isas() else "")
    run(driver(f"tiles-cases-{sysconfig.get_platform()}", "posattn_cases", f"-DPOSATTN_ISAS={isas}"))


@pytest.mark.parametrize("name", ["RoPE", "ALiBi", "ALiBi signed", "Kerple", "T5Bias", "FIRE", "RelativeTable2D"])
def test_encodings(name: str) -> None:
    encoding = examples(4, 20, 196)[name]
    assert_parity(*tensors(4, 2, 150, 196, 20), encoding, {"causal": True}, "cpu")


# Past a tile of 512 keys, and a group of rows past the first block.
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (70, 3)}, {"window": (None, 2)}], ids=str)
@pytest.mark.parametrize("name", [None, "ALiBi", "FIRE"])
def test_many_keys(name: str | None, options: dict[str, object]) -> None:
    encoding = examples(1, 64, 700)[name] if name else None
    assert_parity(*tensors(1, 1, 75, 661, 64), encoding, options, "cpu")


@pytest.mark.parametrize(("dim", "value_dim"), [(1, 1), (7, 33), (32, 16), (64, 80), (100, 64), (256, 250)])
def test_head_dimensions(dim: int, value_dim: int) -> None:
    assert_parity(*tensors(2, 1, 67, 97, dim, value_dim), None, {"causal": True}, "cpu")


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
def test_options(options: dict[str, object], causal: bool) -> None:
    assert_parity(*tensors(2, 2, 75, 90, 40), posattn.ALiBi(2), options | {"causal": causal}, "cpu")


def test_references_rise_with_logits_that_outgrow_them() -> None:
    q, k, v = tensors(2, 2, 70, 600, 32)
    k = k * torch.linspace(40.0, 0.1, 600)[:, None].bfloat16()  # the last keys are read first
    assert_parity(q, k, v, None, {"scale": 2.0}, "cpu")


def test_logits_beyond_the_fast_path() -> None:
    q, k, v = tensors(1, 1, 40, 130, 16)
    q[0, 0, 5] *= 1e12
    assert_parity(q, k, v, None, {}, "cpu")


@pytest.mark.parametrize("row", [3, 69])
def test_a_nan_stays_in_its_row(row: int) -> None:
    q, k, v = tensors(1, 1, 70, 130, 16)
    q[0, 0, row, 0] = torch.nan
    out = posattn.attention(q, k, v, backend="cpu")
    assert torch.equal(out.isnan().any(-1).nonzero()[:, 2], torch.tensor([row]))


def test_a_key_of_infinity_weighs_all_or_nothing() -> None:
    q, k, v = torch.ones(1, 1, 4, 1).bfloat16(), torch.zeros(1, 1, 70, 1).bfloat16(), torch.ones(1, 1, 70, 1).bfloat16()
    k[0, 0, 7], v[0, 0, 7] = -torch.inf, 100.0
    assert posattn.attention(q, k, v, backend="cpu").float().flatten().tolist() == [1.0] * 4
