"""The tolerance rule itself, on errors of a known size: what is a little beyond it must not pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import posattn
from posattn import parity
from posattn.parity import compare, measure, rounding

EPS = torch.finfo(torch.float32).eps
NONE = torch.zeros(1)


def error_of(size: float, naive: float, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> parity.Comparison:
    """A result off by `size` where naive PyTorch is off by `naive`, both exactly; the largest number is `scale`."""
    exact = torch.tensor([0.0, scale], dtype=torch.float64)
    off = [torch.tensor([x, scale], dtype=torch.float64).to(dtype) for x in (size, naive)]
    return compare("x", *off, exact, NONE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_twice_the_error_of_naive_pytorch(dtype: torch.dtype) -> None:
    assert error_of(1.5, 1.0, dtype=dtype).ok
    assert not error_of(2.25, 1.0, dtype=dtype).ok


def test_a_few_ulp_where_naive_pytorch_is_exact() -> None:
    assert error_of(3.0 * EPS, 0.0).ok
    assert not error_of(5.0 * EPS, 0.0).ok
    assert error_of(3.0 * EPS * 64.0, 0.0, 64.0).ok
    assert not error_of(3.0 * EPS * 64.0, 0.0).ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_rounding_of_a_narrow_type(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    assert rounding(dtype) == eps
    assert error_of(0.75 * eps, 0.0, dtype=dtype).ok
    assert not error_of(1.5 * eps, 0.0, dtype=dtype).ok


def test_what_roundings_on_the_way_move() -> None:
    exact, off = torch.zeros(2, dtype=torch.float64), torch.tensor([0.0, 8.0 * EPS])
    moved = torch.tensor([0.5, 2.5], dtype=torch.float64)
    assert compare("x", off, exact.float(), exact, moved, torch.float32).ok
    assert not compare("x", off, exact.float(), exact, moved / 2, torch.float32).ok


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite(value: float) -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    got = torch.tensor([1.0, value])
    assert not compare("x", got, exact.float(), exact, NONE, torch.float32).ok
    assert not compare("x", got, got, exact, NONE, torch.float32).ok  # nor where naive PyTorch has it too
    both = torch.tensor([1.0, value], dtype=torch.float64)
    assert compare("x", got, got, both, NONE, torch.float32).ok == (value == value)
    assert not compare("x", torch.tensor([1.0, 2.0]), got, both, NONE, torch.float32).ok


def test_another_shape() -> None:
    exact = torch.zeros(2, 1, dtype=torch.float64)
    assert not compare("x", torch.zeros(2), exact.float(), exact, NONE, torch.float32).ok
    assert compare("x", torch.zeros(0), torch.zeros(0), torch.zeros(0).double(), NONE, torch.float32).ok


def test_every_result_is_compared() -> None:
    q, k, v = (torch.randn(1, 2, n, 8) for n in (5, 7, 7))
    options = {"bias": torch.randn(5, 7), "sinks": torch.randn(2)}
    found = {c.name for c in measure(q, k, v, posattn.Kerple(2), options, "reference")}
    assert found == {"out", "lse", "dq", "dk", "dv", "dbias", "dsinks", "dp", "da"}


@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv", "dp"])
def test_each_result_can_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One number of one result, off by a thousandth of its largest."""
    right = parity._Run.results

    def wrong(run: parity._Run, grad_out: Tensor, grad_lse: Tensor) -> dict[str, Tensor]:
        results = right(run, grad_out, grad_lse)
        if run.backend == "cpu":
            results[name] = results[name].clone()
            results[name].view(-1)[3 % results[name].numel()] += 1e-3 * results[name].abs().max()
        return results

    made = parity._Run.__init__

    def remember(run: parity._Run, *arguments: object) -> None:
        made(run, *arguments)  # type: ignore[arg-type]
        run.backend = arguments[5]  # type: ignore[attr-defined]

    monkeypatch.setattr(parity._Run, "results", wrong)
    monkeypatch.setattr(parity._Run, "__init__", remember)
    q, k, v = (torch.randn(1, 2, n, 8) for n in (9, 11, 11))
    found = measure(q, k, v, posattn.Kerple(2), {"causal": True}, "cpu")
    assert [c.name for c in found if not c.ok] == [name]


def test_large_logits_allow_for_their_own_rounding_and_no_more() -> None:
    """The rule's allowance stays below a hundred roundings where logits are of size one."""
    q, k, v = (torch.randn(1, 2, n, 8) for n in (9, 11, 11))
    for comparison in measure(q, k, v, None, {}, "reference"):
        assert comparison.allowed < 2.0 * comparison.naive_error + 400.0 * EPS
