"""Every case of gpu_cases.py on every place that it names: outputs and all gradients within the rule, and no finding.

The kernels' real PTX runs on the PTX machine, as sm_80 or sm_90. Where there is a GPU, the same list runs on it too.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

from posattn.encodings.base import Encoding
from posattn.parity import available
from tests.backends.gpu_cases import CASES, Case
from tests.ptxsim.seam import behind_launch
from tests.tolerance import assert_forward_parity, assert_parity

BACKENDS = {"cuda": "cuda.core", "triton": "triton"}


def _places() -> Iterator[Any]:
    """Every backend has every case at least once before the sweeps, on this or that architecture in turn."""
    for number, (name, case) in enumerate(CASES.items()):
        for backend in dict(case.on):
            on, quick = ([arch for b, arch in places if b == backend] for places in (case.on, case.quick))
            chosen = quick or [on[(number + (backend == "triton")) % len(on)]]
            for arch in on:
                mark = [] if arch in quick else [pytest.mark.slow if arch in chosen else pytest.mark.sweep]
                yield pytest.param(name, backend, arch, id=f"{name}-{backend}-sm_{arch}", marks=mark)


def check(case: Case, backend: str, device: str = "cpu") -> None:
    qkv, position, options = case.inputs()
    qkv = [x.to(device) for x in qkv]
    position = None if position is None else copy.deepcopy(position).to(device)
    options = tree_map_only(torch.Tensor, lambda x: x.to(device), options)
    (assert_parity if case.backward else assert_forward_parity)(*qkv, position, options, backend)


def poison(case: Case, backend: str, request: pytest.FixtureRequest) -> None:
    """Results start as NaN. Torch fills them in a mode in which CUDA refuses sums by atomics: those of positions."""
    options = case.inputs()[2]
    if backend != "cuda" or "q_positions" not in options or options.get("deterministic"):
        request.getfixturevalue("poisoned")


@pytest.mark.parametrize(("name", "backend", "arch"), list(_places()))
def test_on_the_machine(name: str, backend: str, arch: int, request: pytest.FixtureRequest) -> None:
    pytest.importorskip(BACKENDS[backend])
    case = CASES[name]
    poison(case, backend, request)
    torch.manual_seed(0)
    with behind_launch(arch):
        check(case, backend)


# Of every family of kernels: a plain tile, scores with operands of all kinds, mixed heads.
QUICK_FORWARD = ("causal window, grouped heads, softcap, sinks", "mix, packed documents, dropout, sinks")


def _forward_places() -> Iterator[Any]:
    for number, (name, case) in enumerate(CASES.items()):
        mark = [] if name in QUICK_FORWARD else [pytest.mark.sweep if number % 8 else pytest.mark.slow]
        for backend, arch in case.forward_on:
            yield pytest.param(name, backend, arch, id=f"{name}-{backend}-sm_{arch}", marks=mark)


@pytest.mark.parametrize(("name", "backend", "arch"), list(_forward_places()))
@pytest.mark.usefixtures("poisoned")
def test_forward_on_the_machine(name: str, backend: str, arch: int) -> None:
    pytest.importorskip(BACKENDS[backend])
    torch.manual_seed(0)
    with behind_launch(arch):
        check(dataclasses.replace(CASES[name], backward=False), backend)


ON_A_GPU = [(name, backend) for name, case in CASES.items() for backend in dict(case.on)]


@pytest.mark.parametrize(("name", "backend"), ON_A_GPU if torch.cuda.is_available() else [])
def test_on_the_gpu(name: str, backend: str, request: pytest.FixtureRequest) -> None:
    case = CASES[name]
    if backend not in available("cuda"):
        pytest.skip(f"backend {backend} does not run here")
    poison(case, backend, request)
    torch.manual_seed(0)
    check(case, backend, "cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arch", [80, 90])
def test_large_logits_stay_finite(backend: str, arch: int) -> None:
    """Logits in the thousands: exponents far outside float32's range if a row's maximum were not taken out first."""
    q, k, v = (torch.randn(1, 1, n, 64).to(torch.bfloat16) for n in (79, 170, 170))  # kernels as below
    with behind_launch(arch):
        assert_parity(100 * q, 100 * k, v, None, {"causal": True, "scale": 1.0}, backend)


# Triton compiles lengths that 16 divides anew.
ODD, WHOLE = range(65, 260, 14), (64, 128, 192, 256)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("lengths", [ODD, pytest.param(WHOLE, marks=pytest.mark.slow)], ids=["odd", "whole tiles"])
@pytest.mark.parametrize("dim", [64, pytest.param(32, marks=pytest.mark.slow)])
def test_every_remainder_of_a_tile(backend: str, arch: int, lengths: Sequence[int], dim: int) -> None:
    """Several lengths a test: they share their kernels."""
    with behind_launch(arch):
        for q_len in lengths:
            k_len = q_len if lengths is WHOLE else 1 + 2 * q_len % 190
            q, k, v = (torch.randn(1, 1, n, dim).to(torch.bfloat16) for n in (q_len, k_len, k_len))
            assert_parity(q, k, v, None, {"causal": True}, backend)


def test_every_backend_has_quick_cases_of_everything() -> None:
    """`make test` meets every operand and option on each of them, and each of its architectures."""
    for backend in BACKENDS:
        quick = [case for case in CASES.values() if backend in dict(case.quick)]
        assert {arch for case in quick for b, arch in case.quick if b == backend} == {80, 90}
        inputs = [case.inputs() for case in quick]
        options = {name for _, _, given in inputs for name in given}
        asked = {"causal", "window", "softcap", "sinks", "dropout_p", "bias", "mask", "cu_seqlens_q"}
        asked |= {"q_positions", "k_lengths", "k_starts", "offset", "deterministic"}
        assert asked <= options, (backend, asked - options)
        kinds = {type(part).__name__ for _, position, _ in inputs for part in _parts(position)}
        assert {"RoPE", "ALiBi", "Kerple", "FIRE"} <= kinds, (backend, kinds)


def _parts(position: Encoding | None) -> list[Any]:
    return [] if position is None else list(position.modules())
