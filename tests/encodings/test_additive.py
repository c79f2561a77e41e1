"""Additive encodings against their formulas, written out again one number at a time."""

from __future__ import annotations

import math

import pytest
import torch

import posattn
from posattn.encodings import ALiBi, Kerple, RelativeTable, RelativeTable2D, Sandwich, T5Bias

WIDE = torch.float64
SHAPES = [(5, 5), (1, 1), (3, 8), (8, 3), (1, 6)]


def written_out(heads, q_len, k_len, value):
    """[H, q_len, k_len] of value(h, d), with query i at position i + k_len - q_len."""
    offset = k_len - q_len
    rows = [[[value(h, i + offset - j) for j in range(k_len)] for i in range(q_len)] for h in range(heads)]
    return torch.tensor(rows, dtype=WIDE)


def test_alibi_slopes_of_eight_heads():
    assert ALiBi(8).slopes.tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]


def test_alibi_slopes_of_twelve_heads_are_those_of_eight_and_every_second_one_of_sixteen():
    sixteen = [2 ** (-(h + 1) / 2) for h in range(16)]
    expected = [2.0 ** -(h + 1) for h in range(8)] + [sixteen[h] for h in (0, 2, 4, 6)]
    assert ALiBi(12).slopes.tolist() == pytest.approx(expected)


def test_alibi_slopes_of_a_few_heads():
    assert ALiBi(1).slopes.tolist() == [2.0**-8]
    assert ALiBi(3).slopes.tolist() == [2.0**-4, 2.0**-8, 2.0**-2]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("signed", [False, True])
def test_alibi(shape, signed):
    slopes = [0.5, 0.0, -2.0]
    encoding = ALiBi(3, signed=signed, slopes=slopes)
    expected = written_out(3, *shape, lambda h, d: -slopes[h] * (d if signed else abs(d)))
    torch.testing.assert_close(encoding.bias(*shape).double(), expected)


def test_alibi_learns_only_if_asked():
    assert not list(ALiBi(4).parameters())
    learnable = ALiBi(4, learnable=True)
    learnable.bias(2, 3).sum().backward()
    # Distances of two queries to three keys: 1, 0, 1 and 2, 1, 0.
    torch.testing.assert_close(learnable.slopes.grad, torch.full((4,), -5.0))


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize(
    "given", [lambda x: x, lambda x: x.tolist(), lambda x: x.numpy()], ids=["tensor", "list", "array"]
)
def test_slopes_of_each_sequence(learnable, given):
    """What flash-attn calls alibi_slopes [B, H]."""
    slopes = torch.rand(2, 3)
    q, k, v = (torch.randn(2, 3, 7, 8) for _ in range(3))
    encoding = ALiBi(3, learnable, slopes=given(slopes))
    out = posattn.attention(q, k, v, encoding, causal=True)
    for b in range(2):
        alone = posattn.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], ALiBi(3, slopes=slopes[b]), causal=True)
        torch.testing.assert_close(out[b : b + 1], alone)
    if learnable:
        out.square().sum().backward()
        assert encoding.slopes.grad.shape == (2, 3)
        assert (encoding.slopes.grad != 0).all()
    else:
        assert not encoding.state_dict()
        assert torch.equal(encoding.bfloat16().slopes, slopes)
    torch.testing.assert_close(encoding.float().shard(1, 2).bias(3, 3), encoding.bias(3, 3)[:, 1:])


