"""Keys that a falling bias puts out of reach are left out, and only those, on GPUs: kernels/attention/reach.py and
csrc/cuda/reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import posattn
from posattn.backends.common import reach
from posattn.backends.cuda import reach as cuda_reach
from posattn.backends.triton import launch as seam
from posattn.backends.triton.arguments import attention_arguments
from posattn.backends.triton.reach import keys_in_reach
from posattn.plan import Bias, Call, Dense, Gated, Mask, Plan, Slope, Table
from tests.backends.gpu_cases import in_pages
from tests.ptxsim.seam import Machine, behind_launch
from tests.tolerance import assert_forward_parity, assert_parity
from tools.gpu_budget.reach import first_keys

BF16, FULL = torch.bfloat16, torch.float32
BACKENDS = {"cuda": "cuda.core", "triton": "triton"}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(BACKENDS[request.param])
    return str(request.param)


@pytest.fixture(autouse=True)
def _short_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a machine in software meets reach."""
    monkeypatch.setattr(reach, "LEAST_KEYS", 65)
    monkeypatch.setattr(reach, "LEAST_KEYS_TABLE", 65)
    monkeypatch.setattr(reach, "LEAST_BYTES_DECODING", 0)


def tensors(
    dtype: torch.dtype = BF16, q_len: int = 200, k_len: int = 700, heads: int = 2, kv_heads: int = 2, dim: int = 32
) -> list[Tensor]:
    shapes = ((heads, q_len), (kv_heads, k_len), (kv_heads, k_len))
    return [torch.randn(1, *shape, dim).to(dtype) for shape in shapes]


def steep(slope: float = 2.0, signed: bool = False) -> posattn.ALiBi:
    return posattn.ALiBi(2, slopes=[slope, slope / 4], learnable=True, signed=signed)


def looked(machine: Machine) -> bool:
    return "find_reach" in {launched.kernel for launched in machine.launches}


@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=pytest.mark.slow)])
def test_far_tiles_are_not_read_and_a_huge_key_among_them_is(backend: str, arch: int) -> None:
    """Forward, backward and decoding: one kernel each for all that differs in data alone."""
    q, k, v = tensors()
    with behind_launch(arch) as machine:
        far = v.clone()
        far[:, :, :128] = torch.nan  # of weight zero, which times NaN would be NaN
        far.requires_grad_()
        out = posattn.attention(q, k, far, steep(), causal=True, backend=backend)
        assert looked(machine)
        assert not out.isnan().any()
        out.sum().backward()
        assert far.grad is not None
        assert not far.grad[:, :, :128].any()
        assert far.grad[:, :, -1].all()

        k[:, :, 3] = 200.0 * q[:, :, 150].sign()  # its logit outweighs the distance in that row
        k[:, :, 300] = -k[:, :, 3]  # and keeps the cells behind it from being the first
        assert_parity(q, k, v, steep(), {"causal": True, "deterministic": True}, backend)
        reached = posattn.attention(q, k, far, steep(), causal=True, backend=backend)
        assert reached[:, :, 150].isnan().all()


def rising() -> posattn.RelativeTable:
    """A table that falls with the distance, and has a peak beyond."""
    encoding = posattn.RelativeTable(2, 700)
    distance = torch.arange(-700.0, 701.0)
    encoding.weight.data = (-0.5 * distance.abs() + 250.0 * ((distance - 500.0).abs() < 8.0)).expand(2, -1).clone()
    return encoding


def packed() -> dict[str, Any]:
    bounds = torch.tensor([0, 300, 310, 700], dtype=torch.int32)
    return {"causal": True, "cu_seqlens_q": bounds, "cu_seqlens_k": bounds}


def shared() -> posattn.ALiBi:
    return posattn.ALiBi(4, slopes=[2.0, 0.5, 0.1, 1.0], learnable=True)


def beyond() -> dict[str, Any]:
    """Row i stands at key i + 790, behind the last of its keys, 5 to 649: that is its nearest."""
    return {"causal": True, "offset": 790, "k_starts": torch.tensor([5]), "k_lengths": torch.tensor([650])}


CASES: dict[str, Any] = {
    "both sides": (tensors, steep, dict),
    "signed, window, softcap": (tensors, lambda: steep(1.0, signed=True), lambda: {"window": (600, 0), "softcap": 3.0}),
    "a table that rises again": (tensors, rising, lambda: {"causal": True}),
    "packed documents": (lambda: tensors(q_len=700), steep, packed),
    "shared keys, rotary, lengths": (
        lambda: tensors(heads=4, kv_heads=2),
        lambda: posattn.RoPE(32, scaling=posattn.YaRN(4.0, 64)) + shared(),
        lambda: {"causal": True, "k_lengths": torch.tensor([650])},
    ),
    "behind the last key": (tensors, steep, beyond),
    "slopes that rise, dropout, sinks": (
        tensors,
        lambda: steep(-0.3),
        lambda: {"causal": True, "dropout_p": 0.2, "sinks": torch.tensor([1.0, -3.0])},
    ),
    "float32, table, slope": (
        lambda: tensors(FULL, dim=16),
        lambda: steep() + posattn.Kerple(2, form="power"),
        lambda: {"causal": True, "scale": -0.5},
    ),
}


