"""The operators under opcheck, torch.compile, torch.export, functorch, checkpointing and tensor subclasses."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

import pytest
import torch
from torch import nn

import posattn
from posattn import ops
from posattn.encodings.base import Context
from posattn.parity import examples, positions_for
from posattn.plan import Bias, Call, Dense, HeadMix, Mask, Plan, Profile, Rotary, Slope, Table
from posattn.serialize import flatten, parse, unflatten

HEADS, DIM, TOKENS = 4, 8, 20


def qkv(tokens=TOKENS, batch=2, requires_grad=True):
    return [torch.randn(batch, HEADS, tokens, DIM, requires_grad=requires_grad) for _ in range(3)]


def full_call():
    """A call with every operand that one call can have."""
    q, k, v = qkv()
    position = posattn.RoPE(DIM) + posattn.DAPE(posattn.FIRE(HEADS) + posattn.T5Bias(HEADS), HEADS, width=5)
    position = position + posattn.ALiBi(HEADS, learnable=True)
    mask = Mask(
        causal=True,
        left=9,
        boolean=torch.rand(2, 1, TOKENS, TOKENS) < 0.8,
        k_lengths=torch.tensor([20, 13], dtype=torch.int32),
        k_starts=torch.tensor([0, 4], dtype=torch.int32),
        offset=torch.tensor([-3, 2], dtype=torch.int32),
        offset_range=(-3, 2),
        max_q=TOKENS,
        max_k=TOKENS,
    )
    plan = position.lower(Context.of(q, k, mask))
    dense = Dense(torch.randn(1, HEADS, TOKENS, TOKENS, requires_grad=True))
    plan = Plan(plan.rotary, plan.mix, Bias(plan.bias.slope, plan.bias.table, plan.bias.profile, dense))
    return Call(
        q=q,
        k=k,
        v=v,
        plan=plan,
        mask=mask,
        scale=0.3,
        softcap=5.0,
        sinks=torch.randn(HEADS, requires_grad=True),
        dropout_p=0.2,
        seed=torch.tensor([7]),
        deterministic=True,
    )


def small_calls():
    q, k, v = qkv()
    mask = Mask(causal=True, max_q=TOKENS, max_k=TOKENS)
    for name in ("RoPE", "ALiBi learnable", "Kerple", "FIRE", "DAPE-Kerple", "DAPE-RoPE-FIRE"):
        plan = examples(HEADS, DIM, TOKENS)[name].lower(Context.of(q, k, mask))
        # The operators take leaves; a plan's operands are computed from the parameters.
        call = Call(q=q, k=k, v=v, plan=plan, mask=mask, scale=0.3)
        yield name, call
    yield "nothing", Call(q=q, k=k, v=v, plan=Plan(bias=Bias()), mask=mask, scale=0.3)
    yield "every operand", full_call()


def arguments(call):
    flat = flatten(call, "cpu")
    operands = [x.detach().requires_grad_(x.requires_grad) for x in flat.operands]
    return (call.q, call.k, call.v, operands, flat.ints, call.scale, call.softcap, call.dropout_p, flat.spec)


def bias_of_its_own(signed, first):
    """Every operand, each a tensor that no other field holds."""
    slope, table, psi, rows, knots, steep, level, dense = (torch.randn(1, 1) for _ in range(8))
    profile = Profile(psi, first + 1, rows, first + 2, knots, steep, level)
    return Bias(Slope(slope, signed), Table(table, first), profile, Dense(dense))


def call_of_its_own(flag, form):
    """No two fields are equal; no kernel could run it."""
    q, k, v, *turns, w1, b1, w2, b2 = (torch.randn(1, 1) for _ in range(11))
    boolean, lengths, starts, cu_q, cu_k, sinks, q_at, k_at, seed = (torch.randn(1, 1) for _ in range(9))
    offset, known = (torch.randn(1, 1), (-6, 8)) if flag else (-4, None)
    mix = HeadMix(w1, b1, w2, b2, form, bias_of_its_own(not flag, -7))
    return Call(
        q=q,
        k=k,
        v=v,
        plan=Plan(Rotary(*turns, flag), mix, bias_of_its_own(flag, -12)),
        mask=Mask(flag, offset, 3, 5, boolean, lengths, starts, cu_q, cu_k, 17, 19, known),
        scale=0.25,
        softcap=2.0,
        sinks=sinks,
        q_positions=q_at,
        k_positions=k_at,
        dropout_p=0.2,
        seed=seed,
        deterministic=flag,
        scale_tensor=torch.tensor(0.25),
        tokens_first=not flag,
    )


def parts(value, name="call"):
    """Its fields and theirs by name; a tensor is known by itself, not by its values."""
    if isinstance(value, torch.Tensor):
        yield name, id(value)
    elif is_dataclass(value):
        for field in fields(value):
            yield from parts(getattr(value, field.name), f"{name}.{field.name}")
    else:
        yield name, value


CALLS = {
    "flags": lambda: call_of_its_own(True, "add"),
    "other flags": lambda: call_of_its_own(False, "concat"),
    "every operand": full_call,
    "nothing": lambda: Call(q=(x := torch.randn(1)), k=x, v=x, plan=Plan(), mask=Mask(max_q=4, max_k=6), scale=0.3),
    "closest window": lambda: Call(
        q=(x := torch.randn(1)), k=x, v=x, plan=Plan(), mask=Mask(left=0, right=0), scale=1.0
    ),
}


@pytest.mark.parametrize("made", CALLS.values(), ids=CALLS)
def test_a_call_survives_flattening(made):
    call = made()
    flat = flatten(call, "auto")
    scale = call.scale if call.scale_tensor is None else 0.0  # the tensor counts
    again = unflatten(call.q, call.k, call.v, flat.operands, flat.ints, scale, call.softcap, call.dropout_p, flat.spec)
    assert dict(parts(again)) == dict(parts(call))
    assert parse(flat.spec).backend == "auto"


@pytest.mark.parametrize("name", [name for name, _ in small_calls()])
def test_opcheck(name):
    call = dict(small_calls())[name]
    inputs = arguments(call)
    torch.library.opcheck(torch.ops.posattn.attention_forward.default, inputs)
    out, lse = torch.ops.posattn.attention_forward(*inputs)
    wanted = [
        n for n, x in zip(("q", "k", "v", *parse(inputs[-1]).names), (*inputs[:3], *inputs[3])) if x.requires_grad
    ]
    grads = (torch.randn_like(out), torch.randn_like(lse).masked_fill(lse.isinf(), 0.0))
    # Its derivative is an error by design, so what opcheck does with gradients cannot apply.
    detached = [
        [t.detach() for t in x] if isinstance(x, list) and x and isinstance(x[0], torch.Tensor) else x for x in inputs
    ]
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in detached]
    torch.library.opcheck(
        torch.ops.posattn.attention_backward.default,
        (*detached, out.detach(), lse.detach(), *grads, ",".join(wanted)),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


class Layer(nn.Module):
    def __init__(self, position, **options):
        super().__init__()
        self.project = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)
        self.position = position
        self.options = options

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
        out, lse = posattn.attention(q, k, v, self.position, return_lse=True, **self.options)
        return out.transpose(1, 2).flatten(2), lse


def run(layer, module, x):
    torch.manual_seed(4)
    out, lse = layer(x)
    loss = out.square().sum() + lse.sum()
    grads = torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])
    return [out.detach(), lse.detach(), *grads]


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


COMPILED = [name for name in examples(HEADS, DIM, TOKENS) if "BiPE" not in name]


@pytest.mark.parametrize("name", COMPILED)
def test_compile_a_layer_forward_and_backward(name):
    """Every encoding traces whole; aot_eager runs the traced graphs without the compiler behind it."""
    torch._dynamo.reset()
    layer = Layer(examples(HEADS, DIM, TOKENS)[name], causal=True)
    x = torch.randn(2, TOKENS, HEADS * DIM)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, layer, x), run(layer, layer, x))


def test_compile_with_options_and_dropout():
    torch._dynamo.reset()
    layer = Layer(
        posattn.Kerple(HEADS),
        causal=True,
        window=(7, 0),
        softcap=4.0,
        dropout_p=0.3,
        sinks=torch.randn(HEADS),
        mask=torch.rand(TOKENS, TOKENS) < 0.9,
        bias=torch.randn(HEADS, 1, TOKENS),
        k_lengths=torch.tensor([20, 11]),
    )
    x = torch.randn(2, TOKENS, HEADS * DIM)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, layer, x), run(layer, layer, x))


@pytest.mark.slow
def test_compile_with_inductor():
    torch._dynamo.reset()
    layer = Layer(posattn.RoPE(DIM) + posattn.FIRE(HEADS), causal=True)
    x = torch.randn(2, TOKENS, HEADS * DIM)
    assert_same(run(torch.compile(layer, fullgraph=True), layer, x), run(layer, layer, x))


def test_compile_serves_new_lengths_with_one_dynamic_graph():
    torch._dynamo.reset()
    layer = Layer(posattn.Kerple(HEADS), causal=True)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for tokens in (12, 17, 23, 40):
        x = torch.randn(2, tokens, HEADS * DIM)
        assert_same(run(compiled, layer, x), run(layer, layer, x))
    assert counter.frame_count <= 2  # the first length alone, then any length


def test_compile_scaled_dot_product_attention():
    torch._dynamo.reset()
    q, k, v = qkv()
    alibi = posattn.ALiBi(HEADS)

    def call(q, k, v, mask):
        return posattn.scaled_dot_product_attention(q, k, v, mask, position=alibi)

    mask = torch.randn(TOKENS, TOKENS)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, mask), call(q, k, v, mask))


def test_compile_under_autocast():
    torch._dynamo.reset()
    layer = Layer(posattn.FIRE(HEADS), causal=True)
    x = torch.randn(2, TOKENS, HEADS * DIM)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = compiled(x), layer(x)
    assert got[0].dtype == torch.bfloat16
    torch.testing.assert_close(got, expected)


def test_compile_float64_through_the_reference():
    torch._dynamo.reset()
    layer = Layer(posattn.Kerple(HEADS), causal=True).double()
    x = torch.randn(2, TOKENS, HEADS * DIM, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, layer, x), run(layer, layer, x))


def test_export():
    layer = Layer(posattn.RoPE(DIM) + posattn.Kerple(HEADS), causal=True).eval()
    x = torch.randn(2, TOKENS, HEADS * DIM)
    program = torch.export.export(layer, (x,))
    assert "posattn.attention_forward" in str(program.graph)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_eager_and_operator_are_the_same_computation(monkeypatch):
    q, k, v = qkv()
    position = posattn.DAPE(posattn.FIRE(HEADS), HEADS)
    leaves = (q, k, v, *position.parameters())

    def call():
        out, lse = posattn.attention(q, k, v, position, causal=True, return_lse=True)
        return out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)

    eager = call()
    monkeypatch.setattr(ops, "_needs_dispatcher", lambda tensors: True)
    assert all(torch.equal(a, b) for a, b in zip(eager, call()))


def test_functorch_grad_and_vmap():
    q, k, v = qkv(requires_grad=False)
    bias = torch.randn(HEADS, TOKENS, TOKENS)

    def loss(q, bias):
        out, lse = posattn.attention(q, k, v, posattn.ALiBi(HEADS), bias=bias, causal=True, return_lse=True)
        return out.square().sum() + lse.sum()

    batch = torch.randn(3, *q.shape)
    per_example = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(batch, bias)
    for i in range(3):
        leaves = batch[i].clone().requires_grad_(), bias.clone().requires_grad_()
        expected = torch.autograd.grad(loss(*leaves), leaves)
        for got, want in zip(per_example, expected):
            torch.testing.assert_close(got[i], want)


@pytest.mark.parametrize("dim", [1, 2, -1])
def test_vmap_over_another_dimension(dim):
    """With a gradient, whose rule runs over the saved tensors' dimensions, and with and without the log-sum-exp."""
    q, k, v = (torch.randn(HEADS, TOKENS, DIM, 3).movedim(-1, dim) for _ in range(3))
    bias = torch.randn(3, TOKENS, TOKENS)

    def loss(q, k, v, bias):
        out, lse = posattn.attention(q[None], k[None], v[None], bias=bias, causal=True, return_lse=True)
        return out.square().sum() + 3 * lse.sum()

    def alone(x, i):
        return x.select(dim, i).clone()

    dims = (dim, dim, dim, 0)
    losses = torch.func.vmap(loss, in_dims=dims)(q, k, v, bias)
    grads = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)), in_dims=dims)(q, k, v, bias)
    for i in range(3):
        leaves = [x.requires_grad_() for x in (alone(q, i), alone(k, i), alone(v, i), bias[i].clone())]
        expected = loss(*leaves)
        torch.testing.assert_close(losses[i], expected.detach())
        for got, want in zip(grads, torch.autograd.grad(expected, leaves)):
            torch.testing.assert_close(got[i], want)


