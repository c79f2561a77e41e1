"""Which GPU backend "auto" takes on which architecture."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from posattn import backends
from posattn.backends.cuda import compiler
from posattn.backends.cuda import launch as cuda_launch
from posattn.backends.triton import launch as triton_launch
from posattn.plan import Call, Mask, Plan


def chosen(arch: str, q_len: int, *, triton: bool = True, backward: bool = False) -> str:
    q, k, v = (torch.empty(1, 2, n, 64, dtype=torch.bfloat16) for n in (q_len, 300, 300))
    call = Call(q, k, v, Plan(), Mask(max_q=q_len, max_k=300), 0.125)
    device = {"architecture": lambda device: arch, "has_device": lambda device: True}
    with (
        mock.patch.multiple(cuda_launch, **device),
        mock.patch.multiple(triton_launch, **device | {"has_device": lambda device: triton}),
        mock.patch.dict(backends._AUTO, cpu=backends._AUTO["cuda"]),
    ):
        return backends.choose(call, "auto", backward).__name__.rpartition(".")[2]


@pytest.mark.skipif(compiler.missing() is not None, reason="the cuda backend needs cuda.core and NVRTC")
def test_triton_where_cuda_leaves_tensor_cores_unused() -> None:
    """Of data-center Blackwell's tensor memory; few queries wait for memory, whatever multiplies."""
    pytest.importorskip("triton")
    assert [chosen(f"sm_{n}", 300) for n in (80, 89, 90, 100, 103, 120)] == [
        *("cuda", "cuda", "cuda", "triton", "triton", "cuda"),
    ]
    assert chosen("sm_100", 8) == "cuda"
    assert chosen("sm_100", 300, triton=False) == "cuda"
    assert chosen("sm_100", 300, backward=True) == "cuda"
