"""What is Triton's own in HeadMix (DAPE), on the PTX machine: far strides, wgmma, and what it refuses."""

from __future__ import annotations

import pytest
import torch

import posattn
from tests.backends.gpu_cases import tensors as tensors_of

pytest.importorskip("triton")

from tests.ptxsim.seam import Machine, ptx_machine  # noqa: F401

pytestmark = pytest.mark.usefixtures("ptx_machine")


def tensors(heads=3, kv_heads=3, q_len=37, k_len=53, dim=32):
    return tensors_of(heads=heads, kv_heads=kv_heads, q_len=q_len, k_len=k_len, dim=dim)


@pytest.mark.slow
def test_heads_far_apart():
    """Offsets of heads that 32 bits do not hold; the memory between them is never touched."""
    q, k, v = tensors(heads=2, kv_heads=2, q_len=5, k_len=21, dim=16)
    far = torch.empty((1 << 29) + q[0, 0].numel(), dtype=q.dtype).as_strided(q.shape, (1 << 30, 1 << 29, 16, 1))
    far.copy_(q)
    position = posattn.DAPE(posattn.Kerple(2), 2, width=8)
    with torch.no_grad():
        near = posattn.attention(q, k, v, position, causal=True, backend="triton")
        assert torch.equal(posattn.attention(far, k, v, position, causal=True, backend="triton"), near)


def test_sm_90_mixes_by_wgmma(ptx_machine: Machine):  # noqa: F811
    posattn.attention(*tensors(), posattn.DAPE(None, 3, width=8), causal=True, backend="triton")
    (launched,) = [x for x in ptx_machine.launches if x.kernel == "headmix_forward"]
    assert ("wgmma" in launched.compiled.ptx) == (ptx_machine.arch == 90)


@pytest.mark.parametrize(
    ("heads", "dim", "width", "reason"),
    [
        (33, 16, 8, "up to 32 heads"),
        (4, 16, 65, "up to 64 hidden units"),
        (32, 65, 8, "4 heads of 128 columns, got"),
        (9, 256, 8, "2 heads of 256 columns, got"),
    ],
)
def test_what_does_not_fit_is_refused(heads, dim, width, reason):
    q, k, v = tensors(heads=heads, kv_heads=heads, dim=dim)
    with pytest.raises(ValueError, match=reason):
        posattn.attention(q, k, v, posattn.DAPE(None, heads, width=width), backend="triton")
