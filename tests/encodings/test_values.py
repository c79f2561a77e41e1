"""NaN and infinities in what an encoding hands to the kernels are errors that name where they are."""

from __future__ import annotations

import math

import pytest
import torch

import posattn
from posattn.encodings import DAPE, ALiBi, Context, Encoding, Kerple, RelativeTable
from posattn.plan import Bias, Dense, Mask, Plan, Profile, Rotary, Slope, Table

HEADS, TOKENS = 2, 3
ONES = torch.ones(HEADS, 5)


class Given(Encoding):
    """A plan as it stands."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.num_heads, self.plan = HEADS, plan

    def build(self, context: Context) -> Plan:
        return self.plan


def plans(value: float) -> dict[str, Plan]:
    """A plan for each operand, with `value` as its last element."""

    def bad(*shape: int) -> torch.Tensor:
        operand = torch.ones(shape)
        operand.view(-1)[-1] = value
        return operand

    parts = {"psi": ONES[0], "row_scale": ONES[0], "knots": ONES[0, :1], "segment_slope": ONES[:, :2]}
    parts["segment_intercept"] = ONES[:, :2]
    found = {
        "bias.slope.slope": Plan(bias=Bias(slope=Slope(bad(HEADS)))),
        "bias.table.values": Plan(bias=Bias(table=Table(bad(HEADS, 5), -2))),
        "bias.dense.bias": Plan(bias=Bias(dense=Dense(bad(1, HEADS, TOKENS, TOKENS)))),
    }
    for name in parts:
        operands = parts | {name: bad(*parts[name].shape)}
        found[f"bias.profile.{name}"] = Plan(bias=Bias(profile=Profile(first=-2, row_first=-2, **operands)))
    for name in ("q_cos", "q_sin", "k_cos", "k_sin"):
        operands = {other: torch.ones(1, TOKENS, 2) for other in ("q_cos", "q_sin", "k_cos", "k_sin")}
        found[f"rotary.{name}"] = Plan(rotary=Rotary(**operands | {name: bad(1, TOKENS, 2)}), bias=Bias())
    return found


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", plans(0.0))
def test_a_value_that_no_operand_may_hold(name, value):
    allowed = {math.inf: "knots", -math.inf: "values bias"}.get(value, "")
    encoding, q = Given(plans(value)[name]), torch.randn(1, HEADS, TOKENS, 4)
    if name.rpartition(".")[2] in allowed.split():
        assert posattn.attention(q, q, q, encoding).isfinite().all()
        return
    got = "NaN" if math.isnan(value) else str(value)
    for around, whose in ((encoding, "Given"), (encoding + Given(Plan(bias=Bias())), "Sum")):
        with pytest.raises(ValueError, match=rf"{whose}: expected a plan of finite values, got {got} in {name}"):
            posattn.attention(q, q, q, around)


def test_nan_in_the_bias_inside_a_dape_is_named():
    q = torch.randn(1, HEADS, TOKENS, 4)
    dape = DAPE(Given(plans(math.nan)["bias.table.values"]), HEADS)
    with pytest.raises(ValueError, match=r"DAPE: expected a plan of finite values, got NaN in mix.inner.table.values"):
        posattn.attention(q, q, q, dape)


@pytest.mark.parametrize("row", [[-3e38, -3e38], [3e38, 3e38, -3e38, -3e38]])
def test_finite_values_whose_sum_is_not(row):
    encoding = Given(Plan(bias=Bias(table=Table(torch.tensor([row] * HEADS), -2))))
    q = torch.randn(1, HEADS, TOKENS, 4)
    encoding.lower(Context.of(q, q, Mask()))


def test_nan_in_fixed_slopes_is_noticed():
    encoding, q = ALiBi(HEADS), torch.randn(1, HEADS, TOKENS, 4)
    encoding.slopes[1] = math.nan
    with pytest.raises(ValueError, match=r"ALiBi: expected a plan of finite values, got NaN in bias.slope.slope"):
        posattn.attention(q, q, q, encoding)


def test_infinite_parameters_are_noticed_where_they_give_nan():
    q = torch.randn(1, HEADS, TOKENS, 4)
    encoding = Kerple(HEADS)
    with torch.no_grad():
        encoding.p[0] = math.inf
    with pytest.raises(ValueError, match=r"Kerple: expected a plan of finite values, got NaN in bias.table.values"):
        posattn.attention(q, q, q, encoding)
    masking = RelativeTable(HEADS, 1)
    with torch.no_grad():
        masking.weight[:, 2] = -math.inf  # forbids every key before the query
    assert posattn.attention(q, q, q, masking).isfinite().all()