@pytest.mark.parametrize("shape", SHAPES)
def test_kerple_log(shape):
    encoding = Kerple(3).double()
    p, a = encoding.p.tolist(), encoding.a.tolist()
    expected = written_out(3, *shape, lambda h, d: -max(p[h], 0.01) * math.log(1 + max(a[h], 0.01) * abs(d)))
    torch.testing.assert_close(encoding.bias(*shape), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_kerple_power(shape):
    encoding = Kerple(3, form="power").double()
    with torch.no_grad():
        encoding.p[2] = 2.5
    p, a = encoding.p.tolist(), encoding.a.tolist()
    expected = written_out(3, *shape, lambda h, d: -max(a[h], 0.01) * abs(d) ** min(max(p[h], 0.01), 2.0))
    torch.testing.assert_close(encoding.bias(*shape), expected)


@pytest.mark.parametrize("form", ["log", "power"])
def test_kerple_parameters_beyond_their_bounds_can_come_back(form):
    encoding = Kerple(2, form).double()
    with torch.no_grad():
        encoding.p.fill_(-1.0)
        encoding.a.fill_(-1.0)
    at_bound = Kerple(2, form).double()
    with torch.no_grad():
        at_bound.p.fill_(0.01)
        at_bound.a.fill_(0.01)
    encoding.bias(4, 4).sum().backward()
    at_bound.bias(4, 4).sum().backward()
    torch.testing.assert_close(encoding.bias(4, 4), at_bound.bias(4, 4))
    torch.testing.assert_close(encoding.p.grad, at_bound.p.grad)
    torch.testing.assert_close(encoding.a.grad, at_bound.a.grad)
    assert (encoding.a.grad != 0).all()


def test_kerple_starts_in_the_papers_ranges():
    torch.manual_seed(0)
    encoding = Kerple(1000)
    assert 0 <= encoding.p.min() < 0.1 < 1.9 < encoding.p.max() < 2
    assert 0 <= encoding.a.min() < 0.1 < 0.9 < encoding.a.max() < 1


def t5_bucket(distance, buckets, max_distance, bidirectional):
    """Exact integers: a far distance r is past the k-th border if (r / e)^(n - e) >= (max / e)^k."""
    offset = 0
    if bidirectional:
        buckets //= 2
        offset = buckets if distance < 0 else 0
        distance = abs(distance)
    distance = max(distance, 0)
    exact = buckets // 2
    if distance < exact:
        return offset + distance
    far = buckets - exact
    steps = sum(distance**far * exact**k >= max_distance**k * exact**far for k in range(1, far))
    return offset + exact + steps


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (4, 3), (64, 1000)])
def test_t5_buckets(buckets, max_distance, bidirectional):
    encoding = T5Bias(1, buckets, max_distance, bidirectional)
    distances = range(-2 * max_distance, 2 * max_distance)
    expected = [t5_bucket(d, buckets, max_distance, bidirectional) for d in distances]
    assert encoding.buckets(torch.tensor(distances)).tolist() == expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_t5(shape, bidirectional):
    encoding = T5Bias(3, num_buckets=8, max_distance=5, bidirectional=bidirectional).double()
    weight = encoding.weight.detach()
    expected = written_out(3, *shape, lambda h, d: float(weight[t5_bucket(d, 8, 5, bidirectional), h]))
    torch.testing.assert_close(encoding.bias(*shape), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["centered", "raw"])
