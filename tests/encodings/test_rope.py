"""Rotary encodings: their angles, what makes them relative, and the scaling rules against scalar formulas."""

from __future__ import annotations

import cmath
import dataclasses
import functools
import math

import pytest
import torch
import torch._dynamo.testing

import posattn
from posattn.encodings import (
    AxialRoPE,
    Context,
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    MRoPE,
    Proportional,
    RoPE,
    Scaling,
    YaRN,
)
from posattn.plan import Mask

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


def test_yarn_with_slow_pairs_past_the_last_dimension():
    """The bound of slow pairs is at most rotary_dim - 1, and a pair of the ramp c / (rotary_dim - 1) of the way."""
    assert 8 * math.log(4096 / (2 * math.pi)) / (2 * math.log(10.0)) > 8
    expected = [t / 4.0 * c / 7 + t * (1 - c / 7) for c, t in enumerate(plain_theta(8, 10.0))]
    check_scaling(YaRN(4.0, 4096, beta_fast=512.0), 8, 10.0, 10, expected, 0.1 * math.log(4.0) + 1)


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


def test_llama3_with_nothing_between_long_and_short():
    """Hugging Face takes equal limits: a step."""
    theta = plain_theta(8, 10000.0)
    length = 2 * math.pi / theta[2]
    steps = [theta[0], theta[1], theta[2] / 8.0, theta[3] / 8.0]
    check_scaling(Llama3(8.0, int(length) - 1, 1.0, 1.0), 8, 10000.0, 10, steps, 1.0)


def test_yarn_with_more_slow_turns_than_fast_ones():
    """Hugging Face's formula as it stands: the ramp falls from 1 before the slow bound to 0 past the fast one."""
    low = math.floor(64 * math.log(4096 / (2 * math.pi * 1.0)) / (2 * math.log(10000.0)))
    high = math.ceil(64 * math.log(4096 / (2 * math.pi * 32.0)) / (2 * math.log(10000.0)))
    assert low > high
    expected = []
    for c, theta in enumerate(plain_theta(64, 10000.0)):
        ramp = min(max((c - low) / (high - low), 0.0), 1.0)
        expected.append(theta / 4.0 * ramp + theta * (1 - ramp))
    factor = 0.1 * math.log(4.0) + 1
    check_scaling(YaRN(4.0, 4096, beta_fast=1.0, beta_slow=32.0), 64, 10000.0, 10, expected, factor)


def test_yarn_with_a_factor_below_one():
    """Hugging Face warns and computes; nothing is added to the attention factor."""
    with pytest.warns(UserWarning, match=r"factor: expected at least 1, .*got 0.5; did you mean 2\?") as caught:
        theta, factor = YaRN(0.5, 64).frequencies(8, 10000.0, 10, CPU)
    assert caught[0].filename == __file__
    assert factor == 1.0
    assert theta[-1].item() == pytest.approx(2 * plain_theta(8, 10000.0)[-1])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Linear(0.25),
        lambda: DynamicNTK(0.25, 64),
        lambda: Llama3(0.25, 64),
        lambda: LongRoPE([1.0], [1.0], 64, 0.25),
    ],
)
def test_every_rule_warns_of_a_factor_below_one(make):
    with pytest.warns(UserWarning, match="got 0.25; did you mean 4"):
        make()


@pytest.mark.parametrize("length", [3, 5, 9])
def test_a_length_of_ones_own_replaces_that_of_each_sequence(length):
    """Hugging Face's rule: the longest of a batch for all of it."""
    positions = torch.tensor([[0, 1], [1, 8]])
    case = context(2, 2, 4, q_positions=positions, k_positions=positions, batch=2)
    for rule in DYNAMIC:
        fixed = dataclasses.replace(rule, length=length)
        assert rule.dynamic
        assert not fixed.dynamic
        theta, factor = rule.frequencies(4, 10000.0, length, CPU)
        rotary = RoPE(4, scaling=fixed).lower(case).rotary
        torch.testing.assert_close(rotary.q_cos, (positions[..., None] * theta).cos() * factor)
        by_tensor, _ = rule.frequencies(4, 10000.0, torch.tensor([length]), CPU)
        torch.testing.assert_close(theta, by_tensor[0])


