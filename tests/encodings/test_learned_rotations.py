"""Rotations that learn, or differ between heads: their values, their gradients on every backend, caches and shards."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import posattn
from posattn import ops, turning
from posattn.encodings import AxialRoPE, Encoding, Linear, RoPE, YaRN
from posattn.plan import Bias, Plan, Rotary
from tests.tolerance import assert_parity

WIDE = torch.float64
HEADS, DIM, TOKENS = 4, 16, 37


def qkv(dtype=torch.float32, heads=HEADS, kv_heads=None, q_len=TOKENS, k_len=TOKENS, batch=2):
    kv_heads = kv_heads or heads
    return [
        torch.randn(batch, h, n, DIM, dtype=dtype) for h, n in ((heads, q_len), (kv_heads, k_len), (kv_heads, k_len))
    ]


def direct(x, angles, interleaved=False):
    """Pairs of x [B, H, T, D] as complex numbers, times e^(i angle); angles broadcast to [B, H, T, pairs]."""
    pairs = angles.shape[-1]
    turning, passing = x[..., : 2 * pairs], x[..., 2 * pairs :]
    a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else (turning[..., :pairs], turning[..., pairs:])
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    both = [z.real, z.imag]
    return torch.cat([torch.stack(both, -1).flatten(-2) if interleaved else torch.cat(both, -1), passing], -1)


def softmax_attention(q, k, v):
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return (q @ k.mT / math.sqrt(DIM)).masked_fill(hidden, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scaling", [None, Linear(3.0)])
def test_learned_frequencies_are_the_formula(interleaved, scaling):
    rope = RoPE(DIM, 100.0, "interleaved" if interleaved else "half", 12, scaling, learnable=True).double()
    plain = RoPE(DIM, 100.0, rope.layout, 12, scaling)
    q, k, v = qkv(WIDE)
    torch.testing.assert_close(rope.rotate(q), plain.rotate(q), rtol=0, atol=1e-5)  # float32's theta, as it starts
    with torch.no_grad():
        rope.theta.add_(0.1 * torch.randn_like(rope.theta))
    theta = rope.theta.detach().clone().requires_grad_()
    angles = torch.arange(TOKENS)[:, None] * theta / (3.0 if scaling else 1.0)
    out = softmax_attention(direct(q, angles, interleaved), direct(k, angles, interleaved), v)
    got = posattn.attention(q, k, v, rope, causal=True)
    torch.testing.assert_close(got, out)
    weight = torch.randn_like(out)
    expected = torch.autograd.grad((out * weight).sum(), theta)
    torch.testing.assert_close(torch.autograd.grad((got * weight).sum(), rope.theta), expected)


def test_a_learned_base_is_the_formula():
    rope = RoPE(DIM, 500.0, learnable="base").double()
    q, k, v = qkv(WIDE)
    base = torch.tensor(650.0, dtype=WIDE, requires_grad=True)
    with torch.no_grad():
        rope.log_base.fill_(math.log(650.0))
    angles = torch.arange(TOKENS)[:, None] * base ** -(torch.arange(DIM // 2, dtype=WIDE) * 2 / DIM)
    out = softmax_attention(direct(q, angles), direct(k, angles), v)
    got = posattn.attention(q, k, v, rope, causal=True)
    torch.testing.assert_close(got, out)
    (d_base,) = torch.autograd.grad(out.square().sum(), base)
    (d_log,) = torch.autograd.grad(got.square().sum(), rope.log_base)
    torch.testing.assert_close(d_log, (d_base * base).detach()[None])


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_mixed_frequencies_are_the_formula(kv_heads):
    width = 6
    rope = AxialRoPE(DIM, width, mixed=True, num_heads=HEADS, kv_heads=kv_heads).double()
    q, k, v = qkv(WIDE, kv_heads=kv_heads)
    theta = rope.theta.detach().clone().requires_grad_()
    cell = torch.arange(TOKENS)
    x, y = cell % width, cell // width
    angles = x[None, :, None] * theta[0][:, None] + y[None, :, None] * theta[1][:, None]  # [Hkv, T, pairs]
    group = HEADS // kv_heads
    turned_k = direct(k, angles).repeat_interleave(group, 1)
    out = softmax_attention(direct(q, angles.repeat_interleave(group, 0)), turned_k, v.repeat_interleave(group, 1))
    got = posattn.attention(q, k, v, rope, causal=True)
    torch.testing.assert_close(got, out)
    expected = torch.autograd.grad(out.square().sum(), theta)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), rope.theta), expected)
    torch.testing.assert_close(rope.rotate(q), direct(q, angles.repeat_interleave(group, 0)))
    torch.testing.assert_close(rope.rotate(k), direct(k, angles))
    if kv_heads == 2:
        with pytest.raises(ValueError, match="x: expected 4 or 2 heads, got 3"):
            rope.rotate(q[:, :3])


def test_mixed_starts_as_axial_frequencies_turned_by_one_angle_a_head():
    rope = AxialRoPE(DIM, 6, mixed=True, num_heads=50)
    quarter = DIM // 4
    size = 10.0 ** (-4.0 * torch.arange(quarter) / DIM)
    torch.testing.assert_close(rope.theta.square().sum(0).sqrt(), size.repeat(2).expand(50, -1))
    way = torch.atan2(rope.theta[1], rope.theta[0])
    torch.testing.assert_close(way[:, :quarter], way[:, :1].expand(-1, quarter))
    apart = (way[:, quarter:] - way[:, :1]) % (2 * math.pi)
    torch.testing.assert_close(apart, torch.full_like(apart, math.pi / 2))
    assert way[:, 0].std() > 1.0


LEARNED = {
    "frequencies": lambda: RoPE(DIM, 30.0, rotary_dim=10, learnable=True),
    "interleaved": lambda: RoPE(DIM, 30.0, "interleaved", learnable=True) + posattn.Kerple(HEADS),
    "base": lambda: RoPE(DIM, scaling=YaRN(2.0, 16), learnable="base"),
    "mixed": lambda: AxialRoPE(DIM, 6, mixed=True, num_heads=HEADS, kv_heads=2),
    "under DAPE": lambda: posattn.DAPE(RoPE(DIM, learnable=True) + posattn.FIRE(HEADS), HEADS),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LEARNED)
def test_parity(place, dtype, name):
    device, backend = place
    q, k, v = (x.to(device) for x in qkv(dtype, kv_heads=2))
    assert_parity(q, k, v, LEARNED[name]().to(device), {"causal": True}, backend)


def test_parity_of_sequences_and_documents(place):
    device, backend = place
    position = RoPE(DIM, 30.0, learnable=True).to(device)
    q, k, v = (x.to(device) for x in qkv(q_len=9))
    assert_parity(q, k, v, position, {"k_lengths": torch.tensor([37, 20], device=device)}, backend)
    cu_q, cu_k = torch.tensor([0, 4, 9], device=device), torch.tensor([0, 30, 37], device=device)
    options = {"causal": True, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    assert_parity(q[:1], k[:1], v[:1], position, options, backend)


class Tables(Encoding):
    """Rotation tables that are themselves the parameters."""

    def __init__(self):
        super().__init__()
        self.angles = torch.nn.Parameter(torch.randn(1, TOKENS, DIM // 2))

    def build(self, context):
        angles = self.angles.to(context.table_dtype(self.angles))
        cos, sin = angles.cos(), angles.sin()
        return Plan(Rotary(cos, sin, cos, sin), bias=Bias())


def test_tables_of_ones_own_get_gradients():
    position = Tables()
    assert_parity(*qkv(), position, {"causal": True})
    q, k, v = qkv(WIDE)
    angles = position.double().angles.detach().requires_grad_()
    out = softmax_attention(direct(q, angles), direct(k, angles), v)
    expected = torch.autograd.grad(out.square().sum(), angles)
    got = posattn.attention(q, k, v, position, causal=True)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), position.angles), expected)


def test_kernels_turn_where_nothing_learns(monkeypatch):
    seen = []
    monkeypatch.setattr(ops, "turned", lambda call: seen.append(call) or turning.turned(call))
    q, k, v = qkv()
    rope = RoPE(DIM, learnable=True)
    with torch.no_grad():
        fixed = posattn.attention(q, k, v, rope, causal=True)
    assert not seen
    learned = posattn.attention(q, k, v, rope, causal=True)
    assert len(seen) == 1
    torch.testing.assert_close(learned, fixed)


def test_steps_with_a_cache_are_the_whole():
    for position in (RoPE(DIM, learnable=True), AxialRoPE(DIM, 6, mixed=True, num_heads=HEADS)):
        q, k, v = qkv(batch=1)
        whole = posattn.attention(q, k, v, position, causal=True)
        for n in (1, 20, TOKENS):
            step = posattn.attention(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], position, causal=True)
            torch.testing.assert_close(step, whole[:, :, n - 1 : n])
        turned = position.rotate(k)  # a cache of keys that were turned once
        step = posattn.attention(position.rotate(q)[:, :, -1:], turned, v, causal=True)
        torch.testing.assert_close(step, whole[:, :, -1:])


def test_what_hidden_keys_hold_reaches_no_gradient():
    rope = RoPE(DIM, learnable=True)
    q, k, v = qkv(q_len=3)
    lengths, starts = torch.tensor([30, 11]), torch.tensor([5, 0])
    index = torch.arange(TOKENS)
    hidden = (index >= lengths[:, None]) | (index < starts[:, None])
    grads = []
    for fill in (0.0, torch.nan):
        filled = (x.masked_fill(hidden[:, None, :, None], fill) for x in (k, v))
        out = posattn.attention(q, *filled, rope, causal=True, k_lengths=lengths, k_starts=starts)
        grads.append(torch.autograd.grad(out.square().sum(), rope.theta)[0])
    assert torch.equal(*grads)
    assert grads[0].isfinite().all()


def test_what_is_kept_for_the_backward_pass_is_q_k_and_the_tables():
    """Wide copies of the halves of q and k would be 4 bytes a number more."""
    q, _, _ = (x.bfloat16() for x in qkv(q_len=512, k_len=512))
    cos, sin = torch.randn(2, 1, 512, DIM // 2).unbind()
    cos.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.untyped_storage()) or x, lambda x: x):
        turning.turn(q.requires_grad_(), cos, sin, False)
    sizes = {storage.data_ptr(): storage.nbytes() for storage in kept}
    assert sum(sizes.values()) <= sum(x.untyped_storage().nbytes() for x in (q, cos, sin))


def test_the_bits_of_gradients_are_those_of_any_number_of_threads():
    q, k, v = qkv(batch=1, q_len=600, k_len=600)
    for position in (RoPE(DIM, learnable=True), AxialRoPE(DIM, 25, mixed=True, num_heads=HEADS)):
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = posattn.attention(q, k, v, position, causal=True)
            found.append(torch.autograd.grad(out.square().sum(), position.theta)[0])
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def test_transforms_see_through_the_turn():
    q, k, v = qkv(WIDE, batch=1)
    rope = RoPE(DIM, learnable=True).double()
    thetas = torch.stack([rope.theta.detach(), rope.theta.detach() * 1.1])

    def loss(theta):
        out = torch.func.functional_call(_Layer(rope, q, k, v), {"position.theta": theta}, ())
        return out.square().sum()

    got = torch.func.vmap(torch.func.grad(loss))(thetas)
    for theta, gradient in zip(thetas, got):
        theta = theta.clone().requires_grad_()
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(theta), theta)[0])


class _Layer(torch.nn.Module):
    def __init__(self, position, q, k, v):
        super().__init__()
        self.position, self.tensors = position, (q, k, v)

    def forward(self):
        return posattn.attention(*self.tensors, self.position, causal=True)


@pytest.mark.parametrize("make", [LEARNED["frequencies"], LEARNED["mixed"]])
def test_it_compiles_whole(make):
    torch._dynamo.reset()
    position = make()
    q, k, v = qkv(kv_heads=2)

    def run(q):
        return posattn.attention(q, k, v, position, causal=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    parameters = list(position.parameters())
    torch.testing.assert_close(compiled(q), run(q))
    expected = torch.autograd.grad(run(q).square().sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad(compiled(q).square().sum(), parameters), expected)


def test_shards_and_weights_of_mixed_heads():
    position = AxialRoPE(DIM, 6, mixed=True, num_heads=HEADS, kv_heads=2)
    q, k, v = qkv(kv_heads=2)
    whole = posattn.attention(q, k, v, position)
    part = posattn.attention(q[:, 2:], k[:, 1:], v[:, 1:], position.shard(2, 2))
    torch.testing.assert_close(part, whole[:, 2:])
    weights = posattn.weights(q, k, position, heads=[3])
    torch.testing.assert_close(weights @ v[:, 1:], whole[:, 3:], rtol=1e-4, atol=1e-5)


def test_state_and_reset():
    position = AxialRoPE(DIM, 6, mixed=True, num_heads=HEADS)
    other = copy.deepcopy(position)
    other.reset_parameters()
    assert not torch.equal(other.theta, position.theta)
    other.load_state_dict(position.state_dict())
    assert torch.equal(other.theta, position.theta)
    assert list(RoPE(DIM, learnable=True).state_dict()) == ["theta"]
    assert list(RoPE(DIM, learnable="base").state_dict()) == ["log_base"]
    assert not RoPE(DIM).state_dict()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RoPE(8, learnable="theta"), "learnable: expected True, False or 'base', got 'theta'"),
        (lambda: AxialRoPE(8, 3, mixed=True), "num_heads: expected the number of query heads with mixed, got None"),
        (lambda: AxialRoPE(8, 3, num_heads=4), "num_heads: expected None without mixed, where all heads turn alike"),
        (lambda: AxialRoPE(8, 3, mixed=True, num_heads=4, kv_heads=3), "kv_heads: expected a divisor of num_heads=4"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_calls():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="AxialRoPE was made for kv_heads=2, got keys with 4 heads"):
        posattn.attention(q, k, v, AxialRoPE(DIM, 6, mixed=True, num_heads=HEADS, kv_heads=2))

    class Wrong(Tables):
        def build(self, context):
            cos = torch.ones(1, 3, TOKENS, DIM // 2)
            return Plan(Rotary(cos, cos, cos, cos), bias=Bias())

    message = r"rotary.q_cos .* of shape \[2 or 1, 4 or 1, 37, 8\], got \[1, 3, 37, 8\]"
    with pytest.raises(ValueError, match=message):
        posattn.attention(q, k, v, Wrong())
