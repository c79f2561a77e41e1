"""torch's own samples for scaled_dot_product_attention (its OpInfo), against posattn's drop-in.

Meant differences: dropout draws other elements, so its samples are held to zero dropout and, with it, to shape and
finiteness; a row that may see no key gives zeros, where torch's mathematics gives NaN; errors are ValueErrors and
TypeErrors that name the argument (and RuntimeErrors, as torch's are).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import posattn
from posattn import parity

sdpa = posattn.scaled_dot_product_attention
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@cache
def info() -> Any:
    # Takes seconds to import, which every run and worker would pay for.
    from torch.testing._internal.common_methods_invocations import op_db

    (found,) = [found for found in op_db if found.name == "nn.functional.scaled_dot_product_attention"]
    return found


@cache
def samples(dtype: torch.dtype, requires_grad: bool = False) -> list[Any]:
    """Made once: torch takes far longer to draw them all than we to compute with one."""
    torch.manual_seed(0)
    return list(info().sample_inputs("cpu", dtype, requires_grad=requires_grad))


def without_dropout(sample: Any) -> dict[str, Any]:
    return {**sample.kwargs, "dropout_p": 0.0}


def leaves(sample: Any) -> Iterator[Tensor]:
    for value in (sample.input, *sample.args, *sample.kwargs.values()):
        if isinstance(value, Tensor) and value.requires_grad:
            yield value


def run(function: Any, sample: Any, **options: Any) -> Tensor:
    result: Tensor = function(sample.input, *sample.args, **{**sample.kwargs, **options})
    return result


def test_there_are_samples() -> None:
    assert len(samples(torch.float32)) >= 10


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype) -> None:
    pairs = zip(samples(dtype, requires_grad=True), samples(torch.float64, requires_grad=True), strict=True)
    for index, (sample, exact) in enumerate(pairs):
        assert_values_and_gradients(sample, exact, dtype, index)


def assert_values_and_gradients(sample: Any, exact: Any, dtype: torch.dtype, index: int) -> None:
    with torch.no_grad():  # the same numbers, in float64
        for wide, narrow in zip(leaves(exact), leaves(sample), strict=True):
            wide.copy_(narrow)
    wanted = run(F.scaled_dot_product_attention, exact, dropout_p=0.0).nan_to_num()
    got, naive = (run(f, sample, dropout_p=0.0) for f in (sdpa, F.scaled_dot_product_attention))
    assert got.shape == wanted.shape
    assert got.dtype == dtype
    weight = torch.linspace(-1, 1, max(got.numel(), 1), dtype=torch.float64)[: got.numel()].view(got.shape)
    results = []
    for out, given in ((got, sample), (naive, sample), (wanted, exact)):
        inputs = list(leaves(given))
        results.append((out, *torch.autograd.grad(out, inputs, weight.to(out.dtype), allow_unused=True)))
    # The backward pass takes dO . O from the output as it was rounded, where torch's own sums P dP: a logit's gradient
    # is off by a rounding of its terms' size, and so is what keys and queries multiply it by.
    q, (k, v) = sample.input.detach().double().abs(), (x.detach().double().abs() for x in sample.args)
    terms = v.max() * weight.abs().sum(-1).max() * torch.maximum(q.max(), k.max()) * sample.kwargs.get("scale", 1.0)
    for place, (ours, theirs, true) in enumerate(zip(*results, strict=True)):
        if true is None or ours is None or not true.numel():
            assert ours is None or not ours.any()
            continue
        allowed = 2 * (theirs.double().nan_to_num() - true).abs().max()
        allowed += parity.rounding(dtype) * (2 * true.abs().max() + (terms if place else 0.0))
        assert (ours.double() - true).abs().max() <= allowed, (index, place, sample)


def test_dropout_keeps_shapes() -> None:
    for sample in samples(torch.float32, requires_grad=True):
        out = run(sdpa, sample)
        assert out.shape == run(F.scaled_dot_product_attention, sample).shape
        assert out.isfinite().all()


def test_float64() -> None:
    for sample in samples(torch.float64):
        expected = run(F.scaled_dot_product_attention, sample, dropout_p=0.0).nan_to_num()
        torch.testing.assert_close(run(sdpa, sample, dropout_p=0.0), expected)


def test_gradients_by_differences() -> None:
    """gradcheck, of the reference in float64, whatever a sample's mask and sharing of heads."""
    for sample in samples(torch.float64, requires_grad=True):
        options = without_dropout(sample)
        inputs = (sample.input, *sample.args)
        if sum(x.numel() for x in inputs) <= 400:
            assert torch.autograd.gradcheck(lambda *x, options=options: sdpa(*x, **options), inputs)


def test_strided_inputs() -> None:
    for sample in samples(torch.float32):
        strided = sample.noncontiguous()
        torch.testing.assert_close(run(sdpa, strided, dropout_p=0.0), run(sdpa, sample, dropout_p=0.0))


def test_autocast() -> None:
    for sample in samples(torch.float32):
        with torch.autocast("cpu", torch.bfloat16):
            out, theirs = (run(f, sample, dropout_p=0.0) for f in (sdpa, F.scaled_dot_product_attention))
        assert out.dtype == theirs.dtype == torch.bfloat16
        torch.testing.assert_close(out, theirs.nan_to_num(), rtol=0.05, atol=0.1)


def test_meta() -> None:
    for sample in samples(torch.float32):
        moved = sample.transform(lambda x: x.to("meta") if isinstance(x, Tensor) else x)
        out = run(sdpa, moved, dropout_p=0.0)
        assert out.is_meta
        assert out.shape == run(sdpa, sample, dropout_p=0.0).shape


@pytest.mark.parametrize("dim", [0, 1])
def test_vmap(dim: int) -> None:
    for sample in samples(torch.float32):
        inputs = [torch.stack([x, 2 * x], dim) for x in (sample.input, *sample.args)]
        options = without_dropout(sample)
        got = torch.vmap(lambda *x, options=options: sdpa(*x, **options), in_dims=dim)(*inputs)
        expected = [sdpa(*(x.select(dim, i) for x in inputs), **options) for i in range(2)]
        torch.testing.assert_close(got, torch.stack(expected))


@pytest.mark.slow
def test_compiled() -> None:
    for sample in samples(torch.float32):
        torch._dynamo.reset()
        options = without_dropout(sample)
        compiled = torch.compile(lambda *x, options=options: sdpa(*x, **options), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(sample.input, *sample.args), run(sdpa, sample, dropout_p=0.0))


def test_error_inputs() -> None:
    """torch's own list of errors for the function, and more."""
    wrong = list(info().error_inputs("cpu")) if info().error_inputs_func is not None else []
    for error in wrong:
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            run(sdpa, error.sample_input)
    q = torch.randn(2, 3, 4, 8)
    for bad in (
        (q, q[..., :7], q),
        (q, q, q[:, :, :3]),
        (q, q.double(), q),
        (q.to_sparse(), q, q),
        (q[0, 0, 0], q, q),
    ):
        with pytest.raises(RuntimeError):
            sdpa(*bad)
