"""HeadMix (DAPE) in Triton, its real PTX on the PTX machine: every form and inner operand, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch

import posattn
from posattn.parity import compare
from tests.backends.headmix_cases import SHARED, tensors
from tests.tolerance import assert_parity

pytest.importorskip("triton")

from tests.ptxsim.seam import Machine, ptx_machine  # noqa: F401

pytestmark = pytest.mark.usefixtures("ptx_machine")


CASES = {
    **SHARED,
    # 9 to 12 heads: two warps share each of the last ones. Keys for a tile inside the mask and one on its border.
    "rotary, grouped heads": (
        {"heads": 12, "kv_heads": 4, "q_len": 18, "k_len": 85, "dim": 64, "dtype": torch.float16},
        lambda: posattn.DAPE(posattn.RoPE(64) + posattn.Kerple(12), 12), lambda: {"causal": True},
    ),
    "nine heads, dropout, window, mask": (
        {"heads": 9, "kv_heads": 9, "q_len": 17, "k_len": 70, "dim": 24},
        lambda: posattn.DAPE(posattn.ALiBi(9), 9, width=8),
        lambda: {"bias": torch.randn(1, 1, 17, 70), "sinks": torch.randn(9), "dropout_p": 0.3, "window": (60, None),
                 "mask": torch.rand(1, 9, 17, 70) < 0.7},
    ),
    "logits far from what is mixed": (
        {"heads": 2, "kv_heads": 2, "q_len": 5, "k_len": 7, "dim": 16, "dtype": torch.float16},
        lambda: posattn.DAPE(posattn.Kerple(2), 2, width=4), lambda: {"scale": 20.0},
    ),
    "float32": (
        {"heads": 2, "kv_heads": 2, "q_len": 18, "k_len": 21, "dim": 16, "dtype": torch.float32},
        lambda: posattn.DAPE(posattn.Kerple(2), 2, width=4), lambda: {"causal": True},
    ),
}  # fmt: skip


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(case):
    shape, position, options = case
    torch.manual_seed(3)
    assert_parity(*tensors(**shape), position(), options(), "triton")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("heads", "position"),
    [
        (9, lambda: posattn.DAPE(posattn.Kerple(9), 9, width=8)),
        (3, lambda: posattn.DAPE(posattn.FIRE(3, width=6), 3, width=8)),
    ],
    ids=["table, nine heads", "profile"],
)
def test_explicit_positions_in_any_order(heads, position):
    positions = {"q_positions": torch.randint(0, 30, (5,)), "k_positions": torch.randint(0, 30, (53,))}
    shape = {"heads": heads, "kv_heads": heads, "q_len": 5}
    assert_parity(*tensors(**shape), position(), {**positions, "deterministic": True}, "triton")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("heads", "dim", "width"), [(1, 16, 1), (32, 64, 64), (8, 256, 8)])
def test_limits(heads, dim, width):
    """The smallest and the largest that fit, forward alone: the rest takes a minute to compile."""
    q, k, v = tensors(heads=heads, kv_heads=heads, q_len=5, k_len=21, dim=dim)
    position = posattn.DAPE(posattn.Kerple(heads), heads, width=width)
    exact_position = copy.deepcopy(position).double()
    with torch.no_grad():
        exact = posattn.attention(q.double(), k.double(), v.double(), exact_position, causal=True, backend="reference")
        naive = posattn.attention(q, k, v, position, causal=True, backend="reference")
        got = posattn.attention(q, k, v, position, causal=True, backend="triton")
    found = compare("out", got, naive, exact, torch.zeros_like(exact), q.dtype)
    assert found.ok, found


def test_heads_far_apart():
    """Offsets of heads that 32 bits do not hold; the memory between them is never touched."""
    q, k, v = tensors(heads=2, kv_heads=2, q_len=5, k_len=21, dim=16)
    far = torch.empty((1 << 29) + q[0, 0].numel(), dtype=q.dtype).as_strided(q.shape, (1 << 30, 1 << 29, 16, 1))
    far.copy_(q)
    position = posattn.DAPE(posattn.Kerple(2), 2, width=8)
    with torch.no_grad():
        near = posattn.attention(q, k, v, position, causal=True, backend="triton")
        assert torch.equal(posattn.attention(far, k, v, position, causal=True, backend="triton"), near)


def test_hopper_mixes_by_wgmma(ptx_machine: Machine):  # noqa: F811
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
