"""The reference against a loop over single elements, torch's own attention, and the facts that a mask implies."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from posattn import reference
from posattn.plan import Bias, Call, Dense, HeadMix, Mask, Plan, Profile, Rotary, Slope, Table

INF = float("inf")
WIDE = torch.float64


def tensors(seed=0, batch=2, heads=4, kv_heads=2, q_len=5, k_len=7, dim=6, v_dim=3, dtype=WIDE):
    torch.manual_seed(seed)
    q = torch.randn(batch, heads, q_len, dim, dtype=dtype)
    k = torch.randn(batch, kv_heads, k_len, dim, dtype=dtype)
    return q, k, torch.randn(batch, kv_heads, k_len, v_dim, dtype=dtype)


def rotary(q_len, k_len, pairs, interleaved):
    q_angle, k_angle = torch.randn(2, q_len, pairs, dtype=WIDE), torch.randn(1, k_len, pairs, dtype=WIDE)
    return Rotary(q_angle.cos(), q_angle.sin(), k_angle.cos(), k_angle.sin(), interleaved)


def bias(heads, q_len, k_len):
    first, count = 1 - q_len, q_len + k_len - 1
    return Bias(
        slope=Slope(torch.rand(heads, dtype=WIDE)),
        table=Table(torch.randn(heads, count, dtype=WIDE), first),
        profile=profile(heads, first, count),
        dense=Dense(torch.randn(1, heads, q_len, k_len, dtype=WIDE)),
    )


def profile(heads, first, count, width=3):
    knots = torch.randn(width, dtype=WIDE).sort().values
    knots[-1] = INF
    pieces = torch.randn(2, heads, width + 1, dtype=WIDE)
    return Profile(
        torch.randn(count, dtype=WIDE), first, torch.rand(count, dtype=WIDE), first, knots, pieces[0], pieces[1]
    )


def mix(heads, width, form, inner):
    features = 2 * heads if inner and form != "add" else heads
    return HeadMix(
        torch.randn(width, features, dtype=WIDE),
        torch.randn(width, dtype=WIDE),
        torch.randn(heads, width, dtype=WIDE),
        torch.randn(heads, dtype=WIDE),
        form,
        inner,
    )


# The loop: everything one element at a time, from the definitions in posattn/plan.py.


def loop_forward(call):
    batch, heads, q_len, _ = call.q.shape
    k_len = call.k.shape[2]
    out = torch.zeros(batch, heads, q_len, call.v.shape[3], dtype=WIDE)
    lse = torch.full((batch, heads, q_len), -INF, dtype=WIDE)
    group = heads // call.k.shape[1]
    for b in range(batch):
        for i in range(q_len):
            weights = [[0.0] * k_len for _ in range(heads)]
            for j in range(k_len):
                if not any(loop_allowed(call, b, h, i, j) for h in range(heads)):
                    continue
                for h, logit in enumerate(loop_logits(call, b, i, j)):
                    weights[h][j] = math.exp(logit) if loop_allowed(call, b, h, i, j) else 0.0
            for h in range(heads):
                total = sum(weights[h]) + (math.exp(call.sinks[h]) if call.sinks is not None else 0.0)
                if total > 0:
                    lse[b, h, i] = math.log(total)
                    out[b, h, i] = sum(w / total * call.v[b, h // group, j] for j, w in enumerate(weights[h]))
    return out, lse


def loop_place(call, b, i):
    """Query i's index in its sequence, where query 0 sits on the sequence's keys, and its first key."""
    mask = call.mask
    offset = mask.offset
    if mask.cu_seqlens_q is not None:
        cu_q, cu_k = mask.cu_seqlens_q.tolist(), mask.cu_seqlens_k.tolist()
        n = next(n for n in range(len(cu_q) - 1) if cu_q[n] <= i < cu_q[n + 1])
        if offset is None:
            offset = (cu_k[n + 1] - cu_k[n]) - (cu_q[n + 1] - cu_q[n])
        return i - cu_q[n], int(offset[n]) if torch.is_tensor(offset) else offset, cu_k[n]
    end = call.k.shape[2] if mask.k_lengths is None else int(mask.k_lengths[b])
    start = 0 if mask.k_starts is None else int(mask.k_starts[b])
    if offset is None:
        offset = end - call.q.shape[2]
    return i, (int(offset[b]) if torch.is_tensor(offset) else offset) - start, start


def loop_allowed(call, b, h, i, j):
    mask = call.mask
    index, offset, first_key = loop_place(call, b, i)
    row = index + offset
    if mask.cu_seqlens_q is not None:
        cu_q, cu_k = mask.cu_seqlens_q.tolist(), mask.cu_seqlens_k.tolist()
        if not any(q0 <= i < q1 and k0 <= j < k1 for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:])):
            return False
    if mask.k_lengths is not None and j >= mask.k_lengths[b]:
        return False
    if mask.k_starts is not None and j < mask.k_starts[b]:
        return False
    j -= first_key
    if mask.causal and j > row:
        return False
    if mask.left is not None and j < row - mask.left:
        return False
    if mask.right is not None and j > row + mask.right:
        return False
    if mask.boolean is None:
        return True
    boolean = mask.boolean.expand(call.q.shape[0], call.q.shape[1], -1, -1)
    return bool(boolean[b, h, i, j])


def loop_logits(call, b, i, j):
    heads = call.q.shape[1]
    group = heads // call.k.shape[1]
    logits = []
    for h in range(heads):
        q, k = call.q[b, h, i].tolist(), call.k[b, h // group, j].tolist()
        turn = call.plan.rotary
        if turn is not None:
            loop_rotate(q, turn.q_cos, turn.q_sin, b, i, turn.interleaved)
            loop_rotate(k, turn.k_cos, turn.k_sin, b, j, turn.interleaved)
        x = call.scale * sum(s * t for s, t in zip(q, k))
        logits.append(call.softcap * math.tanh(x / call.softcap) if call.softcap else x)
    if call.plan.mix is not None:
        m = call.plan.mix
        inner = [loop_bias(m.inner, call, b, h, i, j) for h in range(heads)]
        both = [x + y for x, y in zip(logits, inner)]
        if not m.inner:
            z, start = logits, logits
        elif m.form == "add":
            z, start = both, both
        else:
            z, start = logits + inner, logits if m.form == "concat" else both
        hidden = [sum(w * x for w, x in zip(row, z)) + c for row, c in zip(m.w1.tolist(), m.b1.tolist())]
        hidden = [x if x > 0 else 0.01 * x for x in hidden]
        change = [sum(w * x for w, x in zip(row, hidden)) + c for row, c in zip(m.w2.tolist(), m.b2.tolist())]
        logits = [x + y for x, y in zip(start, change)]
    return [x + loop_bias(call.plan.bias, call, b, h, i, j) for h, x in enumerate(logits)]


def loop_rotate(x, cos, sin, b, t, interleaved):
    b = b if cos.shape[0] > 1 else 0
    pairs = cos.shape[2]
    for c in range(pairs):
        s, t_ = (2 * c, 2 * c + 1) if interleaved else (c, c + pairs)
        cosine, sine = float(cos[b, t, c]), float(sin[b, t, c])
        x[s], x[t_] = x[s] * cosine - x[t_] * sine, x[s] * sine + x[t_] * cosine


def loop_bias(operands, call, b, h, i, j):
    index, offset, first_key = loop_place(call, b, i)
    p, k = index + offset, j - first_key
    if call.q_positions is not None:
        p = int(call.q_positions[b if call.q_positions.shape[0] > 1 else 0, i])
        k = int(call.k_positions[b if call.k_positions.shape[0] > 1 else 0, j])
    d, total = p - k, 0.0
    if operands.slope is not None:
        slope = operands.slope.slope.expand(call.q.shape[0], -1)[b, h]
        total -= float(slope) * (d if operands.slope.signed else abs(d))
    if operands.table is not None:
        values = operands.table.values
        total += float(values[h, min(max(d - operands.table.first, 0), values.shape[1] - 1)])
    if operands.profile is not None:
        f = operands.profile
        y = float(f.psi[min(max(d - f.first, 0), len(f.psi) - 1)])
        y *= float(f.row_scale[min(max(p - f.row_first, 0), len(f.row_scale) - 1)])
        s = sum(knot < y for knot in f.knots.tolist())
        total += float(f.segment_slope[h, s]) * y + float(f.segment_intercept[h, s])
    if operands.dense is not None:
        total += float(operands.dense.bias.expand(call.q.shape[0], call.q.shape[1], -1, -1)[b, h, i, j])
    return total


def plain(**options):
    q, k, v = tensors(**options.pop("sizes", {}))
    plan, mask = options.pop("plan", Plan()), options.pop("mask", Mask())
    return Call(q, k, v, plan, mask, scale=0.4, **options)


def cases():
    torch.manual_seed(7)
    additive = bias(4, 5, 7)
    boolean = torch.rand(1, 4, 5, 7) > 0.4
    dense = torch.randn(2, 1, 5, 7, dtype=WIDE)
    dense[:, :, :, 2] = -INF
    dense[1, :, 3] = -INF
    yield "bare", plain()
    yield "one head group", plain(sizes={"kv_heads": 1})
    yield "rotary half", plain(plan=Plan(rotary=rotary(5, 7, 3, False)))
    yield "rotary partial interleaved", plain(plan=Plan(rotary=rotary(5, 7, 2, True)))
    yield "softcap", plain(softcap=1.5)
    yield "sinks", plain(sinks=torch.randn(4), mask=Mask(causal=True))
    for name in ("slope", "table", "profile", "dense"):
        yield name, plain(plan=Plan(bias=Bias(**{name: getattr(additive, name)})))
    yield "slope per batch, signed", plain(plan=Plan(bias=Bias(slope=Slope(torch.rand(2, 4, dtype=WIDE), signed=True))))
    yield "dense forbids", plain(plan=Plan(bias=Bias(dense=Dense(dense))))
    yield "mix alone", plain(plan=Plan(mix=mix(4, 5, "concat-residual", Bias())))
    for form in ("concat-residual", "concat", "add"):
        plan = Plan(rotary(5, 7, 3, False), mix(4, 5, form, additive), Bias(slope=additive.slope))
        yield f"mix {form}", plain(plan=plan, softcap=2.0, sinks=torch.randn(4), mask=Mask(causal=True))
    yield "causal", plain(mask=Mask(causal=True))
    yield "causal top left", plain(mask=Mask(causal=True, offset=0))
    yield "causal, more queries than keys", plain(sizes={"q_len": 7, "k_len": 4}, mask=Mask(causal=True))
    yield "window", plain(mask=Mask(left=1, right=2))
    yield "window top left, one side", plain(mask=Mask(left=2, offset=0))
    yield "boolean", plain(mask=Mask(boolean=boolean, causal=True), plan=Plan(bias=additive))
    lengths, starts = torch.tensor([4, 2], dtype=torch.int32), torch.tensor([0, 2])
    for offset in (None, 0, 2, torch.tensor([1, 3])):
        for k_starts in (None, starts):
            mask = Mask(causal=True, left=2, offset=offset, k_lengths=lengths, k_starts=k_starts)
            name = f"k_lengths offset={offset} k_starts={k_starts}"
            yield name, plain(mask=mask, plan=Plan(bias=additive))
    cu_q, cu_k = torch.tensor([0, 2, 2, 5]), torch.tensor([0, 3, 4, 7])
    documents = Mask(causal=True, right=0, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    yield "documents", plain(sizes={"batch": 1}, mask=documents, plan=Plan(bias=additive))
    positions = {"q_positions": torch.randint(-3, 12, (2, 5)), "k_positions": torch.randint(-3, 12, (1, 7))}
    yield "explicit positions", plain(plan=Plan(bias=additive), mask=Mask(causal=True), **positions)


@pytest.mark.parametrize(("name", "call"), list(cases()), ids=[name for name, _ in cases()])
def test_equals_the_loop(name, call):
    out, lse = reference.forward(call)
    expected_out, expected_lse = loop_forward(call)
    torch.testing.assert_close(out, expected_out, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
def test_equals_torch(causal):
    q, k, v = tensors(k_len=5)
    out, _ = reference.forward(Call(q, k, v, Plan(), Mask(causal=causal), scale=6**-0.5))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(out, expected)


def test_rows_without_keys_are_zero_with_zero_gradients():
    q, k, v = (x.requires_grad_() for x in tensors())
    slope = torch.rand(4, dtype=WIDE, requires_grad=True)
    boolean = torch.ones(1, 1, 5, 7, dtype=torch.bool)
    boolean[..., 2, :] = False
    call = Call(q, k, v, Plan(bias=Bias(slope=Slope(slope))), Mask(boolean=boolean), scale=0.4)
    out, lse = reference.forward(call)
    assert (out[:, :, 2] == 0).all()
    assert (lse[:, :, 2] == -INF).all()
    (out.square().sum() + lse[lse > -INF].sum()).backward()
    assert (q.grad[:, :, 2] == 0).all()
    for x in (q, k, v, slope):
        assert x.grad.isfinite().all()


def test_no_row_has_a_key():
    q, k, v = (x.requires_grad_() for x in tensors())
    out, lse = reference.forward(Call(q, k, v, Plan(), Mask(k_lengths=torch.tensor([0, 0])), scale=0.4))
    assert (out == 0).all()
    assert (lse == -INF).all()
    out.sum().backward()
    for x in (q, k, v):
        assert (x.grad == 0).all()


def test_a_row_with_a_sink_and_no_key_gives_zero_and_the_sink():
    sinks = torch.randn(4, dtype=WIDE)
    out, lse = reference.forward(plain(sinks=sinks, mask=Mask(k_lengths=torch.tensor([0, 3]))))
    assert (out[0] == 0).all()
    torch.testing.assert_close(lse[0], sinks[:, None].expand(4, 5))


def test_padding_of_a_cache_is_never_looked_at():
    q, k, v = tensors()
    k[:, :, 4:], v[:, :, 4:] = float("nan"), INF
    k.requires_grad_(), v.requires_grad_(), q.requires_grad_()
    call = Call(q, k, v, Plan(), Mask(causal=True, k_lengths=torch.tensor([4, 3])), scale=0.4)
    out, lse = reference.forward(call)
    (out.sum() + lse[lse > -INF].sum()).backward()
    for x in (out, q.grad, k.grad, v.grad):
        assert x.isfinite().all()


@pytest.mark.parametrize(("q_len", "k_len"), [(0, 4), (3, 0), (0, 0)])
def test_nothing_to_attend(q_len, k_len):
    sizes = {"q_len": q_len, "k_len": k_len}
    additive = Bias(slope=Slope(torch.rand(4, dtype=WIDE)), table=Table(torch.rand(4, 1, dtype=WIDE), 0))
    for options in ({}, {"mask": Mask(causal=True)}, {"plan": Plan(bias=additive)}):
        out, lse = reference.forward(plain(sizes=sizes, **options))
        assert out.shape == (2, 4, q_len, 3)
        assert (out == 0).all()
        assert (lse == -INF).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    q, k, v = tensors(dtype=dtype)
    call = Call(q, k, v, Plan(bias=bias(4, 5, 7)), Mask(causal=True), scale=0.4)
    out, lse = reference.forward(call)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact, exact_lse = reference.forward(replace(call, q=q.double(), k=k.double(), v=v.double()))
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=tolerance, atol=tolerance)


def test_philox_gives_the_published_words():
    """Known answers of Random123 (kat_vectors, philox 4x32 10)."""
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    answers = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]
    for counter, key, words in answers:
        assert tuple(int(x) for x in reference.philox_4x32_10(tuple(torch.tensor(c) for c in counter), key)) == words


def scalar_philox(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(high >> 32) ^ c[1] ^ k[0], high % 2**32, (low >> 32) ^ c[3] ^ k[1], low % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_dropout_keeps_the_elements_that_the_generator_says(p):
    seed = 0x0123456789ABCDEF
    q, k, _ = tensors()
    value = torch.eye(7, dtype=WIDE).expand(2, 2, 7, 7)
    call = Call(q, k, value, Plan(), Mask(), scale=0.4, dropout_p=p, seed=torch.tensor([seed]))
    weights, lse = reference.forward(call)
    whole, whole_lse = reference.forward(replace(call, dropout_p=0.0))
    torch.testing.assert_close(lse, whole_lse)
    for b in range(2):
        for h in range(4):
            for i in range(5):
                for j in range(7):
                    words = scalar_philox((j >> 2, i, b * 4 + h, 0), (seed % 2**32, seed >> 32))
                    expected = whole[b, h, i, j] / (1 - p) if words[j & 3] >= p * 2**32 else 0.0
                    assert float(weights[b, h, i, j]) == pytest.approx(float(expected), rel=1e-12)


def test_dropout_needs_a_seed():
    with pytest.raises(ValueError, match=r"seed: expected an int64"):
        reference.forward(plain(dropout_p=0.5))


def test_gradients_of_every_operand():
    torch.manual_seed(3)
    q, k, v = tensors(batch=1, heads=2, kv_heads=1, q_len=3, k_len=4, dim=4, v_dim=2)
    turn = rotary(3, 4, 2, False)
    turn = Rotary(turn.q_cos[:1], turn.q_sin[:1], turn.k_cos, turn.k_sin)
    inner = bias(2, 3, 4)
    m = mix(2, 3, "concat-residual", inner)
    sinks = torch.randn(2, dtype=WIDE)

    def run(q, k, v, slope, values, psi, row_scale, a, c, dense, w1, b1, w2, b2, sinks):
        f = replace(inner.profile, psi=psi, row_scale=row_scale, segment_slope=a, segment_intercept=c)
        additive = Bias(Slope(slope), Table(values, -2), f, Dense(dense))
        plan = Plan(turn, HeadMix(w1, b1, w2, b2, m.form, additive), Bias(table=Table(values, -2)))
        mask = Mask(causal=True, left=2)
        seed = torch.tensor([11])
        return reference.forward(Call(q, k, v, plan, mask, 0.5, softcap=3.0, sinks=sinks, dropout_p=0.25, seed=seed))

    f = inner.profile
    operands = [
        inner.slope.slope,
        inner.table.values,
        f.psi,
        f.row_scale,
        f.segment_slope,
        f.segment_intercept,
        inner.dense.bias,
    ]
    leaves = [x.clone().requires_grad_() for x in (q, k, v, *operands, m.w1, m.b1, m.w2, m.b2, sinks)]
    assert torch.autograd.gradcheck(run, leaves)


def test_an_empty_bias_is_an_error():
    with pytest.raises(ValueError, match="at least one operand"):
        reference.dense_bias(Bias(), torch.arange(3)[None], torch.arange(3)[None])
