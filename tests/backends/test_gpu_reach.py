"""Keys that a falling bias puts out of reach are left out, and only those, on GPUs: kernels/attention/reach.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import posattn
from posattn.backends.common import reach
from tests.ptxsim.seam import Machine, behind_launch
from tests.tolerance import assert_forward_parity, assert_parity

BF16, FULL = torch.bfloat16, torch.float32


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


@pytest.mark.parametrize("arch", [80, 90])
def test_far_tiles_are_not_read_and_a_huge_key_among_them_is(arch: int) -> None:
    """Forward, backward and decoding: one kernel each for all that differs in data alone."""
    q, k, v = tensors()
    with behind_launch(arch) as machine:
        far = v.clone()
        far[:, :, :128] = torch.nan  # of weight zero, which times NaN would be NaN
        far.requires_grad_()
        out = posattn.attention(q, k, far, steep(), causal=True, backend="triton")
        assert looked(machine)
        assert not out.isnan().any()
        out.sum().backward()
        assert far.grad is not None
        assert not far.grad[:, :, :128].any()
        assert far.grad[:, :, -1].all()

        k[:, :, 3] = 200.0 * q[:, :, 150].sign()  # its logit outweighs the distance in that row
        assert_parity(q, k, v, steep(), {"causal": True}, "triton")
        reached = posattn.attention(q, k, far, steep(), causal=True, backend="triton")
        assert reached[:, :, 150].isnan().all()
