"""FIRE's exact pieces against its network, in value and in the gradient of every parameter."""

from __future__ import annotations

import pytest
import torch

from posattn import reference
from posattn.encodings import FIRE, Context
from posattn.encodings.fire import piecewise_linear

WIDE = torch.float64


def network(encoding, q_positions, k_positions):
    """The bias [H, Tq, Tk] by running the network on every pair."""
    i, j = q_positions[:, None].to(WIDE), k_positions[None, :].to(WIDE)

    def psi(y):
        return torch.log((encoding.c * y).abs() + 1)

    near = psi(i - j)
    if encoding.bidirectional:
        near = near * (i - j).sign()
    far = psi(torch.maximum(i, (encoding.length_multiplier * encoding.initial_length).abs()))
    return encoding.mlp((near / (far + encoding.eps))[..., None]).movedim(-1, 0)


def make(bidirectional=False, width=32, initial_length=6.0, seed=0, activation="relu"):
    torch.manual_seed(seed)
    return FIRE(3, width, bidirectional, initial_length=initial_length, activation=activation).double()


def check_same(encoding, q_len, k_len):
    """Same bias and same gradients for a random cotangent."""
    q_positions, k_positions = torch.arange(q_len) + k_len - q_len, torch.arange(k_len)
    weight = torch.randn(3, q_len, k_len, dtype=WIDE)
    results = []
    for bias in (encoding.bias(q_len, k_len), network(encoding, q_positions, k_positions)):
        parameters = dict(encoding.named_parameters())
        gradients = torch.autograd.grad((bias * weight).sum(), list(parameters.values()))
        results.append((bias.detach(), dict(zip(parameters, gradients, strict=True))))
    (bias, gradients), (expected_bias, expected) = results
    torch.testing.assert_close(bias, expected_bias, rtol=1e-12, atol=1e-13)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-10, atol=1e-11, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("q_len", "k_len"), [(17, 17), (4, 20), (20, 4), (1, 1)])
def test_pieces_are_the_network(bidirectional, activation, q_len, k_len):
    check_same(make(bidirectional, activation=activation), q_len, k_len)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_one_hidden_unit(activation):
    check_same(make(width=1, activation=activation), 9, 9)


def test_the_activation_is_one_of_two():
    assert isinstance(FIRE(2, activation="leaky_relu").mlp[1], torch.nn.LeakyReLU)
    with pytest.raises(ValueError, match="activation: expected one of 'relu', 'leaky_relu', got 'gelu'"):
        FIRE(2, activation="gelu")


@pytest.mark.parametrize("bidirectional", [False, True])
def test_units_that_never_switch(bidirectional):
    """A first weight of zero gives a unit that is on or off for all y; its knot is at infinity."""
    encoding = make(bidirectional)
    with torch.no_grad():
        encoding.mlp[0].weight[:6] = 0.0
        encoding.mlp[0].bias[:3] = torch.tensor([0.7, -0.7, 0.0])
    check_same(encoding, 11, 11)


def test_no_unit_switches():
    encoding = make()
    with torch.no_grad():
        encoding.mlp[0].weight.zero_()
    check_same(encoding, 6, 6)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_zero_biases_put_every_knot_on_the_diagonal(bidirectional):
    """All of y = 0 lies on knots then, where ReLU's gradient is 0 by convention."""
    encoding = make(bidirectional)
    with torch.no_grad():
        encoding.mlp[0].bias.zero_()
    check_same(encoding, 8, 8)


def test_negative_and_zero_c_and_small_multiplier():
    for c, multiplier in ((-0.3, -2.0), (0.0, 1.0), (0.5, 0.01)):
        encoding = make()
        with torch.no_grad():
            encoding.c.fill_(c)
            encoding.length_multiplier.fill_(multiplier)
        check_same(encoding, 9, 9)


def test_the_threshold_learns_only_while_it_is_what_counts():
    encoding = make(initial_length=4.0)
    encoding.bias(1, 3).sum().backward()
    assert encoding.length_multiplier.grad != 0
    encoding.zero_grad()
    encoding.bias(1, 9).sum().backward()
    assert encoding.length_multiplier.grad == 0


