"""Triton's own launcher, before a driver without a device: it compiles what the PTX machine runs in the tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

import triton.runtime
from triton.backends.compiler import GPUTarget

import posattn
from posattn.backends.triton import launch as seam
from tests.ptxsim.seam import behind_launch
from tests.ptxsim.triton_run import compile_triton

ARCH = 80


class Driver:
    """Loads every binary and starts nothing; notes what it was to start."""

    def __init__(self) -> None:
        self.started: list[tuple[int, ...]] = []
        loaded = ("module", "function", 0, 0, 1024)
        properties = {"max_shared_mem": 166_912}
        self.utils = SimpleNamespace(
            load_binary=lambda *_: loaded, unload_module=lambda _: None, get_device_properties=lambda _: properties
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *given: self.started.append(given[:3])

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)


def instructions(ptx: str) -> list[str]:
    """Without line numbers and what follows the code, which hold the paths of whoever compiled it first."""
    code = ptx.split("\t.file")[0]
    return [line for line in code.splitlines() if not line.lstrip().startswith((".loc", "//"))]


@pytest.mark.parametrize(("dim", "bounded"), [(64, set()), (256, {"attention_backward"})])
def test_it_compiles_what_the_machine_runs(monkeypatch: pytest.MonkeyPatch, dim: int, bounded: set[str]) -> None:
    driver = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    launch = seam.launch
    grids, with_maxnreg = [], set()

    def both(
        kernel: Any, grid: Any, args: Any, constexprs: Any, num_warps: int, num_stages: int, registers: int | None
    ) -> None:
        launch(kernel, grid, args, constexprs, num_warps, num_stages, registers)
        (caches,) = kernel.device_caches.values()
        (compiled,) = caches[0].values()
        kernel.device_caches.clear()  # a compiled kernel unloads itself from the driver, so none may outlive this one
        given = {"arch": ARCH, "num_warps": num_warps, "num_stages": num_stages, "registers": registers}
        expected, _ = compile_triton(kernel, args, constexprs=constexprs, **given)
        assert instructions(compiled.asm["ptx"]) == instructions(expected.ptx)
        grids.append((*grid, 1, 1)[:3])
        if ".maxnreg" in compiled.asm["ptx"]:
            with_maxnreg.add(kernel.__name__)

    device = {"architecture": lambda _: f"sm_{ARCH}", "processors": lambda _: 108}
    with mock.patch.multiple(seam, launch=both, has_device=lambda _: True, **device):
        q, k, v = (torch.randn(1, 2, 100, dim, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        posattn.attention(q, k, v, posattn.RoPE(dim) + posattn.ALiBi(2), causal=True, backend="triton").sum().backward()
    assert driver.started == grids
    assert len(grids) >= 3
    assert with_maxnreg == bounded


@pytest.mark.parametrize("packed", [False, True])
def test_decoding_turns_keys_within_the_tile_of_decoding(packed: bool) -> None:
    """Many sequences of few queries are decoding too, packed or not."""
    shape = (1, 2, 40, 128) if packed else (40, 2, 1, 128)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16) for _ in range(3))
    documents = torch.arange(41)
    options = {"cu_seqlens_q": documents, "cu_seqlens_k": documents} if packed else {}
    with behind_launch(ARCH) as machine:
        posattn.attention(q, k, v, posattn.RoPE(128), causal=True, backend="triton", **options)
    (launched,) = machine.launches
    assert launched.constexprs["BLOCK_M"] == 16
