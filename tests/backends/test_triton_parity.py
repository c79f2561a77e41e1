"""The Triton kernels' real PTX, for sm_80 and sm_90, on the PTX machine: outputs and all gradients within the rule.

Every plan operand, mask, dtype and option of the plain family occurs at least once; sizes are odd, and small enough for
a few blocks. On a machine with a GPU the parity suites of test_parity_*.py run the same backend as well.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import posattn
from posattn.parity import measure
from posattn.plan import Bias, Plan
from tests.tolerance import assert_parity

pytest.importorskip("triton")

from tests.ptxsim.kernel import Options
from tests.ptxsim.seam import ptx_machine  # noqa: F401

pytestmark = pytest.mark.usefixtures("ptx_machine")


def tensors(dtype, heads=2, kv_heads=2, q_len=70, k_len=150, dim=64, batch=1, dim_v=None):
    shapes = ((heads, q_len, dim), (kv_heads, k_len, dim), (kv_heads, k_len, dim_v or dim))
    return [torch.randn(batch, *shape).to(dtype) for shape in shapes]


HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32


def _mask(q_len, k_len, heads):
    return torch.rand(1, heads, q_len, k_len) < 0.1


def _steep():
    encoding = posattn.ALiBi(2, learnable=True)
    encoding.slopes.data.copy_(torch.tensor([0.7, 5.0]))
    return encoding


def bent_fire(heads, distances, length):
    """FIRE with one knot at each of these distances, for queries before `length`."""
    position = posattn.FIRE(heads, width=len(distances), initial_length=length)
    side = torch.tensor([1.0, -1.0] * len(distances))[: len(distances)]
    with torch.no_grad():
        position.mlp[0].weight[:, 0] = side
        position.mlp[0].bias[:] = -side * torch.log1p(0.1 * torch.tensor(distances)) / math.log1p(0.1 * length)
    return position


class OnlyPsi(posattn.FIRE):
    """FIRE of which psi alone is learned."""

    def build(self, context):
        profile = super().build(context).bias.profile
        fixed = {name: getattr(profile, name).detach() for name in ("row_scale", "slope", "intercept")}
        return Plan(bias=Bias(profile=dataclasses.replace(profile, **fixed)))


def only_psi(heads):
    position = OnlyPsi(heads, width=8)
    for parameter in (position.length_multiplier, *position.mlp.parameters()):
        parameter.requires_grad_(False)
    return position


CASES = {
    "plain": (BF16, {}, None, dict),
    "causal window, grouped heads": (
        HALF, {"kv_heads": 1}, None, lambda: {"causal": True, "window": (40, None)}
    ),
    "more queries than keys": (BF16, {"q_len": 150, "k_len": 70}, None, lambda: {"causal": True, "window": (20, 3)}),
    "softcap and sinks": (
        BF16, {}, None, lambda: {"softcap": 5.0, "sinks": torch.linspace(0, 6, 4)[::2], "causal": True}
    ),
    "dropout, odd dims": (HALF, {"dim": 40, "dim_v": 24}, None, lambda: {"dropout_p": 0.4}),
    "values wider than keys": (BF16, {"dim": 32, "dim_v": 64, "q_len": 40}, None, lambda: {"causal": True}),
    "negative scale, one dimension": (BF16, {"dim": 1, "q_len": 9, "k_len": 33}, None, lambda: {"scale": -1.0}),
    "one query, one key, one head": (
        BF16, {"heads": 1, "kv_heads": 1, "q_len": 1, "k_len": 1, "dim": 16}, lambda: posattn.Kerple(1),
        lambda: {"dropout_p": 0.3},
    ),
    "float32, steep slopes": (FULL, {"dim": 32, "q_len": 40, "k_len": 45}, _steep, lambda: {"causal": True}),
    "ALiBi": (BF16, {}, lambda: posattn.ALiBi(2, learnable=True), lambda: {"causal": True}),
    "ALiBi, steep": (
        HALF, {"q_len": 150}, lambda: posattn.ALiBi(2, learnable=True, slopes=[20.0, 22.0]), lambda: {"causal": True}
    ),
    "ALiBi, steep, wide heads, window": (
        BF16, {"heads": 1, "kv_heads": 1, "dim": 128, "q_len": 200},
        lambda: posattn.ALiBi(1, learnable=True, slopes=[20.0]), lambda: {"causal": True, "window": (100, 0)},
    ),
    "wide heads, documents, softcap": (
        BF16, {"kv_heads": 1, "dim": 128, "q_len": 200, "k_len": 210}, lambda: posattn.ALiBi(2, learnable=True),
        lambda: {
            "causal": True,
            "softcap": 30.0,
            "cu_seqlens_q": torch.tensor([0, 130, 150, 200, 200]),
            "cu_seqlens_k": torch.tensor([0, 150, 150, 170, 210]),
        },
    ),
    "ALiBi both ways": (HALF, {}, lambda: posattn.ALiBi(2, learnable=True), dict),
    "ALiBi, wide heads": (
        BF16, {"heads": 1, "kv_heads": 1, "dim": 128, "k_len": 140}, lambda: posattn.ALiBi(1, learnable=True),
        lambda: {"causal": True},
    ),
    "table, widest heads": (
        BF16, {"heads": 1, "kv_heads": 1, "dim": 200, "dim_v": 256, "q_len": 40, "k_len": 70},
        lambda: posattn.Kerple(1), lambda: {"causal": True},
    ),
    "widest heads, grouped, many steps": (
        BF16, {"kv_heads": 1, "dim": 256, "q_len": 150, "k_len": 100}, None, lambda: {"window": (60, 10)},
    ),
    "table, wide heads": (
        BF16, {"heads": 1, "kv_heads": 1, "dim": 128, "q_len": 150, "k_len": 260}, lambda: posattn.Kerple(1),
        lambda: {"causal": True},
    ),
    "wide heads, dropout": (
        HALF, {"heads": 1, "kv_heads": 1, "dim": 128, "q_len": 200, "k_len": 150}, None,
        lambda: {"causal": True, "dropout_p": 0.3},
    ),
    "wide heads, documents": (
        BF16, {"kv_heads": 1, "dim": 128, "q_len": 200, "k_len": 210}, lambda: posattn.ALiBi(2, learnable=True),
        lambda: {
            "causal": True,
            "cu_seqlens_q": torch.tensor([0, 130, 150, 200, 200]),
            "cu_seqlens_k": torch.tensor([0, 150, 150, 170, 210]),
        },
    ),
    "profile and dense, wide heads": (
        BF16, {"heads": 1, "kv_heads": 1, "dim": 128, "q_len": 40}, lambda: posattn.FIRE(1, width=4),
        lambda: {"bias": torch.randn(1, 1, 40, 150)},
    ),
    "table": (BF16, {}, lambda: posattn.Kerple(2), lambda: {"causal": True}),
    "table, many steps": (
        BF16, {"heads": 1, "kv_heads": 1, "q_len": 330, "k_len": 341}, lambda: posattn.Kerple(1),
        lambda: {"causal": True},
    ),
    "table both ways, grouped heads, softcap": (
        HALF, {"kv_heads": 1}, lambda: posattn.T5Bias(2), lambda: {"window": (60, 30), "softcap": 8.0}
    ),
    "ALiBi, many steps, grouped heads": (
        HALF, {"kv_heads": 1, "q_len": 290, "k_len": 310}, lambda: posattn.ALiBi(2, learnable=True),
        lambda: {"causal": True, "window": (200, None)},
    ),
    "table and mask": (BF16, {}, lambda: posattn.T5Bias(2), lambda: {"mask": _mask(70, 150, 2)}),
    "profile": (BF16, {}, lambda: posattn.FIRE(2, width=8), lambda: {"causal": True}),
    "profile, runs of tiles": (
        BF16, {"heads": 1, "kv_heads": 1, "q_len": 600, "k_len": 620}, lambda: bent_fire(1, [9.0, 250.0, 260.0], 400.0),
        lambda: {"causal": True, "window": (560, None)},
    ),
    "profile, psi alone": (BF16, {"dim": 16}, lambda: only_psi(2), lambda: {"causal": True}),
    "dense": (BF16, {}, None, lambda: {"bias": torch.randn(1, 2, 70, 150).masked_fill(_mask(70, 150, 2), -math.inf)}),
    "dense shared": (BF16, {"batch": 2}, None, lambda: {"bias": torch.randn(1, 1, 70, 150), "causal": True}),
    "rotary turned in the kernel": (BF16, {"q_len": 16}, lambda: posattn.RoPE(64), lambda: {"causal": True}),
    "rotary turned ahead": (
        HALF, {"q_len": 300, "k_len": 300, "dim": 32}, lambda: posattn.RoPE(32, layout="interleaved", rotary_dim=16),
        lambda: {"causal": True},
    ),
    "rotary and ALiBi": (BF16, {}, lambda: posattn.RoPE(64) + posattn.ALiBi(2), lambda: {"causal": True}),
    "key lengths": (
        BF16, {"q_len": 5, "batch": 3}, lambda: posattn.Kerple(2),
        lambda: {"causal": True, "k_lengths": torch.tensor([0, 3, 149])},
    ),
    "split keys": (
        BF16, {"q_len": 3, "k_len": 700}, lambda: posattn.Kerple(2), lambda: {"causal": True, "sinks": torch.randn(2)}
    ),
    "packed documents": (
        BF16, {"q_len": 130, "k_len": 120}, lambda: posattn.Kerple(2),
        lambda: {
            "causal": True,
            "dropout_p": 0.3,
            "cu_seqlens_q": torch.tensor([0, 5, 5, 130]),
            "cu_seqlens_k": torch.tensor([0, 50, 51, 120]),
        },
    ),
}  # fmt: skip


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(case):
    dtype, shape, position, options = case
    assert_parity(*tensors(dtype, **shape), position() if position else None, options(), "triton")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ["Kerple", "FIRE"])
def test_explicit_positions(name):
    position = {"Kerple": lambda: posattn.Kerple(2) + posattn.ALiBi(2), "FIRE": lambda: posattn.FIRE(2, width=6)}[
        name
    ]()
    # Kernels read them side by side, wherever they come from.
    options = {"q_positions": torch.randint(0, 100, (100,))[::2], "k_positions": torch.randint(0, 100, (90, 2)).T[:1]}
    assert_parity(*tensors(BF16, q_len=50, k_len=90), position, options, "triton")


def test_dropout_of_all_but_nothing():
    out = posattn.attention(*tensors(FULL, q_len=3, k_len=5, dim=16), dropout_p=1 - 2**-40, backend="triton")
    assert not out.any()


@pytest.mark.usefixtures("poisoned")
def test_explicit_positions_of_empty_documents():
    """Nothing is read before the first query or past the last one."""
    options = {
        "q_positions": torch.randint(0, 100, (1, 40)),
        "k_positions": torch.randint(0, 100, (1, 60)),
        "cu_seqlens_q": torch.tensor([0, 0, 40, 40]),
        "cu_seqlens_k": torch.tensor([0, 20, 50, 60]),
    }
    qkv = tensors(BF16, heads=1, kv_heads=1, q_len=40, k_len=60, dim=16)
    assert_parity(*qkv, posattn.FIRE(1, width=6), options, "triton")


def test_large_logits_stay_finite():
    """Logits in the thousands: exponents far outside float32's range if the maximum were not taken out first."""
    q, k, v = tensors(BF16, q_len=40, k_len=70)
    for comparison in measure(100 * q, 100 * k, v, None, {"causal": True, "scale": 1.0}, "triton"):
        assert comparison.ok, comparison.worst