@pytest.mark.parametrize("smallest", [3, 13])
def test_explicit_positions(smallest):
    """The first query before the threshold of 6, where its position does not count, and past it, where it does."""
    encoding = make()
    q_positions, k_positions = torch.tensor([40, smallest, 17, smallest]), torch.tensor([0, 41, 2])
    bias = encoding.bias(4, 3, q_positions=q_positions, k_positions=k_positions)
    torch.testing.assert_close(bias, network(encoding, q_positions, k_positions), rtol=1e-12, atol=1e-13)


def test_float32_is_as_precise_as_the_float32_network():
    encoding = make(seed=3)
    exact = network(encoding, torch.arange(300), torch.arange(300))
    encoding = encoding.float()
    positions = torch.arange(300)
    with torch.no_grad():
        i = positions[:, None].float()
        near = torch.log((encoding.c * (i - i.T)).abs() + 1)
        far = torch.log((encoding.c * i.clamp(min=6.0)).abs() + 1)
        naive = encoding.mlp((near / (far + 1e-6))[..., None]).movedim(-1, 0)
        error = (encoding.bias(300, 300) - exact).abs().max()
    assert error <= 2 * (naive - exact).abs().max() + 2**-23 * exact.abs().max()


def test_the_plan_is_in_order():
    encoding = make(True).float()
    with torch.no_grad():
        encoding.mlp[0].weight[:4] = torch.tensor([[0.0], [1e-45], [-1e-45], [1e-30]])
    profile = encoding.lower(Context(5, 9, 3, 8, torch.device("cpu"), torch.float32)).bias.profile
    assert (profile.first, profile.row_first) == (-4, -4)
    assert profile.psi.shape == profile.row_scale.shape == (13,)
    assert profile.knots.shape == (32,)
    assert (profile.knots.diff() >= 0)[:-1].all()
    assert not profile.knots.isnan().any()
    assert (profile.knots > -float("inf")).all()
    assert profile.segment_slope.shape == profile.segment_intercept.shape == (3, 33)
    for operand in (profile.psi, profile.row_scale, profile.knots, profile.segment_slope, profile.segment_intercept):
        assert operand.dtype == torch.float32
    assert not profile.knots.requires_grad


def test_pieces_of_a_network_written_out():
    """2 relu(y - 1) - 3 relu(-2 y - 4) + 5: knots at -2 and 1."""
    a, b = torch.tensor([1.0, -2.0]), torch.tensor([-1.0, -4.0])
    knots, slope, intercept = piecewise_linear(a, b, torch.tensor([[2.0, -3.0]]), torch.tensor([5.0]), torch.float32)
    torch.testing.assert_close(knots, torch.tensor([-2.0, 1.0]))
    torch.testing.assert_close(slope, torch.tensor([[6.0, 0.0, 2.0]]))
    torch.testing.assert_close(intercept, torch.tensor([[17.0, 5.0, 3.0]]))


def test_gradcheck_through_the_reference():
    encoding = make(width=4)
    context = Context(4, 4, 3, None, torch.device("cpu"), WIDE)
    positions = torch.arange(4)[None]
    parameters = dict(encoding.named_parameters())

    def run(*values):
        changed = dict(zip(parameters, values, strict=True))
        plan = torch.func.functional_call(Lowered(encoding), {f"encoding.{n}": v for n, v in changed.items()}, context)
        return reference.dense_bias(plan.bias, positions, positions)

    assert torch.autograd.gradcheck(run, tuple(parameters.values()))


class Lowered(torch.nn.Module):
    def __init__(self, encoding):
        super().__init__()
        self.encoding = encoding

    def forward(self, context):
        return self.encoding.lower(context)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width: expected a positive int, got 0"),
        ({"initial_c": float("nan")}, "initial_c: expected a positive finite number"),
        ({"initial_length": 0.0}, "initial_length: expected a positive finite number"),
        ({"eps": -1e-6}, "eps: expected a positive finite number"),
        ({"eps": 1e-60}, "eps: expected a positive finite number within float32's range"),
        ({"initial_c": 1e39}, "initial_c: expected a positive finite number within float32's range"),
        ({"initial_length": 1e39}, "initial_length: expected a positive finite number within float32's range"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FIRE(2, **arguments)
