"""Sizes that numbers seldom have: rows whose log-sum-exp is in the hundreds (their weights are summed again in the
backward pass), scales below zero in narrow types, sinks of -inf, and a gradient that many heads add to."""

from __future__ import annotations

import pytest
import torch

import posattn
from posattn.encodings.base import Context, Encoding
from posattn.plan import Bias, Plan, Profile, Slope, Table
from tests.tolerance import assert_parity

HEADS, KV_HEADS, DIM, QUERIES, KEYS = 4, 2, 16, 29, 150

pytestmark = pytest.mark.usefixtures("poisoned")

ENCODINGS = {
    "none": lambda: None,
    "RoPE": lambda: posattn.RoPE(DIM),
    "Kerple": lambda: posattn.Kerple(HEADS),
    "FIRE": lambda: posattn.FIRE(HEADS, initial_length=40.0),
    "DAPE": lambda: posattn.DAPE(None, HEADS),
    "DAPE-Kerple": lambda: posattn.DAPE(posattn.Kerple(HEADS), HEADS),
}
every_encoding = pytest.mark.parametrize("name", ENCODINGS)


def call(place, name, options, dtype=torch.float32, batch=2, q_len=QUERIES, k_len=KEYS):
    torch.manual_seed(6)
    position = ENCODINGS[name]()
    given = {n: x.to(place[0]) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    shapes = ((batch, HEADS, q_len, DIM), (batch, KV_HEADS, k_len, DIM), (batch, KV_HEADS, k_len, DIM))
    q, k, v = (torch.randn(shape).to(place[0], dtype) for shape in shapes)
    assert_parity(q, k, v, None if position is None else position.to(place[0]), given, place[1])


def lifted(batch=2, q_len=QUERIES, k_len=KEYS):
    """A bias that puts every third row's logits, and so its log-sum-exp, near 700, of others near -700."""
    rows = torch.tensor([700.0, 0.0, -700.0]).repeat(q_len)[:q_len]
    return rows[:, None] + torch.randn(batch, HEADS, q_len, k_len)


LARGE = {
    "plain": dict,
    "causal": lambda: {"causal": True},
    "sinks": lambda: {"sinks": torch.tensor([699.0, 701.0, -700.0, 3.0])},
    "softcap": lambda: {"softcap": 3.0},
    "dropout": lambda: {"dropout_p": 0.3},
    "window": lambda: {"window": (100, 3)},
    "mask": lambda: {"mask": torch.rand(2, HEADS, QUERIES, KEYS) < 0.6},
    "lengths": lambda: {"k_lengths": torch.tensor([KEYS, 70])},
}


@every_encoding
@pytest.mark.parametrize("options", LARGE.values(), ids=LARGE)
def test_rows_of_a_large_log_sum_exp(place, name, options):
    call(place, name, {"bias": lifted(), **options()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["none", "Kerple"])
def test_narrow_rows_of_a_large_log_sum_exp(place, name, dtype):
    call(place, name, {"bias": lifted(), "scale": 0.7}, dtype)


@pytest.mark.parametrize("name", ["none", "Kerple", "DAPE-Kerple"])
def test_documents_of_a_large_log_sum_exp(place, name):
    bounds = {"cu_seqlens_q": [0, 9, 20, 29], "cu_seqlens_k": [0, 60, 61, 150]}
    given = {n: torch.tensor(b, dtype=torch.int32) for n, b in bounds.items()}
    call(place, name, {"bias": lifted(1), "sinks": torch.tensor([699.0, 701.0, -700.0, 3.0]), **given}, batch=1)


@every_encoding
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [-0.4, -2.0, 0.0])
@pytest.mark.parametrize("mask", ["causal", "window", "boolean"])
def test_a_scale_below_zero(place, name, dtype, scale, mask):
    options = {
        "causal": {"causal": True},
        "window": {"window": (40, 2)},
        "boolean": {"mask": torch.rand(2, HEADS, QUERIES, KEYS) < 0.6},
    }[mask]
    call(place, name, {"scale": scale, **options}, dtype)


@pytest.mark.parametrize("name", ["none", "Kerple", "DAPE-Kerple"])
@pytest.mark.parametrize("keys", [KEYS, 1200])
def test_sinks_of_minus_infinity_over_rows_that_see_no_key(place, name, keys):
    mask = torch.rand(2, HEADS, 9, keys) < 0.5
    mask[:, :, 4] = False
    sinks = torch.tensor([-torch.inf, -torch.inf, 0.5, -torch.inf])
    call(place, name, {"mask": mask, "sinks": sinks}, q_len=9, k_len=keys)


@pytest.mark.parametrize("shape", [(1, 1, 200, 420), (2, 1, 200, 420), (1, 4, 200, 420)], ids=str)
def test_a_dense_gradient_that_several_threads_add_to(place, shape):
    torch.manual_seed(7)
    q, k, v, weight = (torch.randn(2, 4, n, 8, device=place[0]) for n in (200, 420, 420, 200))
    bias = torch.randn(shape, device=place[0], requires_grad=True)
    whole = bias.detach().expand(2, 4, -1, -1).contiguous().requires_grad_()

    def gradient(of):
        out = posattn.attention(q, k, v, bias=of, backend=place[1])
        return torch.autograd.grad(out, of, weight)[0]

    expected = gradient(whole).double().sum_to_size(shape)
    for threads in (1, 2, 4, 4, 4, 4):
        torch.set_num_threads(threads)
        torch.testing.assert_close(gradient(bias).double(), expected, rtol=1e-4, atol=1e-6)


class Given(Encoding):
    """A plan as it is given, with its tensors as parameters."""

    def __init__(self, make, **tensors):
        super().__init__()
        self.num_heads, self.make = HEADS, make
        for name, tensor in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(tensor))

    def build(self, context: Context) -> Plan:
        wide = {name: tensor.to(context.table_dtype(tensor)) for name, tensor in self.named_parameters()}
        return Plan(bias=Bias(**self.make(**wide)))