# The others compile two kernels each.
QUICK = ("both sides",)
PLACES = [
    pytest.param(name, backend, marks=[] if name in QUICK else [pytest.mark.slow])
    for name in CASES
    for backend in BACKENDS
    if backend == "triton" or not name.startswith("float32")
]


@pytest.mark.parametrize(("name", "backend"), PLACES)
def test_parity(name: str, backend: str) -> None:
    pytest.importorskip(BACKENDS[backend])
    make, position, options = CASES[name]
    with behind_launch(80 + 10 * (list(CASES).index(name) % 2)) as machine:
        assert_parity(*make(), position(), options(), backend)
        assert looked(machine)


def test_decoding_from_pages(backend: str) -> None:
    """One kernel of few rows, whose keys are turned in it, in parts."""
    torch.manual_seed(0)
    q, k, v = tensors(q_len=3)
    k[:, 0, 40] = 100.0 * q[:, 0, 1].sign()
    (q, k, v), options = in_pages(24, [q, k, v], {"causal": True, "k_lengths": torch.tensor([650])})
    with behind_launch(80) as machine:
        assert_forward_parity(q, k, v, posattn.RoPE(32) + steep(), options, backend)
        assert looked(machine)


def found(q: Tensor, k: Tensor, slopes: Tensor, block: int, backend: str) -> Tensor:
    """[blocks of queries, H, 2] of a causal call, from the kernels."""
    tokens = {"max_q": q.shape[2], "max_k": k.shape[2]}
    call = Call(q, k, k, Plan(bias=Bias(slope=Slope(slopes))), Mask(causal=True, **tokens), q.shape[3] ** -0.5)
    with behind_launch(80):
        if backend == "triton":
            kept = keys_in_reach(call, seam.launch, q, k, block, attention_arguments(call, block, 64))
        else:
            kept = cuda_reach.keys_in_reach(call, q, k, block)
    assert kept is not None
    return kept


def test_the_model_is_what_the_kernels_do(backend: str) -> None:
    q, k, _ = tensors(q_len=700)
    slopes = torch.tensor([1.0, 0.3])
    kept = found(q, k, slopes, 64, backend)
    for h in range(2):
        expected = first_keys(q[0, h], k[0, h], float(slopes[h]), 64)
        assert torch.equal(kept[:, h, 0], expected.int())
        assert 0 < expected[-1] < 640


def test_what_is_left_out_weighs_less_than_rounding_at_worst(backend: str) -> None:
    """Near keys point away from the queries, far ones towards them: no bound of norms can be tighter, and this one is
    not far from it."""
    q, k = torch.full((1, 2, 64, 32), 1.5), torch.full((1, 2, 1200, 32), -1.5)
    k[:, :, :1000] *= -1.0
    slopes = torch.tensor([0.2, 0.07])
    kept = found(q.bfloat16(), k.bfloat16(), slopes, 64, backend)
    i, j = torch.arange(1136, 1200)[:, None], torch.arange(1200)[None, :]
    for h in range(2):
        logits = (q[0, h].double() @ k[0, h].double().T) * 32**-0.5 - slopes[h] * (i - j).abs()
        weights = logits.masked_fill(j > i, -torch.inf).softmax(1)
        first = int(kept[0, h, 0])
        left = 0.0 if first == 0 else float(weights[:, :first].sum(1).max())
        assert left < 2.0**-40
        assert weights[:, : first + 128].sum(1).max() > 2.0**-66
    assert kept[0, 0, 0] > 64


def test_reach_asks_for_near_keys_that_are_seen() -> None:
    """A mask may hide any of them, a dense bias too; positions need not be in order; short calls gain nothing."""
    q, k, v = tensors()
    slope, mask = Slope(torch.ones(2)), Mask(causal=True, max_q=200, max_k=700)
    positions = torch.arange(700)[None]

    def asked(bias: Bias, mask: Mask = mask, gated: Gated | None = None, **options: Any) -> bool:
        return reach.worthwhile(Call(q, k, v, Plan(bias=bias, gated=gated), mask, 1.0, **options), 16)

    falling = Bias(slope=slope)
    assert asked(falling)
    assert asked(Bias(table=Table(torch.ones(2, 9), 0)))
    assert not asked(Bias())
    assert not asked(falling, gated=Gated(torch.ones(1, 3, 32)))
    assert not asked(Bias(slope=slope, dense=Dense(torch.ones(1, 1, 1, 700))))
    assert not asked(falling, Mask(boolean=torch.ones(1, 1, 200, 700, dtype=torch.bool)))
    assert not asked(falling, q_positions=positions[:, :200], k_positions=positions)
    assert not asked(falling, Mask(max_q=64, max_k=64))
