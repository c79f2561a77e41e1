"""Every family of CUDA kernels is compiled with exactly the constants that its sources use, as the compiler sees it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import posattn
from posattn.backends.common import reach
from posattn.backends.cuda import compiler, launch
from posattn.backends.cuda.constants import definitions

pytest.importorskip("cuda.core")
from cuda.bindings import nvrtc

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"


def _plans(heads: int) -> list[Any]:
    everything = posattn.RoPE(64) + posattn.ALiBi(heads, learnable=True) + posattn.Kerple(heads)
    profile = posattn.FIRE(heads, width=8)
    return [everything, profile, posattn.DAPE(everything, heads, width=8), posattn.DAPE(profile, heads, width=8)]


@cache
def launched() -> dict[str, dict[tuple[Any, ...], str]]:
    """By source: constants that the package compiles it with, and the text that is compiled."""
    found: dict[str, dict[tuple[Any, ...], str]] = {}

    def note(source: str, entry: str, struct: str, constants: tuple[Any, ...], arch: str) -> compiler.Kernel:
        found.setdefault(source, {})[constants] = compiler.specialised(source, struct, constants)
        return compiler.Kernel(entry, arch, "", b"")

    device: dict[str, Any] = {"has_device": lambda _: True, "launch": lambda *_: None, "processors": lambda _: 108}
    for arch in ("sm_80", "sm_90"):
        device["architecture"] = lambda _, arch=arch: arch
        with mock.patch.object(compiler, "compile_kernel", note), mock.patch.multiple(launch, **device):
            for position in _plans(4):
                for q_len in (1, 300):
                    q, k, v = (
                        torch.zeros(1, 4, n, 64, dtype=torch.float16, requires_grad=True) for n in (q_len, 600, 600)
                    )
                    options = {"causal": True, "softcap": 5.0, "bias": torch.zeros(1, 4, q_len, 600)}
                    posattn.attention(q, k, v, position, backend="cuda", **options).sum().backward()
            with mock.patch.multiple(reach, LEAST_KEYS_TABLE=600):
                falling = posattn.ALiBi(4) + posattn.Kerple(4)
                posattn.attention(q, k, v, falling, softcap=5.0, deterministic=True, backend="cuda").sum().backward()
    return found


def _used(text: str) -> set[str]:
    """The constants whose deprecation the compiler notes in `text`: those that it meets, a template's parameter or a
    word in a comment not among them."""
    constants, rest = text.split("}", 1)
    deprecated = constants.replace("constexpr", "[[deprecated]] constexpr") + "}" + rest
    arch = "compute_90a" if "sm90" in rest else "compute_80"
    _, program = nvrtc.nvrtcCreateProgram(deprecated.encode(), b"specialised.cu", 0, [], [])
    options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17", f"-I{SOURCES}".encode()]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
    nvrtc.nvrtcGetProgramLog(program, log)
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    return set(re.findall(r'variable "posattn::(\w+)" was declared deprecated', log.decode()))


@pytest.mark.parametrize("source", sorted(str(path.relative_to(SOURCES)) for path in SOURCES.rglob("*.cu")))
def test_constants_are_those_that_the_source_uses(source):
    """One that is missing does not compile. What a template uses counts once it is instantiated, so all texts do."""
    texts = launched()[source]
    given = {frozenset(name for name, _ in definitions(constants)) for constants in texts}
    used = set().union(*map(_used, texts.values()))
    assert given == {frozenset(used)}