def test_sandwich(shape, form):
    heads, dim = 3, 10

    def value(h, d):
        pairs = range(1, dim // 2 + 1) if form == "centered" else range(dim // 2)
        total = sum(math.cos(d / 10000 ** (2 * c / dim)) for c in pairs)
        return (total - (dim // 2 if form == "centered" else 0)) / (8 * (h + 1) / heads)

    torch.testing.assert_close(Sandwich(heads, dim, form).bias(*shape).double(), written_out(heads, *shape, value))


def test_sandwich_is_precise_far_away():
    bias = Sandwich(1).bias(1, 100_001)[0, 0, 0]
    expected = (sum(math.cos(100_000 / 10000 ** (c / 64)) for c in range(1, 65)) - 64) / 8
    assert float(bias) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_relative_table(shape, symmetric):
    encoding = RelativeTable(2, 3, symmetric).double()
    weight = encoding.weight.detach()
    assert weight.shape == (2, 4 if symmetric else 7)

    def value(h, d):
        return float(weight[h, min(abs(d), 3) if symmetric else min(max(d, -3), 3) + 3])

    torch.testing.assert_close(encoding.bias(*shape), written_out(2, *shape, value))


def test_relative_table_2d():
    encoding = RelativeTable2D(2, (3, 4)).double()
    offsets = {(dy, dx): n for n, (dy, dx) in enumerate((y, x) for y in range(-2, 3) for x in range(-3, 4))}
    expected = torch.zeros(2, 12, 12, dtype=WIDE)
    for i in range(12):
        for j in range(12):
            expected[:, i, j] = encoding.weight.detach()[offsets[i // 4 - j // 4, i % 4 - j % 4]]
    torch.testing.assert_close(encoding.bias(12, 12), expected)
    torch.testing.assert_close(encoding.bias(5, 12), expected[:, 7:])
    cells = torch.tensor([11, 0, 5])
    places = encoding.bias(3, 12, q_positions=cells, k_positions=torch.arange(12))
    torch.testing.assert_close(places, expected[:, cells])


@pytest.mark.parametrize("shape", [(1, 3, 12, 12), (2, 1, 1, 12), (12, 12)])
def test_relative_table_2d_beside_a_dense_bias(place, shape):
    device, backend = place
    encoding = RelativeTable2D(3, (3, 4)).to(device)
    q, k, v = torch.randn(3, 2, 3, 12, 8, device=device)
    bias = torch.randn(shape, device=device, requires_grad=True)
    logits = q @ k.mT * 8**-0.5 + bias
    expected = (logits + encoding.bias(12, 12)).softmax(-1) @ v
    got = posattn.attention(q, k, v, encoding, bias=bias, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    weight, leaves = torch.randn_like(got), (bias, encoding.weight)
    for x, y in zip(*(torch.autograd.grad((o * weight).sum(), leaves) for o in (got, expected)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_relative_table_2d_goes_by_offset_and_segment():
    encoding = RelativeTable2D(2, (3, 4))
    q, k, v = torch.randn(3, 1, 2, 12, 8)
    whole = posattn.attention(q, k, v, encoding, causal=True)
    chunk = posattn.attention(q[:, :, 4:8], k, v, encoding, causal=True, offset=4)
    torch.testing.assert_close(chunk, whole[:, :, 4:8])
    twice = [torch.cat([x, x], 2) for x in (q, k, v)]
    segments = torch.arange(24) // 12
    packed = posattn.attention(*twice, encoding, causal=True, segments=segments)
    torch.testing.assert_close(packed, torch.cat([whole, whole], 2))
    with pytest.raises(ValueError, match=r"expects positions in \[0, 12\), got 0 \.\. 12"):
        posattn.attention(q[:, :, :4], k, v, encoding, offset=9)


@pytest.mark.parametrize(
    ("q_len", "k_len", "positions"), [(12, 13, None), (3, 2, None), (1, 2, (12, 0)), (1, 2, (3, -1))]
)
def test_relative_table_2d_knows_its_window(q_len, k_len, positions):
    given = {}
    if positions is not None:
        given = {"q_positions": torch.tensor([positions[0]]), "k_positions": torch.tensor([positions[1], 0])}
    with pytest.raises(ValueError, match=r"expects positions in \[0, 12\)"):
        RelativeTable2D(2, (3, 4)).bias(q_len, k_len, **given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ALiBi(0), "num_heads: expected a positive int, got 0"),
        (lambda: ALiBi(2, slopes=[1.0]), "slopes: expected 2 numbers, one per head, got 1"),
        (lambda: ALiBi(1, slopes=[float("nan")]), r"slopes\[0\]: expected a finite number"),
        (lambda: ALiBi(2, slopes=[1.0, 1e39]), r"slopes\[1\]: expected a finite number within float32's range"),
        (lambda: Kerple(2, form="linear"), "form: expected one of 'log', 'power', got 'linear'"),
        (lambda: T5Bias(2, num_buckets=1), "num_buckets: expected a number of at least 2, got 1"),
        (lambda: T5Bias(2, num_buckets=7, bidirectional=True), "num_buckets: expected an even number of at least 4"),
        (lambda: T5Bias(2, max_distance=16), "max_distance: expected more than the 16"),
        (lambda: Sandwich(2, dim=7), "dim: expected an even number, got 7"),
        (lambda: Sandwich(2, form="flat"), "form: expected one of"),
        (lambda: RelativeTable(2, -1), "max_distance: expected a positive int, got -1"),
        (lambda: RelativeTable2D(2, (3,)), r"window: expected \(height, width\)"),
        (lambda: RelativeTable2D(2, (3, 0)), r"window\[1\]: expected a positive int, got 0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_head_count_that_is_no_int():
    with pytest.raises(TypeError, match="num_heads: expected an int, got float"):
        ALiBi(4.0)
