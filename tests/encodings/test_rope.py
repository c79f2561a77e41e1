"""Rotary encodings: their angles, what makes them relative, and the scaling rules against scalar formulas."""

from __future__ import annotations

import cmath
import math

import pytest
import torch

from posattn.encodings import (
    AxialRoPE,
    Context,
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    MRoPE,
    RoPE,
    Scaling,
    YaRN,
)

WIDE = torch.float64
CPU = torch.device("cpu")


def context(q_len, k_len, head_dim, dtype=WIDE, **options):
    return Context(q_len, k_len, 2, head_dim, CPU, dtype, **options)


def turned(x, positions, theta, interleaved):
    """x [T, D] with each pair, as a complex number, times e^(i position theta)."""
    out = x.clone()
    pairs = len(theta)
    for t, position in enumerate(positions):
        for c, angle in enumerate(theta):
            s, e = (2 * c, 2 * c + 1) if interleaved else (c, c + pairs)
            z = complex(x[t, s], x[t, e]) * cmath.exp(1j * position * angle)
            out[t, s], out[t, e] = z.real, z.imag
    return out


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "base"), [(8, None, 10000.0), (8, 4, 500.0), (7, 6, 1e6), (2, 2, 10)]
)
def test_rotate(layout, head_dim, rotary_dim, base):
    torch.manual_seed(0)
    rope = RoPE(head_dim, base, layout, rotary_dim)
    x = torch.randn(1, 1, 6, head_dim, dtype=WIDE)
    turning = rotary_dim or head_dim
    theta = [base ** (-2 * c / turning) for c in range(turning // 2)]
    torch.testing.assert_close(rope.rotate(x)[0, 0], turned(x[0, 0], range(6), theta, layout == "interleaved"))
    positions = torch.tensor([[5, 0, -3, 100, 2, 2]])
    expected = turned(x[0, 0], positions[0].tolist(), theta, layout == "interleaved")
    torch.testing.assert_close(rope.rotate(x, positions)[0, 0], expected)


@pytest.mark.parametrize("rope", [RoPE(8), RoPE(8, layout="interleaved", rotary_dim=6), RoPE(8, scaling=YaRN(4.0, 16))])
def test_products_depend_on_the_distance_alone(rope):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=WIDE).expand(2, 1, 1, 20, 8)
    products = (rope.rotate(q) @ rope.rotate(k).transpose(-1, -2))[0, 0]
    for distance in range(-19, 20):
        diagonal = products.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_queries_sit_at_the_end_of_the_keys():
    plan = RoPE(8).lower(context(3, 10, 8))
    whole = RoPE(8).lower(context(10, 10, 8))
    torch.testing.assert_close(plan.rotary.q_cos, whole.rotary.k_cos[:, 7:])
    torch.testing.assert_close(plan.rotary.k_sin, whole.rotary.k_sin)


def test_queries_follow_each_sequences_length():
    lengths = torch.tensor([4, 10])
    plan = RoPE(8).lower(context(3, 10, 8, k_lengths=lengths, batch=2, q_tokens=3, k_tokens=10))
    whole = RoPE(8).lower(context(10, 10, 8)).rotary
    torch.testing.assert_close(plan.rotary.q_sin[0], whole.k_sin[0, 1:4])
    torch.testing.assert_close(plan.rotary.q_sin[1], whole.k_sin[0, 7:10])
    assert plan.rotary.k_cos.shape == (1, 10, 4)


def test_packed_documents_start_again():
    cu_q, cu_k = torch.tensor([0, 2, 2, 5]), torch.tensor([0, 4, 6, 9])
    documents = context(3, 4, 8, q_tokens=5, k_tokens=9, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    plan = RoPE(8).lower(documents).rotary
    whole = RoPE(8).lower(context(10, 10, 8)).rotary
    torch.testing.assert_close(plan.q_cos, whole.k_cos[:, [2, 3, 0, 1, 2]])
    torch.testing.assert_close(plan.k_cos, whole.k_cos[:, [0, 1, 2, 3, 0, 1, 0, 1, 2]])


def test_far_positions_keep_their_precision():
    positions = torch.tensor([[2**20 + 1]])
    rotary = RoPE(4).lower(context(1, 1, 4, torch.float32, q_positions=positions, k_positions=positions)).rotary
    assert rotary.q_cos.dtype == torch.float32
    expected = [math.cos(2**20 + 1), math.cos((2**20 + 1) / 100)]
    torch.testing.assert_close(rotary.q_cos.flatten(), torch.tensor(expected), rtol=1e-6, atol=1e-7)


# Scaling rules, from the text of encodings.md one pair at a time.


def check_scaling(scaling, rotary_dim, base, length, expected_theta, expected_factor):
    theta, factor = scaling.frequencies(rotary_dim, base, length, CPU)
    assert theta.tolist() == pytest.approx(expected_theta, rel=1e-12)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


def plain_theta(rotary_dim, base):
    return [base ** (-2 * c / rotary_dim) for c in range(rotary_dim // 2)]


def test_linear():
    check_scaling(Linear(4.0), 8, 10000.0, 77, [t / 4 for t in plain_theta(8, 10000.0)], 1.0)


@pytest.mark.parametrize("length", [5, 2048, 2049, 8192])
def test_dynamic_ntk(length):
    long = max(length, 2048)
    base = 10000.0 * ((2.0 * long / 2048) - (2.0 - 1)) ** (64 / 62)
    check_scaling(DynamicNTK(2.0, 2048), 64, 10000.0, length, plain_theta(64, base), 1.0)


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({}, 0.1 * math.log(40.0) + 1),
        ({"mscale": 0.707, "mscale_all_dim": 1.0}, (0.0707 * math.log(40.0) + 1) / (0.1 * math.log(40.0) + 1)),
        ({"mscale": 0.707}, 0.1 * math.log(40.0) + 1),
        ({"attention_factor": 1.25}, 1.25),
        ({"truncate": False}, 0.1 * math.log(40.0) + 1),
        ({"beta_fast": 16.0, "beta_slow": 2.0}, 0.1 * math.log(40.0) + 1),
    ],
)
def test_yarn(options, factor):
    rotary_dim, base, length = 64, 10000.0, 4096
    expected = []
    for c in range(rotary_dim // 2):

        def dim(turns):
            return rotary_dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base))

        low, high = dim(options.get("beta_fast", 32.0)), dim(options.get("beta_slow", 1.0))
        if options.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        ramp = min(max((c - max(low, 0)) / (min(high, rotary_dim - 1) - max(low, 0)), 0.0), 1.0)
        f = base ** (2 * c / rotary_dim)
        expected.append(ramp / (40.0 * f) + (1 - ramp) / f)
    assert expected[0] == 1.0
    assert expected[-1] < plain_theta(rotary_dim, base)[-1] / 39
    check_scaling(YaRN(40.0, length, **options), rotary_dim, base, 10, expected, factor)


def test_yarn_with_nothing_between_fast_and_slow():
    theta, factor = YaRN(1.0, 4, beta_fast=0.5, beta_slow=0.5, truncate=False).frequencies(8, 10000.0, 10, CPU)
    assert theta.tolist() == pytest.approx(plain_theta(8, 10000.0))
    assert factor == 1.0


def test_llama3():
    factor, length, low, high = 8.0, 8192, 1.0, 4.0
    expected, kinds = [], set()
    for theta in plain_theta(128, 500000.0):
        wavelength = 2 * math.pi / theta
        if wavelength < length / high:
            kinds.add("kept")
        elif wavelength > length / low:
            kinds.add("divided")
            theta /= factor
        else:
            kinds.add("between")
            smooth = (length / wavelength - low) / (high - low)
            theta = (1 - smooth) * theta / factor + smooth * theta
        expected.append(theta)
    assert len(kinds) == 3
    check_scaling(Llama3(factor, length, low, high), 128, 500000.0, 10, expected, 1.0)


def test_longrope():
    short, long = [1.0, 1.1, 1.3, 2.0], [1.5, 3.0, 9.0, 30.0]
    scaling = LongRoPE(short, long, 4096, 32.0)
    factor = math.sqrt(1 + math.log(32.0) / math.log(4096))
    theta = plain_theta(8, 10000.0)
    check_scaling(scaling, 8, 10000.0, 4096, [t / f for t, f in zip(theta, short, strict=True)], factor)
    check_scaling(scaling, 8, 10000.0, 4097, [t / f for t, f in zip(theta, long, strict=True)], factor)
    assert LongRoPE(short, long, 4096, 1.0).frequencies(8, 10.0, 1, CPU)[1] == 1.0
    assert LongRoPE(short, long, 4096, 32.0, 1.5).frequencies(8, 10.0, 1, CPU)[1] == 1.5


def test_the_attention_factor_multiplies_cosines_and_sines():
    scaled = RoPE(8, scaling=YaRN(8.0, 64)).lower(context(4, 4, 8)).rotary
    factor = 0.1 * math.log(8.0) + 1
    torch.testing.assert_close(scaled.q_cos**2 + scaled.q_sin**2, torch.full((1, 4, 4), factor**2, dtype=WIDE))


def test_explicit_positions_tell_dynamic_rules_the_length():
    rope = RoPE(8, scaling=DynamicNTK(2.0, 16))
    positions = torch.tensor([[3, 40]])
    plan = rope.lower(context(2, 2, 8, q_positions=positions, k_positions=positions)).rotary
    whole = rope.lower(context(41, 41, 8)).rotary
    torch.testing.assert_close(plan.k_cos, whole.k_cos[:, [3, 40]])


def test_axial():
    torch.manual_seed(0)
    x = torch.randn(1, 1, 12, 10, dtype=WIDE)
    rope = AxialRoPE(10, width=4, base=100.0, rotary_dim=8)
    expected = x.clone()
    for t in range(12):
        for c in range(4):
            position, theta = (t // 4, 100.0 ** (-2 * c / 4)) if c < 2 else (t % 4, 100.0 ** (-2 * (c - 2) / 4))
            z = complex(x[0, 0, t, c], x[0, 0, t, c + 4]) * cmath.exp(1j * position * theta)
            expected[0, 0, t, c], expected[0, 0, t, c + 4] = z.real, z.imag
    torch.testing.assert_close(rope.rotate(x), expected)


@pytest.mark.parametrize(
    ("arrangement", "axes"), [("blocks", [0, 0, 0, 0, 1, 1, 2, 2]), ("interleaved", [0, 1, 2, 0, 1, 2, 0, 0])]
)
def test_mrope(arrangement, axes):
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (3, 2, 5))
    rope = MRoPE(16, (4, 2, 2), arrangement=arrangement)
    rotary = rope.at(ids).lower(context(5, 5, 16, batch=2)).rotary
    for b in range(2):
        for t in range(5):
            angles = [int(ids[axis, b, t]) * 10000.0 ** (-c / 8) for c, axis in enumerate(axes)]
            assert rotary.q_cos[b, t].tolist() == pytest.approx([math.cos(a) for a in angles])
            assert rotary.k_sin[b, t].tolist() == pytest.approx([math.sin(a) for a in angles])


def test_mrope_on_text_is_rope():
    same, plain = MRoPE(16, (4, 2, 2)).lower(context(3, 5, 16)).rotary, RoPE(16).lower(context(3, 5, 16)).rotary
    torch.testing.assert_close(same.q_cos, plain.q_cos)
    ids = torch.arange(5).expand(3, 1, 5)
    placed = MRoPE(16, (4, 2, 2)).at(ids[..., 2:], ids).lower(context(3, 5, 16)).rotary
    torch.testing.assert_close(placed.q_cos, plain.q_cos)
    torch.testing.assert_close(placed.k_sin, plain.k_sin)


def test_mrope_at_leaves_the_original_alone():
    rope = MRoPE(16, (4, 2, 2))
    before = rope.lower(context(5, 5, 16)).rotary.q_cos
    rope.at(torch.randint(9, 50, (3, 1, 5)))
    torch.testing.assert_close(rope.lower(context(5, 5, 16)).rotary.q_cos, before)


def rotate_with_wrong_size():
    RoPE(8).rotate(torch.randn(1, 1, 3, 6))


IDS = torch.zeros(3, 1, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RoPE(0), "head_dim: expected a positive int, got 0"),
        (lambda: RoPE(7), "rotary_dim: expected an even number up to head_dim=7, got 7"),
        (lambda: RoPE(8, rotary_dim=10), "rotary_dim: expected an even number up to head_dim=8, got 10"),
        (lambda: RoPE(8, base=-1.0), "base: expected a positive finite number"),
        (lambda: RoPE(8, layout="neox"), "layout: expected one of 'half', 'interleaved', got 'neox'"),
        (lambda: RoPE(8).lower(context(2, 2, 6)), "position: RoPE was made for head_dim=8, got 6"),
        (rotate_with_wrong_size, r"x: expected \[B, H, T, 8\], got \[1, 1, 3, 6\]"),
        (lambda: Linear(0.0), "factor: expected a positive finite number"),
        (lambda: DynamicNTK(2.0, 0), "original_length: expected a positive int"),
        (lambda: RoPE(2, scaling=DynamicNTK(2.0, 4)).lower(context(2, 2, 2)), "DynamicNTK expects at least 4"),
        (lambda: YaRN(2.0, 64, beta_fast=1.0, beta_slow=2.0), "beta_fast: expected at least beta_slow=2.0, got 1.0"),
        (lambda: Llama3(2.0, 64, 4.0, 4.0), "high_freq_factor: expected more than low_freq_factor=4.0"),
        (lambda: LongRoPE([1.0], [0.0], 64, 2.0), r"long_factor\[0\]: expected a positive finite number"),
        (lambda: LongRoPE([1.0], [1.0], 1, 2.0), "original_length: expected at least 2, got 1"),
        (
            lambda: RoPE(8, scaling=LongRoPE([1.0], [1.0], 64, 2.0)).lower(context(2, 2, 8)),
            "short_factor: expected 4 numbers, one per pair, got 1",
        ),
        (lambda: AxialRoPE(6, width=4), "rotary_dim: expected a multiple of 4 for two axes, got 6"),
        (lambda: AxialRoPE(8, width=0), "width: expected a positive int"),
        (lambda: MRoPE(16, (4, 2)), r"sections: expected numbers that sum to rotary_dim / 2 = 8, got \(4, 2\)"),
        (lambda: MRoPE(16, (2, 4, 2), arrangement="interleaved"), "needs the first to be the longest"),
        (lambda: MRoPE(16, (4, 2, 2)).at(IDS[0]), r"q_ids: expected \[3, B or 1, T\], got \[1, 5\]"),
        (
            lambda: MRoPE(16, (4, 2, 2)).at(IDS).lower(context(5, 6, 16)),
            r"k_ids: expected \[3, 1 or 1, 6\], got \[3, 1, 5\]",
        ),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RoPE(8, base="10"), "base: expected a number, got str"),
        (lambda: RoPE(8, scaling=2.0), "scaling: expected a Scaling or None, got float"),
        (lambda: MRoPE(16, (4, 2, 2)).at(IDS.float()), "q_ids: expected a tensor of integers"),
    ],
)
def test_bad_types(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_rules_are_values():
    assert YaRN(2.0, 64) == YaRN(2.0, 64)
    assert len({Linear(2.0), Linear(2.0), LongRoPE([1.0], [1.0], 64, 2.0)}) == 2
    assert all(issubclass(rule, Scaling) for rule in (Linear, DynamicNTK, YaRN, Llama3, LongRoPE))
