"""Calls that once broke: masks of the lowest float, values that a traced call cannot check, sums shared by a batch."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
from torch import Tensor

import posattn
from posattn.bench.memory import extra_peak
from posattn.encodings.base import Context, Encoding
from posattn.plan import Bias, Plan, Slope

LOWEST = torch.finfo(torch.float32).min


def naive(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias, -1) @ v


@pytest.mark.parametrize("fill", [LOWEST, -1e38, -1e30, -1e4])
@pytest.mark.parametrize("encoding", [None, posattn.ALiBi(2)], ids=["none", "ALiBi"])
def test_rows_masked_by_a_finite_bias_average_their_values(fill: float, encoding: posattn.ALiBi | None) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, 70, 32, requires_grad=True) for _ in range(3)]
    bias = torch.zeros(1, 1, 70, 70)
    bias[..., :9, :] = fill
    bias[..., 20:, 40:] = fill
    out = posattn.attention(*tensors, encoding, bias=bias)
    whole = bias if encoding is None else bias + encoding.bias(70, 70)
    expected = naive(*tensors, whole)
    weight = torch.randn_like(out)
    # Where float32 absorbs the product into the bias, naive float32 is the definition.
    tolerance = 1e-5 if abs(fill) > 1e10 else 1e-3
    torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)
    ours = torch.autograd.grad(out, tensors, weight)
    theirs = torch.autograd.grad(expected, tensors, weight)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


def test_rows_masked_by_a_finite_bias_have_gradients_under_dape() -> None:
    torch.manual_seed(0)
    position = posattn.DAPE(posattn.Kerple(2), 2)
    bias = torch.zeros(1, 1, 70, 70)
    bias[..., :9, :] = LOWEST
    tensors = [torch.randn(1, 2, 70, 32) for _ in range(3)]
    weight = torch.randn(1, 2, 70, 32)

    def grads(dtype: torch.dtype, backend: str) -> list[Tensor]:
        module = copy.deepcopy(position).to(dtype)
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        out = posattn.attention(*leaves, module, bias=bias.to(dtype), backend=backend)
        return list(torch.autograd.grad(out, [*leaves, *module.parameters()], weight.to(dtype)))

    for got, wanted in zip(grads(torch.float32, "cpu"), grads(torch.float64, "reference"), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=2e-5)


def test_a_bias_may_hold_anything_at_a_masked_key() -> None:
    q = torch.randn(1, 1, 33, 16)
    bias = torch.zeros(33, 33)
    bias[:, 30] = math.inf
    out = posattn.attention(q, q, q, bias=bias, causal=True)[:, :, :30]
    torch.testing.assert_close(out, posattn.attention(q, q, q, causal=True)[:, :, :30])


@pytest.mark.parametrize("window", [sys.maxsize, (0, sys.maxsize), (sys.maxsize, 0), (2**63 - 1, None), 2**63])
def test_a_window_wider_than_any_sequence(window: int | tuple[int | None, int | None]) -> None:
    q = torch.randn(1, 1, 40, 16)
    sides = (window, window) if isinstance(window, int) else window
    narrow = tuple(side if side is None else min(side, 1000) for side in sides)
    torch.testing.assert_close(posattn.attention(q, q, q, window=window), posattn.attention(q, q, q, window=narrow))


@pytest.mark.parametrize("lengths", [[2**30, 64], [-1, 64]])
def test_lengths_that_a_traced_call_could_not_check(lengths: list[int]) -> None:
    call = torch.compile(lambda q, n: posattn.attention(q, q, q, k_lengths=n), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="k_lengths"):
        call(torch.randn(2, 2, 64, 32), torch.tensor(lengths))


@pytest.mark.parametrize("starts", [[0, 32, 10**8], [0, 40, 32], [5, 64, 64]])
def test_documents_that_a_traced_call_could_not_check(starts: list[int]) -> None:
    call = torch.compile(
        lambda q, n: posattn.attention(q, q, q, cu_seqlens_q=n, cu_seqlens_k=n), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        call(torch.randn(1, 2, 64, 32), torch.tensor(starts))


@pytest.mark.parametrize(
    ("name", "value"), [("scale", "a"), ("softcap", "a"), ("softcap", True), ("dropout_p", "a"), ("dropout_p", True)]
)
def test_a_number_of_the_wrong_type_is_named(name: str, value: object) -> None:
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(TypeError, match=name):
        posattn.attention(q, q, q, **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_a_number_beyond_float32(name: str) -> None:
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match=name):
        posattn.attention(q, q, q, **{name: 1e39})


@pytest.mark.parametrize("mix", [False, True], ids=["plain", "DAPE"])
def test_a_bias_shared_by_sequences_of_unlike_lengths_has_one_gradient(mix: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 200, 16), torch.randn(3, 2, 700, 16), torch.randn(3, 2, 700, 16)
    bias = torch.randn(1, 2, 200, 700, requires_grad=True)
    position = posattn.DAPE(None, 2) if mix else None
    threads = torch.get_num_threads()

    def gradient(count: int) -> Tensor:
        torch.set_num_threads(count)
        out = posattn.attention(
            q, k, v, position, causal=True, window=(150, 0), bias=bias, k_lengths=torch.tensor([700, 300, 500])
        )
        return torch.autograd.grad(out.sum(), bias)[0]

    try:
        first = gradient(1)
        assert all(torch.equal(first, gradient(count)) for count in (2, 3, 4, 3, 4))
    finally:
        torch.set_num_threads(threads)


def test_bidirectional_fire_is_the_same_for_every_number_of_threads() -> None:
    torch.manual_seed(0)
    position = posattn.FIRE(4, bidirectional=True)
    q, k = torch.randn(1, 4, 200, 16), torch.randn(1, 4, 333, 16)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3, 8):
            torch.set_num_threads(count)
            out = posattn.attention(q, k, k, position)
            results.append([out, *torch.autograd.grad(out.square().sum(), list(position.parameters()))])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_sandwich_far_from_zero_needs_memory_for_its_distances_alone() -> None:
    q = torch.randn(1, 2, 16, 8)
    far = torch.arange(16)[None] + 2**30
    out = posattn.attention(q, q, q, posattn.Sandwich(2), q_positions=far, k_positions=torch.arange(16)[None])
    assert out.isfinite().all()


BROADCASTS = [
    (1, 1, 1, 1),
    (2, 4, 1, 300),
    (2, 1, 300, 1),
    (1, 4, 300, 1),
    (1, 4, 1, 300),
    (2, 4, 1, 1),
    (300, 1),
    (1, 300),
]


@pytest.mark.parametrize("shape", BROADCASTS, ids=str)
@pytest.mark.parametrize("position", [None, posattn.DAPE(posattn.Kerple(4), 4)], ids=["plain", "DAPE"])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_the_gradient_of_a_bias_that_broadcasts(
    shape: tuple[int, ...], position: posattn.DAPE | None, packed: bool
) -> None:
    batch = 1 if packed else 2
    if len(shape) == 4 and shape[0] > batch:
        shape = (batch, *shape[1:])
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, 4, 300, 16) for _ in range(3))
    starts = torch.tensor([0, 70, 300], dtype=torch.int32) if packed else None
    options = {"causal": True, "cu_seqlens_q": starts, "cu_seqlens_k": starts}
    narrow = torch.randn(shape, requires_grad=True)
    wide = narrow.detach().expand(batch, 4, 300, 300).contiguous().requires_grad_()
    weight = torch.randn(batch, 4, 300, 16)
    threads = torch.get_num_threads()
    try:
        grads = []
        for count in (1, 3):
            torch.set_num_threads(count)
            out = posattn.attention(q, k, v, position, bias=narrow, **options)
            grads.append(torch.autograd.grad(out, narrow, weight)[0])
    finally:
        torch.set_num_threads(threads)
    expected = torch.autograd.grad(posattn.attention(q, k, v, position, bias=wide, **options), wide, weight)[0]
    assert torch.equal(*grads)
    scale = expected.abs().double().sum_to_size(grads[0].reshape((1,) * (4 - len(shape)) + shape).shape)
    error = (grads[0].double() - expected.double().sum_to_size(scale.shape).reshape(shape)).abs()
    assert (error <= 1e-5 * scale.reshape(shape) + 1e-6).all()


class PerSequence(Encoding):
    """Slopes of each sequence and head."""

    def __init__(self, slopes: Tensor, signed: bool) -> None:
        super().__init__()
        self.num_heads, self.slopes, self.signed = slopes.shape[1], slopes, signed

    def build(self, context: Context) -> Plan:
        return Plan(bias=Bias(slope=Slope(self.slopes, self.signed)))


def test_signed_slopes_beside_slopes_of_each_sequence() -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 3, 40, 16)
    rows = torch.rand(2, 3)
    both = PerSequence(rows, signed=False) + posattn.ALiBi(3, signed=True)
    distance = torch.arange(40)[:, None] - torch.arange(40)
    bias = -rows[:, :, None, None] * distance.abs() - posattn.ALiBi(3).slopes[:, None, None] * distance
    torch.testing.assert_close(posattn.attention(q, q, q, both), naive(q, q, q, bias), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="signed and unsigned"):
        posattn.attention(q, q, q, PerSequence(rows, signed=False) + PerSequence(rows, signed=True))


@pytest.mark.skipif(sys.platform != "linux", reason="measured with Linux's /proc")
def test_the_gradient_of_a_key_bias_takes_linear_memory() -> None:
    q, k, v = (torch.randn(1, 2, 8192, 16) for _ in range(3))
    bias = torch.zeros(1, 1, 1, 8192, requires_grad=True)

    def run(queries: int) -> None:
        posattn.attention(q[:, :, :queries], k, v, bias=bias).sum().backward()

    run(64)
    assert extra_peak(lambda: run(8192)) < 60, "megabytes; one [Tq, Tk] float32 matrix is 268"


@pytest.mark.parametrize("shape", [(2, 1, 4, 192, 192), (1, 2, 4, 192, 192)])
def test_a_pair_bias_that_rows_share_is_not_copied_for_them(shape: tuple[int, ...]) -> None:
    """AlphaFold's, [B, 1, H, L, S]: 1.1 MB at B = 2, and 113 MB were it one of each of 96 rows."""
    lead = (2, 96) if shape[0] == 2 else (96, 2)
    q, k, v = (torch.randn(*lead, 4, 192, 4, requires_grad=True) for _ in range(3))
    bias = torch.randn(shape, requires_grad=True)

    def run(rows: int) -> None:
        some = [x[:, :rows] if shape[0] == 2 else x[:rows] for x in (q, k, v)]
        posattn.scaled_dot_product_attention(*some, bias).sum().backward()

    run(2)
    assert extra_peak(lambda: run(96)) < 60, "megabytes; q, k, v, the output and their gradients are 2.4 each"


