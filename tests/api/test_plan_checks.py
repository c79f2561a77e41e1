"""A plan's operands are an input too: each wrong shape, device, dtype and type of an encoding's own, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import posattn
from posattn.encodings.base import Context, Encoding
from posattn.plan import Bias, Dense, HeadMix, Plan, Profile, Rotary, Slope, Table

BATCH, HEADS, Q_LEN, K_LEN, DIM = 2, 4, 5, 7, 8
SEEDED = torch.Generator().manual_seed(0)
Q = torch.randn(BATCH, HEADS, Q_LEN, DIM, generator=SEEDED)
K = torch.randn(BATCH, HEADS, K_LEN, DIM, generator=SEEDED)


class Given(Encoding):
    """Lowers to whatever it was given."""

    def __init__(self, plan: object) -> None:
        super().__init__()
        self.plan = plan

    def build(self, context: Context) -> Plan:
        return self.plan  # type: ignore[return-value]


def bias(**operands: object) -> Plan:
    return Plan(bias=Bias(**operands))  # type: ignore[arg-type]


def rotary(**wrong: object) -> Plan:
    q, k = torch.rand(1, Q_LEN, 4), torch.rand(1, K_LEN, 4)
    return Plan(rotary=replace(Rotary(q, q, k, k), **wrong), bias=Bias())  # type: ignore[arg-type]


def profile(**wrong: object) -> Plan:
    given = Profile(torch.rand(9), -4, torch.rand(9), -4, torch.rand(3), torch.rand(HEADS, 4), torch.rand(HEADS, 4))
    return bias(profile=replace(given, **wrong))  # type: ignore[arg-type]


def mix(**wrong: object) -> Plan:
    given = HeadMix(torch.rand(6, HEADS), torch.rand(6), torch.rand(HEADS, 6), torch.rand(HEADS))
    return Plan(mix=replace(given, **wrong), bias=Bias())  # type: ignore[arg-type]


TABLE, META = torch.rand(HEADS, 9), torch.rand(HEADS, 9, device="meta")
WRONG: dict[str, tuple[object, str]] = {
    "a Bias": (Bias(), r"Given.build to return a Plan, got Bias; a Bias goes in Plan\(bias"),
    "a tuple": ((TABLE, 0), r"Given.build to return a Plan, got tuple; values \[H, L\] .* in Plan\(bias=Bias\(table="),
    "a Tensor": (TABLE, r"Given.build to return a Plan, got Tensor; values \[H, L\] .*Table\(values, first\)"),
    "a Table": (Table(TABLE, 0), r"Given.build to return a Plan, got Table; a Table goes in Plan\(bias=Bias\(table="),
    "an encoding": (
        posattn.Bias(TABLE, 0),
        r"Given.build to return a Plan, got the encoding posattn.Bias; its plan is position\(context\)",
    ),
    "None": (None, "Given.build to return a Plan, got NoneType"),
    "bias not a Bias": (Plan(bias=Table(TABLE, 0)), r"bias .* a Bias, got Table; a Table goes in Plan\(bias=Bias"),  # type: ignore[arg-type]
    "bias the encoding": (Plan(bias=posattn.Bias(TABLE, 0)), "bias .* a Bias, got the encoding posattn.Bias"),  # type: ignore[arg-type]
    "a Bias without its name": (Plan(Bias()), r"rotary .* a Rotary, got Bias; a Bias goes in Plan\(bias=...\)"),  # type: ignore[arg-type]
    "a table that is a pair": (bias(table=(TABLE, 0)), r"bias.table .* a Table, got tuple; .* Table\(values, first\)"),
    "a dense that is a tensor": (bias(dense=TABLE), r"bias.dense .* a Dense, got Tensor; a matrix .* Dense\(bias\)"),
    "rotary not one": (Plan(rotary=torch.rand(2), bias=Bias()), "rotary .* a Rotary, got Tensor"),  # type: ignore[arg-type]
    "slope's length": (bias(slope=Slope(torch.rand(3))), r"bias.slope.slope .* shape \[4\], got \[3\]"),
    "slope's batch": (bias(slope=Slope(torch.rand(3, HEADS))), r"shape \[2, 4\], got \[3, 4\]"),
    "slope a number": (bias(slope=Slope(1.0)), "bias.slope.slope .* torch.Tensor, got float"),  # type: ignore[arg-type]
    "slope a Tensor": (bias(slope=torch.rand(HEADS)), "bias.slope .* a Slope, got Tensor"),
    "table's heads": (bias(table=Table(torch.rand(3, 9), 0)), r"bias.table.values .* \[4, distances\], got \[3, 9\]"),
    "table of one dimension": (bias(table=Table(torch.rand(9), 0)), r"\[4, distances\], got \[9\]; \[None\] makes"),
    "empty table": (bias(table=Table(torch.rand(HEADS, 0), 0)), r"\[4, distances\], got \[4, 0\]"),
    "table's first": (bias(table=Table(TABLE, 0.0)), "bias.table.first .* an int, got float"),  # type: ignore[arg-type]
    "table of integers": (bias(table=Table(TABLE.long(), 0)), "of a floating dtype, got torch.int64"),
    "table elsewhere": (bias(table=Table(META, 0)), "bias.table.values .* on cpu like q, got meta"),
    "psi's dimensions": (profile(psi=torch.rand(1, 9)), r"psi .* shape \[distances\], got \[1, 9\]"),
    "empty row scale": (profile(row_scale=torch.rand(0)), r"row_scale .* \[positions\], got \[0\]"),
    "knots' dimensions": (profile(knots=torch.rand(3, 1)), r"knots .* \[knots\], got \[3, 1\]"),
    "one line too few": (profile(segment_slope=torch.rand(HEADS, 3)), r"segment_slope .* \[4, 4\], got \[4, 3\]"),
    "lines of other heads": (profile(segment_intercept=torch.rand(2, 4)), r"segment_intercept .* got \[2, 4\]"),
    "dense of two": (bias(dense=Dense(torch.rand(2, 2))), r"bias.dense.bias .* got \[2, 2\]; \[None, None\] makes"),
    "dense of three": (bias(dense=Dense(torch.rand(HEADS, Q_LEN, K_LEN))), r"got \[4, 5, 7\]; \[None\] makes one"),
    "dense's keys": (bias(dense=Dense(torch.rand(1, 1, Q_LEN, 6))), r"got \[1, 1, 5, 6\]"),
    "short angles": (rotary(k_cos=torch.rand(1, 6, 4)), r"rotary.k_cos .* \[2 or 1, 7, 4\], got \[1, 6, 4\]"),
    "few sines": (rotary(q_sin=torch.rand(1, Q_LEN, 3)), r"rotary.q_sin .* \[2 or 1, 5, 4\], got \[1, 5, 3\]"),
    "sines of one entry": (rotary(q_cos=torch.rand(2, Q_LEN, 4)), r"sines .* \[2, 5, 4\], got \[1, 5, 4\]"),
    "angles' batch": (rotary(q_cos=torch.rand(3, Q_LEN, 4)), r"rotary.q_cos .* got \[3, 5, 4\]"),
    "w1 without inputs": (mix(w1=torch.rand(6, 3)), r"mix.w1 .* \[width, 4\], got \[6, 3\]"),
    "w1 for an inner bias": (mix(inner=Bias(table=Table(TABLE, 0))), r"mix.w1 .* \[width, 8\], got \[6, 4\]"),
    "short b1": (mix(b1=torch.rand(5)), r"mix.b1 .* \[6\], got \[5\]"),
    "w2's width": (mix(w2=torch.rand(HEADS, 5)), r"mix.w2 .* \[4, 6\], got \[4, 5\]"),
    "b2's heads": (mix(b2=torch.rand(3)), r"mix.b2 .* \[4\], got \[3\]"),
    "a form of its own": (mix(form="sum"), "mix.form .* one of 'concat-residual', .*, got 'sum'"),
    "an inner table": (
        mix(w1=torch.rand(6, 8), inner=Bias(table=Table(torch.rand(2, 9), 0))),
        r"mix.inner.table.values .* got \[2, 9\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("plan", "message"), WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_wrong_operand_is_named(plan: object, message: str, backend: str) -> None:
    with pytest.raises(
        (ValueError, TypeError), match=f"position: expected {message}" if "Given" in message else message
    ):
        posattn.attention(Q, K, K, Given(plan), backend=backend)


@pytest.mark.parametrize("name", ["a tuple", "bias not a Bias", "table of integers"])
def test_a_wrong_plan_is_named_by_bias_too(name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=WRONG[name][1]):
        Given(WRONG[name][0]).bias(3, 3)


def test_the_bias_of_operands_with_too_few_dimensions() -> None:
    with pytest.raises(ValueError, match=r"bias.table.values .* \[1, distances\], got \[9\]; \[None\] makes"):
        Given(bias(table=Table(torch.rand(9), 0))).bias(3, 3)
    with pytest.raises(ValueError, match=r"bias.dense.bias .* got \[4, 3, 3\]; \[None\] makes one"):
        Given(bias(dense=Dense(torch.rand(4, 3, 3)))).bias(3, 3)


def test_the_bias_of_each_sequence() -> None:
    slopes, dense = torch.rand(2, HEADS), torch.rand(2, 1, 3, 5)
    distance = torch.arange(3)[:, None] + 2 - torch.arange(5)
    expected = -slopes[:, :, None, None] * distance.abs()
    both = Given(bias(slope=Slope(slopes), dense=Dense(dense)))
    both.num_heads = HEADS
    torch.testing.assert_close(both.bias(3, 5), expected + dense)
    torch.testing.assert_close(posattn.ALiBi(HEADS, slopes=slopes).bias(3, 5), expected)
    torch.testing.assert_close(posattn.ALiBi(HEADS, slopes=slopes[:1]).bias(3, 5), expected[0])
    with pytest.raises(ValueError, match=r"bias.dense.bias .* \[[23] or 1, 4 or 1, .* got|slope .* \[[23], 4\]"):
        Given(bias(slope=Slope(torch.rand(3, HEADS)), dense=Dense(dense))).bias(3, 5)


def test_the_bias_of_an_encoding_that_adds_nothing() -> None:
    assert torch.equal(Given(Plan(bias=Bias())).bias(3, 5), torch.zeros(1, 3, 5))


def test_rotary_wider_than_a_head() -> None:
    q, k = torch.rand(1, Q_LEN, 5), torch.rand(1, K_LEN, 5)
    with pytest.raises(ValueError, match=r"rotary .* 1 to 4 pairs for head_dim=8, got 5"):
        posattn.attention(Q, K, K, Given(Plan(rotary=Rotary(q, q, k, k), bias=Bias())))


class Gaussian(Encoding):
    """The README's example with one width for all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.width = nn.Parameter(torch.tensor([3.0]))

    def build(self, context: Context) -> Plan:
        first, _ = context.distance_range
        return Plan(bias=Bias(table=Table(-((context.distances() / self.width[:, None]) ** 2), first)))