def short_table():
    return Given(lambda values: {"table": Table(values, -2)}, values=torch.randn(HEADS, 7))


def short_profile():
    """Lines that meet at the knots, as a profile's have to."""
    knots = torch.tensor([-0.5, 0.1, 0.7])

    def make(psi, rows, slope, start):
        steps = (slope[:, :-1] - slope[:, 1:]) * knots.to(psi)
        intercept = torch.cat([start, steps], 1).cumsum(1)
        return {"profile": Profile(psi, -2, rows, 3, knots.to(psi), slope, intercept)}

    tensors = {"slope": torch.randn(HEADS, 4), "start": torch.randn(HEADS, 1)}
    return Given(make, psi=torch.randn(9), rows=torch.rand(5) + 0.5, **tensors)


PLACES = {
    "implicit": dict,
    "causal": lambda: {"causal": True},
    "explicit": lambda: {"q_positions": torch.arange(QUERIES) - 9, "k_positions": torch.arange(KEYS) // 3 - 5},
    "documents": lambda: {
        "cu_seqlens_q": torch.tensor([0, 9, 29], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 100, 150], dtype=torch.int32),
    },
}


@pytest.mark.parametrize("make", [short_table, short_profile])
@pytest.mark.parametrize("options", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "DAPE"])
def test_operands_shorter_than_the_distances(place, make, options, mixed):
    """Beyond its ends an operand goes on as it ends."""
    torch.manual_seed(9)
    position = posattn.DAPE(make(), HEADS) if mixed else make()
    given = {n: x.to(place[0]) if isinstance(x, torch.Tensor) else x for n, x in options().items()}
    q, k, v = (torch.randn(1, HEADS, n, DIM).to(place[0]) for n in (QUERIES, KEYS, KEYS))
    assert_parity(q, k, v, position.to(place[0]), given, place[1])


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
def test_slopes_of_each_sequence(place, signed, explicit):
    torch.manual_seed(9)
    position = Given(lambda slopes: {"slope": Slope(slopes, signed)}, slopes=torch.rand(2, HEADS)).to(place[0])
    options = {n: x.to(place[0]) for n, x in (PLACES["explicit"]() if explicit else {}).items()}
    q, k, v = (torch.randn(2, HEADS, n, DIM).to(place[0]) for n in (QUERIES, KEYS, KEYS))
    assert_parity(q, k, v, position, options, place[1])