def test_functional_call_over_parameters():
    q, k, v = qkv(requires_grad=False)
    layer = posattn.DAPE(posattn.Kerple(HEADS), HEADS)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = layer

        def forward(self):
            return posattn.attention(q, k, v, self.position, causal=True).square().sum()

    net = Net()
    grads = torch.func.grad(lambda state: torch.func.functional_call(net, state, ()))(dict(net.named_parameters()))
    expected = torch.autograd.grad(net(), tuple(net.parameters()))
    for got, want in zip(grads.values(), expected):
        torch.testing.assert_close(got, want)


def test_second_derivatives_are_an_error_that_says_so():
    q, k, v = qkv()
    first = torch.autograd.grad(posattn.attention(q, k, v).sum(), q, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        first.sum().backward()


def test_forward_mode_is_an_error_that_says_so():
    q, k, v = qkv(requires_grad=False)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda q: posattn.attention(q, k, v), (q,), (q,))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_draws_the_same_dropout(use_reentrant):
    q, k, v = qkv()

    def call(q, k, v):
        return posattn.attention(q, k, v, posattn.ALiBi(HEADS), causal=True, dropout_p=0.3)

    torch.manual_seed(1)
    plain = torch.autograd.grad(call(q, k, v).square().sum(), (q, k, v))
    torch.manual_seed(1)
    out = torch.utils.checkpoint.checkpoint(call, q, k, v, use_reentrant=use_reentrant)
    q.grad = k.grad = v.grad = None
    out.square().sum().backward()
    for leaf, want in zip((q, k, v), plain):
        torch.testing.assert_close(leaf.grad, want)


