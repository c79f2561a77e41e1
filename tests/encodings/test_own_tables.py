"""Encodings made in one line: a table of numbers (Bias), and a function of the distance (relative)."""

from __future__ import annotations

import copy
import functools
import math
import pickle

import pytest
import torch
from torch import nn

import posattn
from posattn.encodings import Bias, Context, Relative

HEADS, DIM, TOKENS = 4, 8, 10
CPU = torch.device("cpu")


def qkv(q_len=TOKENS, k_len=TOKENS, dtype=torch.float32):
    return [torch.randn(1, HEADS, n, DIM, dtype=dtype) for n in (q_len, k_len, k_len)]


def context(q_len=TOKENS, k_len=TOKENS, dtype=torch.float32, device=CPU):
    return Context(q_len, k_len, HEADS, DIM, device, dtype)


# Bias


@pytest.mark.parametrize("first", [-20, -3, 0, 2, 30])
def test_a_table_is_read_at_the_distance_and_clamped(first):
    values = torch.randn(HEADS, 6)
    bias = Bias(values, first).bias(4, 7)
    for i in range(4):
        for j in range(7):
            column = min(max(i + 3 - j - first, 0), 5)
            assert torch.equal(bias[:, i, j], values[:, column])


def test_a_fixed_table_is_a_copy_that_stays_float32():
    values = torch.randn(HEADS, 6)
    before = values.clone()
    encoding = Bias(values, 0)
    values.zero_()
    assert not list(encoding.parameters())
    assert torch.equal(encoding.state_dict()["values"], before)
    assert torch.equal(encoding.bfloat16().values, before)
    assert torch.equal(encoding.float().values, before)
    assert encoding.double().values.dtype == torch.float64
    assert Bias(before.bfloat16(), 0).values.dtype == torch.float32
    other = Bias(values, 0)
    other.load_state_dict({"values": before.bfloat16()})
    assert torch.equal(other.values, before.bfloat16().float())


def test_a_learnable_table_and_a_given_parameter():
    values = torch.randn(HEADS, 6)
    learned = Bias(values, 0, learnable=True)
    assert torch.equal(learned.values, values)
    assert learned.values is not values
    assert learned.bfloat16().values.dtype == torch.bfloat16
    shared = nn.Parameter(values.clone())
    encoding = Bias(shared, 0)
    assert encoding.values is shared
    posattn.attention(*qkv(), encoding).sum().backward()
    assert shared.grad.abs().sum() > 0
    with torch.no_grad():
        shared.zero_()
    encoding.reset_parameters()
    assert torch.equal(shared, values)


def test_a_computed_table_passes_its_gradient_on():
    """T5 in one line: the graph behind the values gets the gradient, and no state_dict holds them."""
    weight = torch.randn(32, HEADS, requires_grad=True)
    t5 = posattn.T5Bias(HEADS)
    t5.weight = nn.Parameter(weight.detach().clone())
    distances = torch.arange(1 - TOKENS, TOKENS)
    encoding = Bias(weight[t5.buckets(distances)].T, 1 - TOKENS)
    assert not encoding.state_dict()
    q, k, v = qkv()
    got, expected = posattn.attention(q, k, v, encoding), posattn.attention(q, k, v, t5)
    torch.testing.assert_close(got, expected)
    got.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(weight.grad, t5.weight.grad)
    encoding.reset_parameters()  # nothing of its own


def test_one_row_serves_any_number_of_heads():
    values = torch.randn(1, 2 * TOKENS - 1)
    encoding, q = Bias(values, 1 - TOKENS), torch.randn(1, 3, TOKENS, DIM)
    each = Bias(values.expand(3, -1), 1 - TOKENS)
    assert encoding.num_heads is None
    torch.testing.assert_close(posattn.attention(q, q, q, encoding), posattn.attention(q, q, q, each))
    torch.testing.assert_close(
        posattn.attention(q, q, q, encoding + posattn.ALiBi(3)), posattn.attention(q, q, q, posattn.ALiBi(3) + each)
    )
    mix = posattn.DAPE(encoding, 3)
    same = posattn.DAPE(each, 3)
    same.mlp.load_state_dict(mix.mlp.state_dict())
    torch.testing.assert_close(posattn.attention(q, q, q, mix), posattn.attention(q, q, q, same))
    assert encoding.bias(2, 3).shape == (1, 2, 3)


def test_minus_infinity_forbids_keys():
    window = torch.zeros(1, 3)
    window[0, 2] = -math.inf
    q, k, v = qkv()
    got = posattn.attention(q, k, v, Bias(window, 0), causal=True)
    torch.testing.assert_close(got, posattn.attention(q, k, v, causal=True, window=(1, 0)))


# relative


def gaussian(d, width):
    return -((d / width[:, None]) ** 2)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 8), nn.GELU(), nn.Linear(8, HEADS))

    def forward(self, d):
        return self.layers(d.asinh()[:, None]).T