def test_a_length_of_ones_own_serves_every_size_with_one_graph():
    torch._dynamo.reset()
    for rule in DYNAMIC:
        rope = RoPE(4, scaling=dataclasses.replace(rule, length=100))
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(functools.partial(lowered_k_cos, rope), fullgraph=True, dynamic=True, backend=counter)
        for tokens in (3, 4, 5, 9):
            q, k = torch.randn(1, 1, 2, 4, dtype=WIDE), torch.randn(1, 1, tokens, 4, dtype=WIDE)
            torch.testing.assert_close(compiled(q, k), lowered_k_cos(rope, q, k))
        assert counter.frame_count <= 2


def lowered_k_cos(rope, q, k):
    return rope.lower(Context.of(q, k, Mask(causal=True))).rotary.k_cos


def test_proportional():
    """Pairs span the whole head, and those past the first share of them stand still (Gemma 4)."""
    theta = plain_theta(16, 10000.0)
    for partial, turning in ((0.25, 2), (0.3, 2), (0.5, 4), (1.0, 8)):
        expected = [t / 2.0 if c < turning else 0.0 for c, t in enumerate(theta)]
        check_scaling(Proportional(partial, 2.0), 16, 10000.0, 10, expected, 1.0)
    x = torch.randn(1, 2, 5, 16, dtype=WIDE)
    turned = RoPE(16, scaling=Proportional(0.25)).rotate(x)
    still = [c for c in range(16) if c % 8 >= 2]
    torch.testing.assert_close(turned[..., still], x[..., still])
    assert not torch.allclose(turned[:, :, 1:, [0, 1, 8, 9]], x[:, :, 1:, [0, 1, 8, 9]])


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


DYNAMIC = [DynamicNTK(2.0, 4), LongRoPE([1.0, 1.5], [2.0, 8.0], 4, 2.0)]
dynamic = pytest.mark.parametrize("rule", DYNAMIC, ids=lambda rule: type(rule).__name__)


def alone(rule, length):
    """cos [length, 2] of a sequence of its own."""
    theta, factor = rule.frequencies(4, 10000.0, length, CPU)
    return (torch.arange(length)[:, None] * theta).cos() * factor


def test_a_cache_with_room_does_not_stretch_dynamic_ntk():
    rope = RoPE(4, base=4, scaling=DynamicNTK(2.0, 2))
    q, k, v = torch.ones(2, 1, 1, 4), torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    got = posattn.attention(q, k, v, rope, k_lengths=torch.tensor([2, 4]))
    for b, n in enumerate((2, 4)):
        alone = posattn.attention(q[b, None], k[b, None, :, :n], v[b, None, :, :n], rope)
        torch.testing.assert_close(got[b, None], alone)


@dynamic
def test_dynamic_rules_follow_each_sequence_of_a_cache(rule):
    rope = RoPE(4, scaling=rule)
    lengths = torch.tensor([3, 4, 5, 10, 0])
    plan = rope.lower(context(1, 16, 4, k_lengths=lengths, batch=5, q_tokens=1, k_tokens=16)).rotary
    assert plan.k_cos.shape == (5, 16, 2)
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(plan.k_cos[b, :n], alone(rule, n))
        torch.testing.assert_close(plan.q_cos[b, :1] if n else plan.q_cos[b, :0], alone(rule, n)[n - 1 :][:1])