def test_fake_tensors_give_shapes_and_dtypes():
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(2, 4, 5, 8, dtype=torch.bfloat16)
        k, v = torch.empty(2, 2, 7, 8, dtype=torch.bfloat16), torch.empty(2, 2, 7, 3, dtype=torch.bfloat16)
        out, lse = posattn.attention(q, k, v, return_lse=True)
    assert (out.shape, out.dtype) == ((2, 4, 5, 3), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 4, 5), torch.float32)


def test_meta_tensors_give_shapes_and_dtypes():
    q = torch.empty(2, 4, 5, 8, dtype=torch.float16, device="meta")
    out, lse = posattn.attention(q, q, q, posattn.RoPE(8) + posattn.ALiBi(4).to("meta"), causal=True, return_lse=True)
    assert out.is_meta
    assert lse.is_meta
    assert (out.shape, out.dtype, lse.dtype) == (q.shape, torch.float16, torch.float32)


def test_jit_trace_is_an_error_that_says_so():
    with (
        pytest.raises(NotImplementedError, match="cannot be traced by torch"),
        pytest.warns(torch.jit.TracerWarning),
    ):
        torch.jit.trace(lambda q: posattn.attention(q, q, q), torch.randn(1, 2, 3, 8))


def test_explicit_positions_compile_where_the_lowering_needs_no_bounds():
    torch._dynamo.reset()
    rope = posattn.RoPE(DIM)
    q, k, v = qkv()
    places = torch.arange(TOKENS) * 2

    def call(q, k, v, places):
        return posattn.attention(q, k, v, rope, q_positions=places, k_positions=places, causal=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, places), call(q, k, v, places))


def test_positions_for_covers_the_encodings_that_need_them():
    needy = [position for position in examples(HEADS, DIM, TOKENS).values() if position.needs_positions]
    assert needy
    assert all(positions_for(position, 3, 5).keys() == {"q_positions", "k_positions"} for position in needy)
