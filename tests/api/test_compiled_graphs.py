"""torch.compile makes no more graphs of posattn than of torch's function: one for all lengths and learned scales."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import posattn
from posattn.encodings.base import Encoding

EXAMPLES = posattn.parity.examples(2, 8, 16)
# Compiling takes seconds: these lower in every way that there is, the others are for the long suite.
QUICK = ("none", "FIRE", "T5Bias", "DAPE-Kerple", "RelativeTable2D")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ("none", *EXAMPLES)]


def graphs(function: Callable[..., Tensor], calls: Iterable[tuple[Any, ...]], dynamic: bool | None = True) -> int:
    """How many graphs serve the calls, each of which must give what it gives without a compiler. (The compiler may look
    twice at a graph with Python's floats in it: that is one.)"""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic)
    found = 0
    for call in calls:
        before = counter.frame_count
        torch.testing.assert_close(compiled(*call), function(*call))
        found += counter.frame_count > before
    return found


def qkv(tokens: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(tokens)
    q, k, v = torch.randn(3, batch, 2, tokens, 8)
    return q, k, v


@pytest.mark.parametrize("name", NAMES)
def test_one_graph_for_every_length(name: str) -> None:
    position = EXAMPLES.get(name)
    if position is not None and position.needs_positions:
        pytest.skip("explicit positions have a test of their own")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return posattn.attention(q, k, v, position, causal=True, window=(9, None))

    assert graphs(call, [qkv(tokens) for tokens in (5, 7, 11, 16)]) == 1


def test_the_drop_in_takes_as_many_as_torchs_own() -> None:
    def with_(function: Callable[..., Tensor]) -> int:
        return graphs(lambda q, k, v: function(q, k, v, is_causal=True), [qkv(tokens) for tokens in (5, 7, 11)])

    assert with_(posattn.scaled_dot_product_attention) <= with_(F.scaled_dot_product_attention)


@pytest.mark.parametrize("dynamic", [None, True])
def test_numbers_that_change_between_calls(dynamic: bool | None) -> None:
    """A Python number is part of a graph, as it is for torch's own function."""
    given = qkv(9)
    values = (0.25, 0.5, 0.75)

    def ours(x: float, option: str) -> Tensor:
        return posattn.attention(*given, **{option: x})  # type: ignore[call-overload, no-any-return]

    def theirs(x: float) -> Tensor:
        return F.scaled_dot_product_attention(*given, scale=x)

    allowed = graphs(theirs, [(x,) for x in values], dynamic)
    for option in ("scale", "softcap"):
        assert graphs(ours, [(x, option) for x in values], dynamic) <= allowed


def test_dropout_that_changes_between_calls() -> None:
    given = qkv(9)
    compiled = torch.compile(lambda x: posattn.attention(*given, dropout_p=x), backend="aot_eager", fullgraph=True)
    for x in (0.25, 0.5, 0.0, 1.0):
        out = compiled(x)
        assert out.isfinite().all()
        assert (out == 0).all() == (x == 1.0)


def test_a_scale_in_a_tensor_shares_one_graph() -> None:
    given = qkv(9)

    def call(scale: Tensor) -> Tensor:
        return posattn.attention(*given, causal=True, scale=scale)

    assert graphs(call, [(torch.tensor(x),) for x in (0.25, 0.5, 0.75)]) == 1
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    scale = torch.tensor(0.6, requires_grad=True)
    (got,) = torch.autograd.grad(compiled(scale).square().sum(), scale)
    (expected,) = torch.autograd.grad(call(scale).square().sum(), scale)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", NAMES[1:])
def test_bounded_positions_break_no_graph(name: str) -> None:
    position: Encoding = EXAMPLES[name]

    def call(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
        given = {"q_positions": at, "k_positions": at, "position_range": (0, 15)}
        return posattn.attention(q, k, v, position, causal=True, **given)  # type: ignore[call-overload, no-any-return]

    calls = [(*qkv(tokens), torch.randint(16, (2, tokens)).sort().values) for tokens in (5, 9, 12)]
    assert graphs(call, calls) == 1


@pytest.mark.parametrize("name", ["T5Bias", "FIRE", "Kerple", "RelativeTable2D", "DAPE-Kerple", "RoPE"])
def test_vmap_over_positions(name: str) -> None:
    position = EXAMPLES[name]
    q, k, v = qkv(6, batch=1)
    at = torch.randint(16, (3, 6)).sort().values

    def call(at: Tensor) -> Tensor:
        return posattn.attention(q, k, v, position, q_positions=at, k_positions=at)

    torch.testing.assert_close(torch.vmap(call)(at), torch.stack([call(x) for x in at]))
    torch.testing.assert_close(torch.vmap(call, in_dims=1)(at.T), torch.stack([call(x) for x in at]))


def test_int64_that_wraps_in_a_traced_call() -> None:
    q, k, v = qkv(8)
    compiled = torch.compile(lambda n: posattn.attention(q, k, v, k_lengths=n), backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="k_lengths"):
        compiled(torch.tensor([2**32 + 3, 8]))


@pytest.mark.parametrize("bounds", [{"offset": [9, 2]}, {"offset": [0, -9]}, {"k_starts": [3, 9]}], ids=str)
def test_bounds_that_nobody_could_look_at(bounds: dict[str, list[int]]) -> None:
    q, k, v = qkv(8)
    name, values = next(iter(bounds.items()))
    position = posattn.Kerple(2)

    def call(x: Tensor) -> Tensor:
        return posattn.attention(q, k, v, position, **{name: x})  # type: ignore[call-overload, no-any-return]

    with pytest.raises(ValueError, match=name):
        torch.compile(call, backend="aot_eager", fullgraph=True)(torch.tensor(values))


@pytest.mark.parametrize("name", ["RoPE", "DAPE-Kerple"])
@pytest.mark.parametrize("each", [False, True], ids=["an int", "a tensor"])
def test_steps_in_a_preallocated_cache_are_one_graph(name: str, each: bool) -> None:
    position: Encoding = EXAMPLES[name]
    k, v = qkv(24)[1:]

    def call(q: Tensor, offset: int | Tensor) -> Tensor:
        return posattn.attention(q, k, v, position, causal=True, offset=offset)

    steps = [torch.tensor([n, n - 3]) if each else n for n in (5, 9, 17)]
    calls = [(qkv(1)[0], step) for step in steps]
    # The first length is compiled as a constant, the second for all.
    assert graphs(call, calls) <= (1 if each else 2)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for q, offset in calls:
        torch.testing.assert_close(compiled(q, offset), call(q, offset), rtol=1e-5, atol=1e-5)


def test_a_range_that_does_not_hold_the_positions() -> None:
    q, k, v = qkv(4)
    at = torch.arange(4)
    position = posattn.T5Bias(2)
    with pytest.raises(ValueError, match=r"q_positions: expected positions in position_range \(0, 2\), got 0 to 3"):
        posattn.attention(q, k, v, position, q_positions=at, k_positions=at, position_range=(0, 2))
    with pytest.raises(ValueError, match="position_range: expected q_positions and k_positions"):
        posattn.attention(q, k, v, position, position_range=(0, 2))
    with pytest.raises(ValueError, match="position_range: expected first <= last"):
        posattn.attention(q, k, v, position, q_positions=at, k_positions=at, position_range=(3, 2))
    with pytest.raises(TypeError, match="position_range: expected two ints"):
        posattn.attention(q, k, v, position, q_positions=at, k_positions=at, position_range=(0, 3.5))  # type: ignore[arg-type]