@dynamic
def test_dynamic_rules_follow_each_packed_document(rule):
    rope = RoPE(4, scaling=rule)
    ks, qs = [3, 10, 0, 5], [2, 1, 0, 5]
    cu_q, cu_k = (torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()]) for n in (qs, ks))
    documents = {"q_tokens": 8, "k_tokens": 18, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    plan = rope.lower(context(5, 10, 4, **documents)).rotary
    torch.testing.assert_close(plan.k_cos[0], torch.cat([alone(rule, n) for n in ks]))
    torch.testing.assert_close(plan.q_cos[0], torch.cat([alone(rule, k)[k - q :] for q, k in zip(qs, ks, strict=True)]))
    places = [torch.cat([torch.arange(k)[k - n :] for n, k in zip(ns, ks, strict=True)])[None] for ns in (qs, ks)]
    same = rope.lower(context(5, 10, 4, q_positions=places[0], k_positions=places[1], **documents)).rotary
    torch.testing.assert_close(same.q_cos, plan.q_cos)
    torch.testing.assert_close(same.k_sin, plan.k_sin)


@dynamic
def test_explicit_positions_tell_dynamic_rules_the_length(rule):
    rope = RoPE(4, scaling=rule)
    positions = torch.tensor([[3, 40], [1, 2]])
    plan = rope.lower(context(2, 2, 4, q_positions=positions, k_positions=positions, batch=2)).rotary
    torch.testing.assert_close(plan.k_cos[0], alone(rule, 41)[[3, 40]])
    torch.testing.assert_close(plan.q_cos[1], alone(rule, 3)[[1, 2]])
    late = rope.lower(context(1, 2, 4, q_positions=torch.tensor([[7]]), k_positions=positions, batch=2)).rotary
    torch.testing.assert_close(late.q_cos, torch.stack([alone(rule, 41)[[7]], alone(rule, 8)[[7]]]))
    torch.testing.assert_close(late.k_cos[1], alone(rule, 8)[[1, 2]])


@dynamic
def test_documents_of_queries_and_of_keys_may_share_their_positions(rule):
    """One tensor for both, and yet a token's rotation depends on which document it counts to."""
    positions = torch.arange(10)[None] % 7
    bounds = {"cu_seqlens_q": torch.tensor([0, 2, 10]), "cu_seqlens_k": torch.tensor([0, 4, 10])}
    bounds |= {"q_tokens": 10, "k_tokens": 10}
    rope = RoPE(4, scaling=rule)
    shared = rope.lower(context(8, 6, 4, q_positions=positions, k_positions=positions, **bounds)).rotary
    apart = rope.lower(context(8, 6, 4, q_positions=positions.clone(), k_positions=positions, **bounds)).rotary
    assert not torch.equal(apart.q_cos, apart.k_cos)
    assert torch.equal(shared.q_cos, apart.q_cos)
    assert torch.equal(shared.k_cos, apart.k_cos)


@dynamic
def test_positions_in_the_empty_part_of_a_cache_do_not_count(rule):
    rope = RoPE(4, scaling=rule)
    slots = torch.arange(64)[None]
    lengths = {"k_lengths": torch.tensor([3, 6]), "batch": 2, "q_tokens": 1, "k_tokens": 64}
    given = context(1, 64, 4, q_positions=torch.tensor([[2], [5]]), k_positions=slots, **lengths)
    plan, implicit = (rope.lower(c).rotary for c in (given, context(1, 64, 4, **lengths)))
    torch.testing.assert_close(plan.q_cos, implicit.q_cos)
    torch.testing.assert_close(plan.k_cos, implicit.k_cos)


@dynamic
def test_the_length_is_that_of_what_is_in_use(rule):
    """A preallocated cache filled up to the causal offset, and rows that are padded on the left."""
    rope = RoPE(4, scaling=rule)
    plan = rope.lower(context(2, 64, 4, causal=True, offset=9)).rotary
    torch.testing.assert_close(plan.k_cos[0, :11], alone(rule, 11))
    torch.testing.assert_close(plan.q_cos[0], alone(rule, 11)[9:])
    plan = rope.lower(context(2, 64, 4, offset=9)).rotary  # every key is seen
    torch.testing.assert_close(plan.k_cos[0], alone(rule, 64))
    padded = {"k_starts": torch.tensor([0, 7]), "batch": 2, "q_tokens": 2, "k_tokens": 16}
    for given in ({}, {"causal": True, "offset": torch.tensor([14, 14]), "offset_range": (14, 14)}):
        plan = rope.lower(context(2, 16, 4, **padded, **given)).rotary
        torch.testing.assert_close(plan.k_cos[1, 7:], alone(rule, 9))
        torch.testing.assert_close(plan.q_cos[1], alone(rule, 9)[7:])


@dynamic
def test_dynamic_rules_follow_each_segment(rule):
    rope = RoPE(4, scaling=rule)
    rows = torch.tensor([[1] * 10 + [0] * 6, [5] * 16])
    given = {"q_segments": rows, "k_segments": rows, "batch": 2, "q_tokens": 16, "k_tokens": 16}
    plan = rope.lower(context(16, 16, 4, **given)).rotary
    torch.testing.assert_close(plan.k_cos[0], torch.cat([alone(rule, 10), alone(rule, 6)]))
    torch.testing.assert_close(plan.k_cos[1], alone(rule, 16))
    at = torch.cat([torch.arange(10), torch.arange(6)])[None]
    same = rope.lower(context(16, 16, 4, q_positions=at, k_positions=at, **given)).rotary
    torch.testing.assert_close(same.q_cos[0], plan.q_cos[0])


@dynamic
@pytest.mark.parametrize(("q_len", "k_len"), [(0, 0), (0, 5), (5, 0)])
def test_dynamic_rules_on_no_tokens(rule, q_len, k_len):
    rope = RoPE(4, scaling=rule)
    for positions in (
        {},
        {"q_positions": torch.arange(q_len)[None], "k_positions": torch.arange(k_len)[None]},
        {"k_lengths": torch.zeros(1, dtype=torch.int32), "q_tokens": q_len, "k_tokens": k_len},
    ):
        plan = rope.lower(context(q_len, k_len, 4, **positions)).rotary
        assert (plan.q_cos.shape, plan.k_cos.shape) == ((1, q_len, 2), (1, k_len, 2))


@dynamic
def test_dynamic_rules_read_no_length_back(rule):
    """The meta device has no values to read."""
    rope = RoPE(4, scaling=rule)
    meta = {"device": "meta", "dtype": torch.int64}
    cases = [
        {"k_lengths": torch.zeros(2, **meta)},
        {"q_positions": torch.zeros(2, 3, **meta), "k_positions": torch.zeros(1, 6, **meta)},
        {"cu_seqlens_q": torch.zeros(3, **meta), "cu_seqlens_k": torch.zeros(3, **meta)},
    ]
    for case in cases:
        rope.lower(Context(3, 6, 2, 4, torch.device("meta"), WIDE, batch=2, q_tokens=3, k_tokens=6, **case))


@dynamic
def test_compiled_decoding_past_the_original_length_is_one_graph(rule):
    torch._dynamo.reset()
    rope, counter = RoPE(4, scaling=rule), torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def lowered(q, k):
        return rope.lower(Context.of(q, k, Mask(causal=True))).rotary.k_cos

    compiled = torch.compile(lowered, fullgraph=True, dynamic=True, backend=counter)
    counts = set()
    for length in (3, 4, 5, 9, 10, 11):
        q, k = torch.randn(1, 1, 2, 4, dtype=WIDE), torch.randn(1, 1, length, 4, dtype=WIDE)
        torch.testing.assert_close(compiled(q, k), lowered(q, k))
        counts.add(counter.frame_count)
    assert len(counts) == 1  # not 1 itself: the first graph may be traced twice


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
@dynamic
def test_a_captured_call_follows_the_lengths(rule):
    rope = RoPE(4, scaling=rule)
    lengths = torch.tensor([3], device="cuda", dtype=torch.int32)
    q = torch.randn(1, 1, 1, 4, device="cuda")
    k = torch.randn(1, 1, 16, 4, device="cuda")
    mask = Mask(k_lengths=lengths, max_q=1, max_k=16)
    rope.lower(Context.of(q, k, mask))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = rope.lower(Context.of(q, k, mask)).rotary
    for n in (3, 12):
        lengths.fill_(n)
        graph.replay()
        torch.testing.assert_close(plan.k_cos[0, :n].cpu(), alone(rule, n).float())


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


@pytest.mark.parametrize(
    "scaling", [YaRN(4.0, 16), Llama3(8.0, 64), Linear(2.0), LongRoPE([1.0] * 8, [2.0] * 8, 64, 2.0, length=100)]
)
def test_mrope_takes_every_scaling(scaling):
    ids = torch.randint(0, 50, (3, 2, 5))
    theta, factor = scaling.frequencies(16, 5000.0, 5, CPU)
    rotary = MRoPE(16, (4, 2, 2), base=5000.0, scaling=scaling).at(ids).lower(context(5, 5, 16, batch=2)).rotary
    expected = ids[[0, 0, 0, 0, 1, 1, 2, 2]].movedim(0, -1) * theta
    torch.testing.assert_close(rotary.q_cos, expected.cos() * factor)
    torch.testing.assert_close(rotary.k_sin, expected.sin() * factor)


def test_mrope_goes_by_the_largest_position_of_any_axis():
    rule = DynamicNTK(2.0, 4)
    rope = MRoPE(16, (4, 2, 2), scaling=rule)
    ids = torch.zeros(3, 2, 5, dtype=torch.int64)
    ids[2, 0, 3], ids[1, 1, 1] = 40, 2  # the lengths 41 and 3
    rotary = rope.at(ids).lower(context(5, 5, 16, batch=2)).rotary
    for b, length in enumerate((41, 3)):
        theta, _ = rule.frequencies(16, 10000.0, length, CPU)
        expected = ids[[0, 0, 0, 0, 1, 1, 2, 2], b].movedim(0, -1) * theta
        torch.testing.assert_close(rotary.k_cos[b], expected.cos())
    # A cache whose room beyond k_lengths holds stale ids, and text without ids.
    late = ids.clone()
    late[0, :, 4] = 1000
    cached = rope.at(ids[:, :, :1], late).lower(
        context(1, 5, 16, batch=2, q_tokens=1, k_tokens=5, k_lengths=torch.tensor([4, 4]))
    )
    torch.testing.assert_close(cached.rotary.k_cos[:, :4], rotary.k_cos[:, :4])
    text, plain = rope.lower(context(3, 9, 16)).rotary, RoPE(16, scaling=rule).lower(context(3, 9, 16)).rotary
    assert torch.equal(text.q_cos, plain.q_cos)
    assert torch.equal(text.k_cos, plain.k_cos)


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
        (lambda: DynamicNTK(2.0, 4, length=0), "length: expected a positive int, got 0"),
        (lambda: LongRoPE([1.0], [1.0], 64, 2.0, length=-1), "length: expected a positive int, got -1"),
        (lambda: MRoPE(16, (4, 2, 2), base=1.0, scaling=YaRN(2.0, 64)), "base: YaRN .* expects a base other than 1"),
        (lambda: RoPE(2, scaling=DynamicNTK(2.0, 4)), "DynamicNTK expects at least 4"),
        (lambda: RoPE(8, base=1.0, scaling=YaRN(2.0, 64)), "base: YaRN .* expects a base other than 1"),
        (lambda: YaRN(math.nan, 64), "factor: expected a positive finite number, got nan"),
        (lambda: YaRN(2.0, 0), "original_length: expected a positive int"),
        (lambda: Proportional(1.5), "partial: expected a number above 0 and up to 1, got 1.5"),
        (lambda: Proportional(0.0), "partial: expected a positive finite number, got 0.0"),
        (lambda: Proportional(0.5, 0.0), "factor: expected a positive finite number, got 0.0"),
        (lambda: YaRN(2.0, 64, attention_factor=0.0), "attention_factor: expected a positive finite number"),
        (lambda: YaRN(2.0, 64, mscale=math.nan), "mscale: expected a finite number"),
        (
            lambda: YaRN(math.e, 64, mscale=1.0, mscale_all_dim=-20.0),
            "mscale_all_dim: expected a positive",
        ),
        (
            lambda: RoPE(8, scaling=YaRN(math.e, 64, mscale=-20.0, mscale_all_dim=1.0)),
            "scaling: expected finite frequencies and a positive attention factor",
        ),
        (lambda: RoPE(256, base=5e-324, scaling=Linear(1.0)), "scaling: expected finite frequencies"),
        (lambda: DynamicNTK(math.inf, 4), "factor: expected a positive finite number, got inf"),
        (lambda: Llama3(2.0, 64, 4.0, 3.0), "high_freq_factor: expected at least low_freq_factor=4.0, got 3.0"),
        (lambda: Llama3(2.0, 64, 4.0, math.nan), "high_freq_factor: expected a positive finite number, got nan"),
        (lambda: LongRoPE([1.0], [1.0], 64, 2.0, math.nan), "attention_factor: expected a positive finite number"),
        (lambda: LongRoPE([1.0], [0.0], 64, 2.0), r"long_factor\[0\]: expected a positive finite number"),
        (lambda: LongRoPE([1.0], [1.0], 1, 2.0), "original_length: expected at least 2, got 1"),
        (
            lambda: RoPE(8, scaling=LongRoPE([1.0], [1.0], 64, 2.0)),
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
        (
            lambda: MRoPE(16, (4, 2, 2)).at(IDS.expand(3, 2, 5)).lower(context(5, 5, 16, batch=3)),
            r"q_ids: expected \[3, 3 or 1, 5\], got \[3, 2, 5\]",
        ),
        (
            lambda: MRoPE(16, (4, 2, 2)).at(IDS, IDS.expand(3, 2, 5)).lower(context(5, 5, 16)),
            r"k_ids: expected \[3, 1 or 1, 5\], got \[3, 2, 5\]",
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
        (lambda: DynamicNTK(2.0, 4, length=torch.tensor(9)), "length: expected an int, got Tensor"),
        (lambda: MRoPE(16, (4, 2, 2), scaling=4.0), "scaling: expected a Scaling or None, got float"),
        (lambda: RoPE(8, scaling=2.0), "scaling: expected a Scaling or None, got float"),
        (lambda: MRoPE(16, (4, 2, 2)).at(IDS.bool()), "q_ids: expected a tensor of numbers"),
    ],
)
def test_bad_types(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_rules_are_values():
    assert YaRN(2.0, 64) == YaRN(2.0, 64)
    assert len({Linear(2.0), Linear(2.0), LongRoPE([1.0], [1.0], 64, 2.0)}) == 2
    assert all(issubclass(rule, Scaling) for rule in (Linear, DynamicNTK, YaRN, Llama3, LongRoPE))


class TestSharedTables:
    """Plain calls that are alike have one set of tables; anything that tells them apart gives them their own."""

    @staticmethod
    def tables(rope, q_len=5, k_len=9, **options):
        return rope.build(Context.of(*(torch.empty(2, 2, n, 8) for n in (q_len, k_len)), Mask(**options))).rotary

    def test_equal_encodings_have_one(self):
        tables = self.tables(RoPE(8, scaling=Linear(2.0)))
        assert self.tables(RoPE(8, scaling=Linear(2.0))) is tables
        own = super(RoPE, RoPE(8, scaling=Linear(2.0))).build(
            Context.of(torch.empty(2, 2, 5, 8), torch.empty(2, 2, 9, 8), Mask())
        )
        for name in ("q_cos", "q_sin", "k_cos", "k_sin"):
            assert torch.equal(getattr(tables, name), getattr(own.rotary, name))

    def test_what_an_encoding_is_and_where_tokens_sit_tell_them_apart(self):
        tables = self.tables(RoPE(8))
        assert self.tables(RoPE(8)) is tables
        others = {"base": 1e6, "rotary_dim": 4, "layout": "interleaved", "scaling": Linear(3.0)}
        for rope in (RoPE(8, **{name: value}) for name, value in others.items()):
            assert self.tables(rope) is not tables
        assert not torch.equal(self.tables(RoPE(8), offset=2).q_cos, tables.q_cos)
        changed = RoPE(8)
        self.tables(changed)
        changed.base = 100.0
        assert not torch.equal(self.tables(changed).k_cos, tables.k_cos)
        starts = {"k_starts": torch.tensor([0, 3], dtype=torch.int32)}
        assert self.tables(RoPE(8), **starts) is not self.tables(RoPE(8), **starts)

    def test_a_class_of_ones_own_keeps_its_angles(self):
        class Half(RoPE):
            def angles(self, positions, theta):
                return super().angles(positions, theta) / 2

        assert not torch.equal(self.tables(Half(8)).k_cos, self.tables(RoPE(8)).k_cos)

    def test_those_of_inference_serve_no_training(self):
        q = torch.randn(1, 2, 11, 8)
        with torch.inference_mode():
            out = posattn.attention(q, q, q, RoPE(8, base=77.0))
        wanted = q.clone().requires_grad_()
        again = posattn.attention(wanted, q, q, RoPE(8, base=77.0))
        again.sum().backward()  # tensors of inference mode cannot be saved for it
        assert torch.equal(out, again)

    def test_a_rule_of_ones_own_may_change(self):
        class Growing(Scaling):
            factor = 1.0

            def frequencies(self, rotary_dim, base, length, device):
                return posattn.encodings.scaling.rotary_frequencies(rotary_dim, base, device) * self.factor, 1.0

        rule = Growing()
        rope = RoPE(8, scaling=rule)
        before = self.tables(rope)
        rule.factor = 2.0
        assert not torch.equal(self.tables(rope).k_cos, before.k_cos)
