"""Triton's own launcher, before a driver without a device: it compiles what the PTX machine runs in the tests."""

import re
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
import triton.runtime
from triton.backends.compiler import GPUTarget

import posattn
from posattn.backends.triton import launch as seam
from tests.backends.gpu_cases import alibi, tensors
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


@pytest.mark.parametrize(
    ("dim", "bounded"), [(64, set()), pytest.param(256, {"attention_backward"}, marks=pytest.mark.slow)]
)
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
        # Of dimension 64, kernels that test_gpu_parity.py compiles as well.
        q, k, v = (x.requires_grad_() for x in tensors(dim=dim))
        posattn.attention(q, k, v, posattn.RoPE(dim) + alibi(), causal=True, backend="triton").sum().backward()
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


@pytest.mark.parametrize(
    ("version", "runs"),
    [("3.5.1", False), ("2.3", False), ("3.6.0", True), ("3.10.0+git1", True), ("10.0", True), ("unreleased", True)],
)
def test_an_older_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch, version: str, runs: bool) -> None:
    """Named before a device is asked for, so this needs none."""
    monkeypatch.setattr(triton, "__version__", version)
    q = torch.zeros(1, 1, 4, 16, dtype=torch.float16)
    reason = f"it needs Triton 3.6 or later, got {version}" if not runs else "it needs a CUDA or HIP device"
    with pytest.raises(ValueError, match=re.escape(reason)):
        posattn.attention(q, q, q, backend="triton")


class Pair(NamedTuple):
    Out: Any
    number: Any


@triton.jit(do_not_specialize=("seed",))
def takes_tuples(pair: Pair, nested, absent, seed, BLOCK: tl.constexpr):
    if absent.Out is None:
        at = pair.Out + tl.arange(0, BLOCK)
        tl.store(at, pair.number + nested[1].number * nested[0] + seed)
    else:
        tl.store(absent.Out, 0.0)


@pytest.mark.parametrize("number", [1, 16, 3, 2**40, 0.5])
def test_members_of_tuples_are_specialised_as_the_launcher_does(monkeypatch: pytest.MonkeyPatch, number: float) -> None:
    """None and 1 compiled in, multiples of 16 and aligned pointers known as such, a seed as it comes."""
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    for out in (torch.zeros(33), torch.zeros(33)[1:]):
        args = Pair(out, number), (2, Pair(None, 48)), Pair(None, None), 1
        with mock.patch.object(torch.cuda, "device_of", nullcontext):
            seam.launch(takes_tuples, (1,), args, {"BLOCK": 32}, 1, 1)
        (caches,) = takes_tuples.device_caches.values()
        (compiled,) = caches[0].values()
        takes_tuples.device_caches.clear()
        found, passed = compile_triton(
            takes_tuples, args, arch=ARCH, num_warps=1, num_stages=1, constexprs={"BLOCK": 32}
        )
        assert instructions(compiled.asm["ptx"]) == instructions(found.ptx)
        assert len(passed) == (4 if number == 1 else 5)
        found.launch((1,), passed)
        assert torch.equal(out[:32], torch.full((32,), number + 97.0))


@pytest.mark.parametrize(
    ("arch", "dtype", "dim", "widest"),
    [
        ("sm_80", torch.float32, 512, None),
        ("sm_80", torch.bfloat16, 513, 512),
        ("sm_86", torch.bfloat16, 512, None),
        ("sm_120", torch.float32, 257, 256),
        ("gfx942", torch.bfloat16, 257, 256),
    ],
)
def test_wide_heads_are_refused_where_their_tiles_do_not_fit(monkeypatch, arch, dtype, dim, widest):
    from posattn.backends import triton
    from posattn.plan import Bias, Call, Mask, Plan

    monkeypatch.setattr(triton.seam, "has_device", lambda device: True)
    monkeypatch.setattr(triton.seam, "architecture", lambda device: arch)
    q = torch.zeros(1, 1, 2, dim, dtype=dtype)
    reason = triton.unsupported(Call(q, q, q, Plan(bias=Bias()), Mask(max_q=2, max_k=2), 1.0))
    assert reason == (None if widest is None else f"it takes head dimensions up to {widest} here, got {dim}")
