"""Decay and ForgetGate: their formulas, where queries sit, parity on every backend, and sums that have grown large."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import posattn
from posattn import plan
from posattn.encodings import Context, Encoding
from posattn.plan import Bias, Plan
from tests.tolerance import assert_forward_parity, assert_parity

H = 4


class Gated(Encoding):
    """Gates that are parameters, so that the rule holds for their gradient."""

    def __init__(self, tokens: int, *others: Encoding, batch: int = 2, heads: int = H, steepness: float = 1.0) -> None:
        super().__init__()
        self.f = nn.Parameter(steepness * torch.randn(batch, heads, tokens))
        self.others = nn.ModuleList(others)

    def build(self, context: Context) -> Plan:
        whole: Encoding = posattn.ForgetGate(self.f)
        for other in self.others:
            whole = whole + other  # type: ignore[operator]
        return whole(context)


def tensors(q_len: int, k_len: int, dtype: torch.dtype = torch.float32, batch: int = 2, heads: int = H) -> list[Tensor]:
    shapes = ((heads, q_len), (heads, k_len), (heads, k_len))
    return [torch.randn(batch, *shape, 16).to(dtype) for shape in shapes]


def documents(*bounds: int) -> dict[str, Any]:
    cu = torch.tensor(bounds, dtype=torch.int32)
    return {"cu_seqlens_q": cu, "cu_seqlens_k": cu}


def test_the_formula() -> None:
    f = torch.randn(1, H, 9, dtype=torch.float64)
    bias = posattn.ForgetGate(f).bias(9, 9)
    for i in range(9):
        for j in range(i + 1):
            torch.testing.assert_close(bias[:, i, j], F.logsigmoid(f[0, :, j + 1 : i + 1]).sum(-1))


def test_a_running_sum_of_ones_is_alibi() -> None:
    q, k, v = tensors(20, 20)
    slopes = torch.tensor([0.5, 0.1, 0.02, 1.0])
    c = -slopes[:, None] * torch.arange(20.0)
    ours = posattn.attention(q, k, v, posattn.Decay(c[None]), causal=True)
    theirs = posattn.attention(q, k, v, posattn.ALiBi(H, slopes=slopes), causal=True)
    torch.testing.assert_close(ours, theirs)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": (40, 0)},
    "softcap": {"softcap": 4.0},
    "sinks": {"sinks": torch.tensor([1.0, -2.0, 0.0, 3.0])},
    "dropout": {"dropout_p": 0.2},
    "mask": {"mask": torch.rand(2, 1, 150, 150, generator=torch.Generator().manual_seed(0)) < 0.8},
    "lengths": {"k_lengths": torch.tensor([150, 90])},
    "starts": {"k_starts": torch.tensor([0, 37])},
    "bias": {"bias": torch.linspace(-1.0, 1.0, 150).view(1, 1, 1, 150)},
    "scale below zero": {"scale": -0.3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_parity(name: str, dtype: torch.dtype, isa: str) -> None:
    assert_parity(*tensors(150, 150, dtype), Gated(150), {"causal": True, **OPTIONS[name]}, "cpu")


@pytest.mark.parametrize("others", ["ALiBi", "Kerple", "FIRE", "RoPE", "DAPE", "ALiBi and FIRE"])
def test_beside_other_encodings(others: str, isa: str) -> None:
    parts = {
        "ALiBi": lambda: [posattn.ALiBi(H, learnable=True)],
        "Kerple": lambda: [posattn.Kerple(H)],
        "FIRE": lambda: [posattn.FIRE(H, width=4)],
        "RoPE": lambda: [posattn.RoPE(16)],
        "DAPE": lambda: [posattn.DAPE(posattn.Kerple(H), H, width=4)],
        "ALiBi and FIRE": lambda: [posattn.ALiBi(H, learnable=True), posattn.FIRE(H, width=4)],
    }[others]()
    assert_parity(*tensors(90, 90), Gated(90, *parts), {"causal": True}, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("steepness", [0.1, 20.0])
def test_parity_with_reach(dtype: torch.dtype, steepness: float, isa: str) -> None:
    """Many keys, whose far ones are out of reach with steep gates."""
    assert_parity(*tensors(130, 900, dtype), Gated(900, steepness=steepness), {"causal": True}, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda x: str(x)[6:])
def test_a_gate_between_many_tokens(dtype: torch.dtype) -> None:
    """Its gradient is a sum over all pairs that it lies between, in which errors that do not cancel would add up."""
    q, k, v = (x.requires_grad_() for x in tensors(1500, 1500, dtype, batch=1, heads=1))
    f = torch.randn(1, 1, 1500)

    def gradient(backend: str, wide: bool) -> Tensor:
        gate = f.double().requires_grad_() if wide else f.clone().requires_grad_()
        inputs = [x.double() if wide else x for x in (q, k, v)]
        out = posattn.attention(*inputs, posattn.ForgetGate(gate), causal=True, backend=backend)
        torch.manual_seed(1)
        (grad,) = torch.autograd.grad((out * torch.randn(out.shape).to(out.dtype)).sum(), gate)
        return grad.double()

    exact = gradient("reference", True)
    naive = (gradient("reference", False) - exact).abs().max()
    ours = (gradient("cpu", False) - exact).abs().max()
    assert ours <= 2 * naive + 4e-5 * (dtype == torch.float32)


def test_a_huge_key_far_away_is_reached(isa: str) -> None:
    q, k, v = tensors(130, 900)
    k[:, :, 5] *= 3000.0
    assert_parity(q, k, v, Gated(900, steepness=5.0), {"causal": True}, "cpu")


def test_far_keys_are_not_read(isa: str) -> None:
    q, k, v = tensors(130, 900)
    v[:, :, :200] = torch.nan  # of no weight, which times NaN would be NaN
    out = posattn.attention(q, k, v, Gated(900, steepness=20.0), causal=True, backend="cpu")
    assert not out.isnan().any()


def test_decoding_leaves_far_values(isa: str) -> None:
    """As for every other bias, from 4096 keys on."""
    q, k, v = tensors(1, 5000)
    v[:, :, :4000] = torch.nan
    out = posattn.attention(q, k, v, Gated(5000, steepness=20.0), causal=True, backend="cpu")
    assert not out.isnan().any()


def test_a_sum_that_has_grown_large(isa: str) -> None:
    """With q = 0 attention is a recurrence, which float64 computes in O(N). c falls to -36000, of which float32 holds
    multiples of 1/256."""
    tokens = 65536 if isa in ("avx512", "avx512bf16", "amx") else 16384
    generator = torch.Generator().manual_seed(0)
    f = 3.0 * torch.randn(1, 1, tokens, generator=generator)
    v = torch.randn(1, 1, tokens, 8, generator=generator)
    q = torch.zeros_like(v)
    out, lse = posattn.attention(q, q, v, posattn.ForgetGate(f), causal=True, return_lse=True, backend="cpu")
    gates = torch.sigmoid(f.double()).flatten().tolist()
    state, total = torch.zeros(8, dtype=torch.float64), 0.0
    expected, sums = [], []
    for gate, value in zip(gates, v[0, 0].double()):
        state, total = gate * state + value, gate * total + 1.0
        expected.append(state / total)
        sums.append(total)
    torch.testing.assert_close(out[0, 0].double(), torch.stack(expected), rtol=0, atol=3e-6)
    torch.testing.assert_close(lse[0, 0].double(), torch.tensor(sums, dtype=torch.float64).log(), rtol=0, atol=3e-6)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
def test_documents_and_caches(heads: tuple[int, int]) -> None:
    """Tokens of a document, and those of a step with a cache, get what they get in a sequence by themselves."""
    f = torch.randn(1, 1, 60)
    q, k, v = torch.randn(1, heads[0], 60, 16), *torch.randn(2, 1, heads[1], 60, 16).unbind()
    whole = posattn.attention(q, k, v, posattn.ForgetGate(f), causal=True)
    step = posattn.attention(q[:, :, 57:], k, v, posattn.ForgetGate(f), causal=True)
    torch.testing.assert_close(step, whole[:, :, 57:])
    prefill = posattn.attention(q[:, :, 10:30], k, v, posattn.ForgetGate(f), causal=True, offset=10)
    torch.testing.assert_close(prefill, whole[:, :, 10:30])
    packed = posattn.attention(q, k, v, posattn.ForgetGate(f), causal=True, **documents(0, 25, 25, 60))
    ids = torch.tensor([0] * 25 + [7] * 35)[None]
    by_ids = posattn.attention(q, k, v, posattn.ForgetGate(f), causal=True, segments=ids)
    for first, last in ((0, 25), (25, 60)):
        alone = posattn.attention(
            *(x[:, :, first:last] for x in (q, k, v)), posattn.ForgetGate(f[:, :, first:last]), causal=True
        )
        torch.testing.assert_close(packed[:, :, first:last], alone)
        torch.testing.assert_close(by_ids[:, :, first:last], alone)


def test_documents_of_more_keys_than_queries() -> None:
    f = torch.randn(1, H, 40)
    q, k, v = torch.randn(1, H, 10, 16), *torch.randn(2, 1, H, 40, 16).unbind()
    cu_q, cu_k = torch.tensor([0, 4, 10], dtype=torch.int32), torch.tensor([0, 15, 40], dtype=torch.int32)
    bounds = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    out = posattn.attention(q, k, v, posattn.ForgetGate(f), causal=True, **bounds)
    second = posattn.attention(q[:, :, 4:], k[:, :, 15:], v[:, :, 15:], posattn.ForgetGate(f[:, :, 15:]), causal=True)
    torch.testing.assert_close(out[:, :, 4:], second)


def test_the_bits_do_not_depend_on_threads() -> None:
    q, k, v = tensors(200, 700)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        position = Gated(700, steepness=3.0).requires_grad_()
        torch.manual_seed(1)
        nn.init.normal_(position.f, std=3.0)
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = posattn.attention(*inputs, position, causal=True, return_lse=True, backend="cpu")
        results.append([out, *torch.autograd.grad(out.square().sum() + lse.sum(), [*inputs, position.f])])
    assert all(map(torch.equal, *results))


def test_one_graph_under_a_compiler() -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        return posattn.attention(q, k, v, posattn.ForgetGate(f), causal=True)

    q, k, v = tensors(33, 33)
    f = torch.randn(2, H, 33, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    (ours,) = torch.autograd.grad(compiled(q, k, v, f).square().sum(), f)
    (theirs,) = torch.autograd.grad(layer(q, k, v, f).square().sum(), f)
    torch.testing.assert_close(ours, theirs)


def test_heads_of_a_shard() -> None:
    q, k, v = tensors(20, 20)
    f = torch.randn(2, H, 20)
    whole = posattn.attention(q, k, v, posattn.ForgetGate(f), causal=True)
    part = posattn.attention(q[:, 1:3], k[:, 1:3], v[:, 1:3], posattn.ForgetGate(f).shard(1, 2), causal=True)
    torch.testing.assert_close(part, whole[:, 1:3])


def test_inside_a_dape_the_reference_alone_has_it() -> None:
    q, k, v = tensors(20, 20)
    position = posattn.DAPE(posattn.ForgetGate(torch.randn(2, H, 20)), H)
    with pytest.raises(ValueError, match="a decay inside a mix of heads"):
        posattn.attention(q, k, v, position, causal=True)
    assert_forward_parity(q, k, v, position, {"causal": True}, "reference")


@pytest.mark.parametrize(
    ("position", "message"),
    [
        (
            posattn.ForgetGate(torch.zeros(2, H, 19)),
            "ForgetGate of the call's 20 keys, those in a cache too, got one of 19",
        ),
        (posattn.Decay(torch.zeros(3, H, 20)), r"bias.decay.q .* of shape \[2 or 1, 4 or 1, 20\], got \[3, 4, 20\]"),
        (posattn.Decay(torch.zeros(2, 3, 20)), "num_heads=3, got queries with 4 heads"),
        (posattn.Decay(torch.full((2, H, 20), torch.nan)), "expected a plan of finite values, got NaN"),
        (
            posattn.Decay(torch.zeros(2, H, 20, dtype=torch.bfloat16)),
            "bias.decay.q .*float64 or float32, got torch.bfloat16",
        ),
    ],
)
def test_what_does_not_fit_is_named(position: Encoding, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        posattn.attention(*tensors(20, 20), position, causal=True)


def test_gradients_of_both_parts() -> None:
    """Against autograd through the reference, where queries and keys have tensors of their own."""

    class Apart(Encoding):
        def __init__(self, q: Tensor, k: Tensor) -> None:
            super().__init__()
            self.of_queries, self.of_keys = nn.Parameter(q), nn.Parameter(k)

        def build(self, context: Context) -> Plan:
            return Plan(bias=Bias(decay=plan.Decay(self.of_queries, self.of_keys)))

    for shape in ((2, H), (1, H), (2, 1), (1, 1)):
        position = Apart(torch.randn(*shape, 30), torch.randn(*shape, 50))
        assert_parity(*tensors(30, 50), position, {"causal": True, "sinks": torch.zeros(H)}, "cpu")