SHARED: dict[str, Callable[[Tensor], Plan]] = {
    "table": lambda x: bias(table=Table(x * torch.arange(11.0)[None], -4)),
    "slope": lambda x: bias(slope=Slope(x)),
    "lines": lambda x: profile(segment_slope=x * torch.ones(1, 4), segment_intercept=x * torch.ones(1, 4)),
    "inner table": lambda x: mix(
        w1=torch.full((6, 8), 0.1), inner=bias(table=Table(x * torch.arange(11.0)[None], -4)).bias
    ),
}


@pytest.mark.parametrize("plan", SHARED.values(), ids=SHARED.keys())
def test_what_all_heads_share_is_expanded(plan: Callable[[Tensor], Plan]) -> None:
    torch.manual_seed(0)

    def run(backend: str) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        x = torch.tensor([0.5], requires_grad=True)
        out = posattn.attention(Q, K, K, Given(plan(x)), backend=backend)
        return out, torch.autograd.grad(out.square().sum(), x)[0]

    for ours, theirs in zip(run("cpu"), run("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_one_width_for_64_heads() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 64, 33, 8)
    position = Gaussian()
    for _ in range(3):
        out = posattn.attention(q, q, q, position, causal=True)
        (grad,) = torch.autograd.grad(out.square().sum(), position.parameters())
    expected = posattn.attention(q, q, q, position, causal=True, backend="reference")
    torch.testing.assert_close(out, expected)
    (want,) = torch.autograd.grad(expected.square().sum(), position.parameters())
    torch.testing.assert_close(grad, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "position", [posattn.ALiBi(4, learnable=True), posattn.T5Bias(4), posattn.RelativeTable(4, 3)], ids=repr
)
def test_a_parameter_on_another_device_is_no_encoding_at_all(position: Encoding) -> None:
    with pytest.raises(ValueError, match="on cpu like q, got meta; an encoding moves with its model"):
        posattn.attention(Q, K, K, position.to("meta"))


def test_an_assigned_parameter_of_another_shape() -> None:
    position = posattn.T5Bias(4)
    position.weight = nn.Parameter(torch.randn(32, 1))
    torch.testing.assert_close(
        posattn.attention(Q, K, K, position), posattn.attention(Q, K, K, position, backend="reference")
    )
    position.weight = nn.Parameter(torch.randn(32, 3))
    with pytest.raises(ValueError, match=r"T5Bias .* shape \[4, distances\], got \[3,"):
        posattn.attention(Q, K, K, position)