def test_a_function_of_the_distance():
    width = torch.tensor([1.0, 2.0, 3.0, 4.0])
    encoding = posattn.relative(gaussian, HEADS, width=width)
    bias = encoding.bias(3, 5)
    for i in range(3):
        for j in range(5):
            torch.testing.assert_close(bias[:, i, j].detach(), -(((i + 2 - j) / width) ** 2))
    assert dict(encoding.named_parameters()).keys() == {"fn.width"}
    with torch.no_grad():
        encoding.fn.width.fill_(7.0)
    assert width.tolist() == [1.0, 2.0, 3.0, 4.0]
    encoding.fn.reset_parameters()
    assert torch.equal(encoding.fn.width, width)


def test_modules_are_submodules():
    network = Network()
    itself = posattn.relative(network, HEADS)
    assert itself.fn is network
    named = posattn.relative(lambda d, net: net(d), HEADS, net=network)
    assert named.fn.net is network
    q, k, v = qkv()
    out = posattn.attention(q, k, v, itself, causal=True)
    assert torch.equal(posattn.attention(q, k, v, named, causal=True), out)
    out.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    assert network.layers[0].weight.grad.abs().sum() > 0


def test_a_given_parameter_is_shared():
    width = nn.Parameter(torch.ones(HEADS))
    encoding = posattn.relative(gaussian, HEADS, width=width)
    assert encoding.fn.width is width
    frozen = nn.Parameter(torch.ones(HEADS), requires_grad=False)
    posattn.attention(*qkv(), posattn.relative(gaussian, HEADS, width=frozen))


def test_a_copy_owns_its_parameters():
    encoding = posattn.relative(gaussian, HEADS, width=torch.ones(HEADS))
    other = copy.deepcopy(encoding)
    with torch.no_grad():
        other.fn.width.fill_(5.0)
    assert not torch.equal(other.bias(3, 3), encoding.bias(3, 3))
    loaded = pickle.loads(pickle.dumps(other))
    assert torch.equal(loaded.bias(3, 3), other.bias(3, 3))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "make", [lambda: Relative(gaussian, HEADS, width=torch.rand(HEADS) + 1), lambda: Relative(Network(), HEADS)]
)
def test_narrow_parameters_are_widened_for_the_call(make, narrow):
    encoding = make().to(narrow)
    wide = copy.deepcopy(encoding).float()
    values = encoding.lower(context(dtype=narrow)).bias.table.values
    assert values.dtype == torch.float32
    assert torch.equal(values, wide.lower(context()).bias.table.values)
    values.square().sum().backward()
    for name, parameter in encoding.named_parameters():
        assert parameter.dtype == narrow
        assert parameter.grad.dtype == narrow
        assert parameter.grad.abs().sum() > 0, name


def test_distances_are_float64_where_anything_is():
    seen = []

    def record(d, width):
        seen.append(d.dtype)
        return gaussian(d, width)

    encoding = posattn.relative(record, HEADS, width=torch.ones(HEADS))
    encoding.lower(context())
    encoding.lower(context(dtype=torch.float64))
    encoding.double().lower(context())
    encoding.bfloat16().lower(context())
    assert seen == [torch.float32, torch.float64, torch.float64, torch.float32]


def test_one_row_for_all_heads_and_results_without_anything_learned():
    q, k, v = qkv()
    encoding = posattn.relative(lambda d: -0.5 * d.abs()[None], HEADS)
    assert not list(encoding.parameters())
    slopes = posattn.ALiBi(HEADS, slopes=[0.5] * HEADS)
    torch.testing.assert_close(posattn.attention(q, k, v, encoding), posattn.attention(q, k, v, slopes))


def test_what_is_computed_outside_passes_its_gradient_on():
    """A tensor of a graph is no parameter that a copy would have to own."""
    base = torch.ones(HEADS, requires_grad=True)
    width = 2.0 * base
    posattn.attention(*qkv(), posattn.relative(lambda d: gaussian(d, width), HEADS)).square().sum().backward()
    assert base.grad.abs().sum() > 0


def test_compiles_whole():
    torch._dynamo.reset()
    encoding, q = posattn.relative(gaussian, HEADS, width=torch.ones(HEADS)), torch.randn(1, HEADS, TOKENS, DIM)

    def run(q):
        return posattn.attention(q, q, q, encoding, causal=True)

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(q), run(q))


def test_ensembles_by_functional_transforms():
    encoding = posattn.relative(gaussian, HEADS, width=torch.ones(HEADS))
    stacked = {"fn.width": torch.stack([torch.ones(HEADS), 3 * torch.ones(HEADS)])}

    def values(parameters):
        plan = torch.func.functional_call(encoding, parameters, (context(),))
        return plan.bias.table.values

    both = torch.func.vmap(values)(stacked)
    torch.testing.assert_close(both[1], values({"fn.width": 3 * torch.ones(HEADS)}))