@pytest.mark.parametrize(
    "mask", [(3, 1, 2, 7, 9), (3, 1, 1, 7, 9), (1, 5, 2, 7, 9), (3, 1, 1, 2, 7, 9), (3, 1, 5, 1, 7, 9)]
)
@pytest.mark.parametrize("kind", ["bias", "boolean"])
def test_what_rows_share_is_what_torch_broadcasts(mask: tuple[int, ...], kind: str) -> None:
    lead = (3, 5) if len(mask) == 5 else (3, 4, 5)
    q, k, v = (torch.randn(*lead, 2, n, 8, requires_grad=True) for n in (7, 9, 9))
    given = torch.randn(mask, requires_grad=True) if kind == "bias" else torch.rand(mask) > 0.3
    if kind == "boolean":
        given[..., 0] = True
    leaves = [q, k, v, *([given] if kind == "bias" else [])]
    weight = torch.randn(*lead, 2, 7, 8)
    found = []
    for function in (posattn.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention):
        out = function(q, k, v, given)
        found.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_shared_bias_has_the_same_bits_on_every_number_of_threads() -> None:
    q, k, v, weight = (torch.randn(2, 7, 3, 40, 8) for _ in range(4))
    bias = torch.randn(2, 1, 3, 40, 40, requires_grad=True)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        out = posattn.scaled_dot_product_attention(q, k, v, bias)
        found.append(torch.autograd.grad(out, bias, weight)[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_2d_table_trains_to_the_same_bits_on_every_number_of_threads() -> None:
    torch.manual_seed(0)
    encoding = posattn.RelativeTable2D(4, (24, 24))
    q, k, v, weight = (torch.randn(1, 4, 576, 16) for _ in range(4))
    threads = torch.get_num_threads()
    grads = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            out = posattn.attention(q, k, v, encoding)
            grads.append(torch.autograd.grad(out, encoding.weight, weight)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(grads[0], grad) for grad in grads)


def test_long_sums_round_no_worse_than_naive_attention() -> None:
    """By the root of the mean square: a sum that drifts over 8192 keys or queries hides behind the largest error."""
    torch.manual_seed(0)
    tensors = {tokens: [torch.randn(1, 2, tokens, 32) for _ in range(3)] for tokens in (40, 8192)}

    def run(dtype: torch.dtype, backend: str, queries: int, keys: int) -> list[Tensor]:
        q, weight = (tensors[queries][i].to(dtype) for i in (0, 2))
        leaves = [x.requires_grad_() for x in (q, *(tensor.to(dtype) for tensor in tensors[keys][:2]))]
        out = posattn.attention(*leaves, backend=backend)
        return [tensor.detach().double() for tensor in (out, *torch.autograd.grad(out, leaves, weight))]

    for lengths in ((40, 8192), (8192, 40)):
        exact = run(torch.float64, "reference", *lengths)
        ours = run(torch.float32, "cpu", *lengths)
        naive = run(torch.float32, "reference", *lengths)
        for got, other, wanted in zip(ours, naive, exact, strict=True):
            assert (got - wanted).square().mean() <= 4 * (other - wanted).square().mean()
