"""Tables over the numbers of cells: 2-D, 3-D and with a class token, against the formula, and in sums."""

from __future__ import annotations

import itertools

import pytest
import torch

import posattn
from posattn.encodings import DAPE, ALiBi, Kerple, RelativeTable2D, RelativeTable3D, RoPE
from posattn.plan import Mask
from tests.tolerance import assert_parity

WIDE = torch.float64
HEADS, DIM = 3, 8


def written_out(weight, window, class_token=False):
    """[H, T, T] by one look per pair, rows of the weight in the order of the offsets."""
    cells = list(itertools.product(*(range(n) for n in window)))
    rows = {d: n for n, d in enumerate(itertools.product(*(range(1 - n, n) for n in window)))}
    tokens = [None, *cells] if class_token else cells
    bias = torch.empty(weight.shape[1], len(tokens), len(tokens), dtype=weight.dtype)
    for (i, a), (j, b) in itertools.product(enumerate(tokens), enumerate(tokens)):
        if a is None or b is None:
            row = len(rows) + (2 if a is b else 0 if a is None else 1)
        else:
            row = rows[tuple(x - y for x, y in zip(a, b, strict=True))]
        bias[:, i, j] = weight[row]
    return bias


CASES = {
    "2-D": (RelativeTable2D, (4, 5), False),
    "2-D class token": (RelativeTable2D, (4, 5), True),
    "3-D": (RelativeTable3D, (2, 3, 4), False),
    "3-D class token": (RelativeTable3D, (2, 3, 4), True),
    "one cell and a class token": (RelativeTable2D, (1, 1), True),
    "a row": (RelativeTable2D, (1, 7), False),
}
cases = pytest.mark.parametrize(("kind", "window", "class_token"), CASES.values(), ids=CASES.keys())


@cases
def test_the_formula(kind, window, class_token):
    encoding = kind(HEADS, window, class_token).double()
    expected = written_out(encoding.weight, window, class_token)
    tokens = expected.shape[1]
    assert encoding.tokens == tokens
    got = encoding.bias(tokens, tokens)
    assert torch.equal(got, expected)
    weight = torch.randn_like(expected)
    gradients = (torch.autograd.grad((bias * weight).sum(), encoding.weight)[0] for bias in (got, expected))
    torch.testing.assert_close(*gradients)
    places = torch.randperm(tokens)
    assert torch.equal(
        encoding.bias(tokens, tokens, q_positions=places, k_positions=places), expected[:, places][:, :, places]
    )


@cases
def test_attention_is_the_formula(place, kind, window, class_token):
    device, backend = place
    encoding = kind(HEADS, window, class_token).to(device)
    torch.nn.init.normal_(encoding.weight)
    tokens = encoding.tokens
    q, k, v = torch.randn(3, 2, HEADS, tokens, DIM, device=device)
    assert_parity(q, k, v, encoding, {"causal": True}, backend)
    with torch.no_grad():
        logits = q.double() @ k.double().mT * DIM**-0.5 + written_out(encoding.weight.double(), window, class_token)
        expected = (logits.softmax(-1) @ v.double()).float()
        torch.testing.assert_close(
            posattn.attention(q, k, v, encoding, backend=backend), expected, rtol=1e-4, atol=1e-5
        )


def test_a_table_of_a_whole_image_is_no_matrix():
    """64 x 64 cells: one [H, T, T] float32 would be 201 MB; the plan's numbers are under a megabyte."""
    encoding = RelativeTable2D(HEADS, (64, 64))
    q = torch.zeros(1, HEADS, 4096, DIM)
    plan = encoding.lower(posattn.encodings.Context.of(q, q, Mask()))
    assert plan.bias.dense is None
    held = sum(x.numel() * x.element_size() for x in (plan.bias.table.values, plan.places.q, plan.places.k))
    assert held < 2**20


SUMS = {
    "with a table": lambda two: two + Kerple(HEADS),
    "with a slope": lambda two: ALiBi(HEADS, learnable=True) + two,
    "with a profile": lambda two: two + posattn.FIRE(HEADS, initial_length=8.0),
    "with another": lambda two: two + RelativeTable2D(HEADS, (5, 4)),
    "with a rotation": lambda two: two + RoPE(DIM),
    "with a dense bias and a table": lambda two: two + Kerple(HEADS) + posattn.RelativeTable(HEADS, 4),
    "under DAPE": lambda two: DAPE(two, HEADS, width=4),
    "beside DAPE": lambda two: DAPE(Kerple(HEADS), HEADS, width=4) + two,
    "beside its own DAPE": lambda two: DAPE(two, HEADS, width=4) + Kerple(HEADS),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_are_sums(name):
    two = RelativeTable2D(HEADS, (4, 5))
    torch.nn.init.normal_(two.weight)
    position = SUMS[name](two)
    q, k, v = torch.randn(3, 2, HEADS, 20, DIM)
    assert_parity(q, k, v, position, {"causal": True}, "cpu")
    bias = written_out(two.weight.double(), (4, 5))[None]
    wide = position.double()
    got = posattn.attention(q.double(), k.double(), v.double(), wide)
    if "DAPE" in name:
        mixing = next(m for m in position.modules() if isinstance(m, DAPE))
        x = q.double() @ k.double().mT * DIM**-0.5
        kerple = next((m for m in position.modules() if isinstance(m, Kerple)), None)
        other = 0.0 if kerple is None else kerple.bias(20, 20)[None]
        b = bias if mixing.inner is two else other
        z = torch.cat([x, b.expand_as(x)], 1).movedim(1, -1)
        logits = x + bias + other + mixing.mlp(z).movedim(-1, 1)
        torch.testing.assert_close(got, logits.softmax(-1) @ v.double())
        return
    rest = [part for part in position.parts if part is not two]
    dense = sum((part.bias(20, 20)[None] for part in rest if part.has_bias), start=bias)
    rotation = next((part for part in rest if not part.has_bias), None)
    expected = posattn.attention(q.double(), k.double(), v.double(), rotation, bias=dense)
    torch.testing.assert_close(got, expected)


def test_shards_and_weights():
    encoding = RelativeTable2D(HEADS, (4, 5), class_token=True)
    torch.nn.init.normal_(encoding.weight)
    q, k, v = torch.randn(3, 1, HEADS, 21, DIM)
    whole = posattn.attention(q, k, v, encoding)
    part = posattn.attention(q[:, 1:], k[:, 1:], v[:, 1:], encoding.shard(1, 2))
    torch.testing.assert_close(part, whole[:, 1:])
    torch.testing.assert_close(posattn.weights(q, k, encoding) @ v, whole, rtol=1e-4, atol=1e-5)


def test_state_is_swins_and_beits():
    assert RelativeTable2D(2, (7, 7)).weight.shape == (169, 2)
    assert RelativeTable2D(2, (14, 14), class_token=True).weight.shape == (27 * 27 + 3, 2)
    assert RelativeTable3D(2, (8, 7, 7)).weight.shape == (15 * 169, 2)
    assert list(RelativeTable2D(2, (7, 7)).state_dict()) == ["weight"]


def test_bad_values():
    with pytest.raises(ValueError, match=r"window: expected \(depth, height, width\), got \(2, 3\)"):
        RelativeTable3D(2, (2, 3))
    q = torch.zeros(1, 2, 26, DIM)
    with pytest.raises(ValueError, match=r"RelativeTable3D with a window of 2 x 3 x 4 expects positions in \[0, 25\)"):
        posattn.attention(q, q, q, RelativeTable3D(2, (2, 3, 4), class_token=True))