# What is refused.

OUTER = nn.Parameter(torch.ones(HEADS))
LAYER = nn.Linear(1, HEADS)


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.width = nn.Parameter(torch.ones(HEADS))

    def bias_of(self, d):
        return gaussian(d, self.width)

    def closure(self):
        return lambda d: gaussian(d, self.width)


def closing_over(width):
    return lambda d: gaussian(d, width)


def nested():
    return lambda d: torch.stack([d / w for w in (lambda: OUTER)()])


@pytest.mark.parametrize(
    ("fn", "where"),
    [
        (closing_over(OUTER), "`width` of type Parameter"),
        (closing_over(torch.ones(HEADS, requires_grad=True)), "`width` of type Tensor"),
        (lambda d: gaussian(d, OUTER), "`OUTER` of type Parameter"),
        (nested(), "`OUTER` of type Parameter"),
        (lambda d: LAYER(d[:, None]).T, "`LAYER` of type Linear"),
        (lambda d, width=OUTER: gaussian(d, width), "`width` of type Parameter"),
        (functools.partial(gaussian, width=OUTER), "a partial's `width` of type Parameter"),
        (functools.partial(gaussian, torch.arange(3.0), OUTER), "a partial's argument 1 of type Parameter"),
        (functools.partial(closing_over(OUTER)), "`width` of type Parameter"),
        (Owner().bias_of, "`self` of type Owner"),
        (Owner().closure(), "`self` of type Owner"),
    ],
)
def test_a_function_that_learns_by_itself(fn, where):
    with pytest.raises(TypeError, match=rf"fn: expected to learn nothing but what it is given by name, got .*{where}"):
        posattn.relative(fn, HEADS)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Bias([[1.0]], 0), TypeError, "values: expected a torch.Tensor, got list"),
        (lambda: Bias(torch.ones(2, 3).int(), 0), TypeError, "values: expected a floating dtype, got torch.int32"),
        (
            lambda: Bias(torch.ones(3), 0),
            ValueError,
            r"values: expected \[heads, distances\], got \[3\]; values\[None\]",
        ),
        (lambda: Bias(torch.ones(2, 0), 0), ValueError, r"values: expected \[heads, distances\], got \[2, 0\]"),
        (lambda: Bias(torch.ones(2, 3), 0.0), TypeError, "first: expected an int, got float"),
        (lambda: Bias(torch.ones(2, 3), True), TypeError, "first: expected an int, got bool"),
        (lambda: Bias(OUTER[None], 0, learnable=True), ValueError, "learnable: expected False for values that require"),
        (
            lambda: Bias(torch.ones(2, 3, device="meta"), 0).reset_parameters(),
            ValueError,
            "values: expected numbers to",
        ),
        (lambda: posattn.relative(Network, HEADS), TypeError, "got the class Network; make an instance"),
        (lambda: posattn.relative(3.0, HEADS), TypeError, "fn: expected a function of the distances .*, got float"),
        (lambda: posattn.relative(gaussian, 0, width=OUTER), ValueError, "num_heads: expected a positive int, got 0"),
        (
            lambda: posattn.relative(gaussian, HEADS, width=2.0),
            TypeError,
            "width: expected a tensor or an nn.Module, got",
        ),
        (lambda: posattn.relative(gaussian, HEADS, width=torch.ones(3).int()), TypeError, "width: expected a floating"),
        (lambda: posattn.relative(gaussian, HEADS, width=2 * OUTER), TypeError, "width: expected an nn.Parameter, or"),
        (
            lambda: posattn.relative(gaussian, HEADS, forward=OUTER),
            ValueError,
            "forward: expected a name that nn.Module",
        ),
        (lambda: posattn.relative(gaussian, HEADS, function=OUTER), ValueError, "function: expected a name that"),
    ],
)
def test_bad_arguments(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize(
    ("fn", "kind", "message"),
    [
        (lambda d: d, ValueError, r"got \[19\]; a parameter of the heads is \[:, None\]"),
        (lambda d: d[:, None].expand(-1, HEADS), ValueError, r"got \[19, 4\]; transpose it"),
        (
            lambda d: d.expand(3, -1),
            ValueError,
            r"fn: expected \[4, 19\] \(heads, distances\) or \[1, 19\] .* got \[3, 19\]",
        ),
        (lambda d: d[None].long(), TypeError, "fn: expected .* of a floating dtype, got torch.int64"),
        (lambda d: 0.0, TypeError, "fn: expected .*, got float"),
        (
            lambda d: d.log()[None],
            ValueError,
            "Relative: expected a plan of finite values, got NaN in bias.table.values",
        ),
    ],
)
def test_bad_results(fn, kind, message):
    with pytest.raises(kind, match=message):
        posattn.attention(*qkv(), posattn.relative(fn, HEADS), causal=True)
