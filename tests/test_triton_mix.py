"""HeadMix (DAPE) in Triton, its real PTX on the PTX machine: every form and inner operand, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from mix_cases import SHARED, tensors
from tolerance import assert_parity

import posattn

pytest.importorskip("triton")

from tests.ptxsim.seam import Machine, ptx_machine  # noqa: F401

pytestmark = pytest.mark.usefixtures("ptx_machine")


CASES = {
    **SHARED,
    "rotary, grouped heads": (
        {"heads": 12, "kv_heads": 4, "q_len": 18, "k_len": 37, "dim": 64, "dtype": torch.float16},
        lambda: posattn.DAPE(posattn.RoPE(64) + posattn.Kerple(12), 12), lambda: {"causal": True},
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


def test_explicit_positions():
    """Not poisoned: poisoning sets torch's deterministic mode, which refuses these gradients' atomics."""
    options = {"q_positions": torch.randint(0, 30, (5,)), "k_positions": torch.randint(0, 30, (53,))}
    position = posattn.DAPE(posattn.Kerple(3), 3, width=8)
    assert_parity(*tensors(q_len=5), position, options, "triton")


def test_hopper_mixes_by_wgmma(ptx_machine: Machine):  # noqa: F811
    posattn.attention(*tensors(), posattn.DAPE(None, 3, width=8), causal=True, backend="triton")
    (launched,) = [x for x in ptx_machine.launches if x.kernel == "mixed_forward"]
    assert ("wgmma" in launched.compiled.ptx) == (ptx_machine.arch == 90)


@pytest.mark.parametrize(
    ("heads", "dim", "width", "reason"),
    [(33, 16, 8, "up to 32 heads"), (4, 16, 65, "up to 64 hidden units"), (32, 128, 8, "fit in registers")],
)
def test_what_does_not_fit_is_refused(heads, dim, width, reason):
    q, k, v = tensors(heads=heads, kv_heads=heads, dim=dim)
    with pytest.raises(ValueError, match=reason):
        posattn.attention(q, k, v, posattn.DAPE(None, heads, width=width), backend="triton")