@pytest.mark.parametrize("extra", range(0, 64, 9))
def test_every_remainder_of_a_tile(extra):
    q, k, v = tensors(HALF, heads=1, kv_heads=1, q_len=65 + extra, k_len=65 + extra, dim=16)
    got = posattn.attention(q, k, v, causal=True, return_lse=True, backend="triton")
    want = posattn.attention(q.double(), k.double(), v.double(), causal=True, return_lse=True, backend="reference")
    for a, b, bound in zip(got, want, (2e-3, 1e-5)):
        assert torch.isfinite(a).all()
        assert (a.double() - b).abs().max() < bound


@pytest.mark.parametrize("explicit", [False, True])
def test_gradients_do_not_depend_on_the_order_of_warps(ptx_machine, explicit):  # noqa: F811
    """Bit for bit: FIRE and ALiBi have a gradient of every kind, and two blocks of keys add to the same queries."""
    q, k, v = (x.requires_grad_() for x in tensors(BF16, heads=1, kv_heads=1, q_len=40, k_len=140, dim=32))
    position = posattn.FIRE(1, width=4)
    places = {"q_positions": torch.arange(40), "k_positions": torch.arange(140) // 2} if explicit else {}
    found = []
    for seed in (0, 7):
        ptx_machine.options = Options(stats=False, seed=seed)
        out = posattn.attention(q, k, v, position, deterministic=True, backend="triton", **places)
        found.append(torch.autograd.grad(out.float().square().sum(), (q, k, v, *position.parameters())))
    for first, second in zip(*found):
        assert torch.equal(first, second)
