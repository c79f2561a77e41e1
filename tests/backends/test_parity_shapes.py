"""Shapes and strides on every backend: every length around the tile sizes, head dimensions, views, and hypothesis."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import posattn
from posattn.parity import examples, positions_for
from tests.tolerance import assert_parity

pytestmark = pytest.mark.usefixtures("poisoned")

# A whole period of every tile size in use (16, 32, 64), and the edges of the largest (128).
LENGTHS = (*range(1, 66), 79, 80, 81, 95, 96, 97, 112, 127, 128, 129, 130, 191, 192, 193, 255, 256, 257)


def randn(place, *shape, dtype=torch.float32):
    return torch.randn(shape).to(place[0], dtype)


@pytest.mark.parametrize("name", ["ALiBi learnable", "Kerple", "DAPE-Kerple"])
@pytest.mark.parametrize("start", range(0, len(LENGTHS), 16))
def test_every_length_modulo_the_tiles(place, name, start):
    """Several lengths a test, with a small head dimension, so that the sweep takes seconds."""
    position = examples(2, 8, 260)[name].to(place[0])
    for tokens in LENGTHS[start : start + 16]:
        q, k, v = (randn(place, 1, 2, tokens, 8) for _ in range(3))
        assert_parity(q, k, v, position, {"causal": True}, place[1])


@pytest.mark.parametrize("k_len", [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 300])
def test_decoding(place, k_len):
    """One query against a cache: the last row of the full call."""
    q, k, v = randn(place, 3, 4, 1, 16), randn(place, 3, 2, k_len, 16), randn(place, 3, 2, k_len, 16)
    position = posattn.RoPE(16) + posattn.Kerple(4)
    assert_parity(q, k, v, position.to(place[0]), {"causal": True}, place[1])


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 8, 15, 16, 17, 31, 40, 64, 80, 96, 127, 128, 200, 255, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_head_dimensions(place, dim, dtype):
    q, k, v = (randn(place, 1, 2, 35, dim, dtype=dtype) for _ in range(3))
    assert_parity(q, k, v, posattn.Kerple(2).to(place[0]), {"causal": True}, place[1])


@pytest.mark.parametrize(("dim", "value_dim"), [(16, 1), (1, 16), (24, 40), (64, 128), (192, 128)])
def test_value_dimension_that_differs(place, dim, value_dim):
    q, k, v = randn(place, 1, 4, 35, dim), randn(place, 1, 2, 35, dim), randn(place, 1, 2, 35, value_dim)
    assert_parity(q, k, v, posattn.ALiBi(4).to(place[0]), {"causal": True}, place[1])


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (4, 2), (6, 3), (8, 1), (12, 4)])
@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "DAPE"])
def test_grouped_heads(place, heads, kv_heads, mixed):
    q, k, v = randn(place, 2, heads, 21, 16), randn(place, 2, kv_heads, 29, 16), randn(place, 2, kv_heads, 29, 16)
    position = posattn.Kerple(heads)
    position = posattn.DAPE(position, heads) if mixed else position
    assert_parity(q, k, v, position.to(place[0]), {"causal": True}, place[1])


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "q_len", "k_len"),
    [(0, 2, 2, 3, 5), (1, 0, 0, 3, 5), (1, 0, 2, 3, 5), (1, 2, 2, 0, 5), (1, 2, 2, 3, 0), (1, 2, 2, 0, 0)],
)
def test_calls_without_logits(place, batch, heads, kv_heads, q_len, k_len):
    """No batch, heads, queries or keys: outputs may be empty, and gradients of what nothing read are zero."""
    q, k, v = randn(place, batch, heads, q_len, 16), *(randn(place, batch, kv_heads, k_len, 16) for _ in range(2))
    assert_parity(q, k, v, posattn.Kerple(heads).to(place[0]) if heads else None, {"causal": True}, place[1])


VIEWS = {
    "tokens before heads": lambda place, dtype: randn(place, 2, 33, 4, 16, dtype=dtype).transpose(1, 2),
    "packed qkv": lambda place, dtype: randn(place, 2, 33, 3, 4, 16, dtype=dtype)[:, :, 1].transpose(1, 2),
    "every second dimension": lambda place, dtype: randn(place, 2, 4, 33, 32, dtype=dtype)[..., ::2],
    "transposed matrix": lambda place, dtype: randn(place, 2, 4, 16, 33, dtype=dtype).transpose(2, 3),
    "one row repeated": lambda place, dtype: randn(place, 2, 4, 1, 16, dtype=dtype).expand(-1, -1, 33, -1),
    "one head repeated": lambda place, dtype: randn(place, 2, 1, 33, 16, dtype=dtype).expand(-1, 4, -1, -1),
    "one sequence repeated": lambda place, dtype: randn(place, 1, 4, 33, 16, dtype=dtype).expand(2, -1, -1, -1),
    "odd storage offset": lambda place, dtype: randn(place, 2 * 4 * 33 * 16 + 3, dtype=dtype)[3:].view(2, 4, 33, 16),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views(place, view, dtype):
    q, k, v = (view(place, dtype) for _ in range(3))
    assert_parity(q, k, v, posattn.RoPE(16).to(place[0]), {"causal": True}, place[1])


def test_output_gradient_with_any_strides(place):
    q, k, v = (randn(place, 2, 4, 33, 16).requires_grad_() for _ in range(3))
    out = posattn.attention(q, k, v, causal=True, backend=place[1])
    grad = randn(place, 2, 16, 4, 33).permute(0, 2, 3, 1)
    strided = torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
    plain = torch.autograd.grad(out, (q, k, v), grad.contiguous(), retain_graph=True)
    expanded = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    ones = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    for a, b in zip((*strided, *expanded), (*plain, *ones)):
        assert torch.equal(a, b)


@st.composite
def calls(draw):
    heads = draw(st.integers(1, 6))
    kv_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    q_len, k_len = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    options = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        side = st.none() | st.integers(0, 40)
        options["window"] = (draw(side), draw(side))
    if draw(st.booleans()):
        options["softcap"] = draw(st.floats(0.5, 30.0))
    if draw(st.booleans()):
        options["dropout_p"] = draw(st.floats(0.05, 0.9))
    options["wants"] = draw(st.sets(st.sampled_from(["sinks", "mask", "bias", "k_lengths"])))
    return {
        "batch": draw(st.integers(1, 3)),
        "heads": heads,
        "kv_heads": kv_heads,
        "q_len": q_len,
        "k_len": k_len,
        "dim": draw(st.sampled_from([4, 8, 13, 16, 20, 32])),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "which": draw(st.integers(0, 10_000)),
        "seed": draw(st.integers(0, 1000)),
        "options": options,
    }


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(calls())
def test_any_call(place, call):
    torch.manual_seed(call["seed"])
    batch, heads, q_len, k_len, dim = (call[n] for n in ("batch", "heads", "q_len", "k_len", "dim"))
    catalogue = {
        name: position
        for name, position in (examples(heads, dim, 90) if dim % 4 == 0 else {"ALiBi": posattn.ALiBi(heads)}).items()
        if not name.startswith(("RelativeTable2D", "RelativeTable3D"))
    }
    name = sorted(catalogue)[call["which"] % len(catalogue)]
    position = catalogue[name].to(place[0])
    options = dict(call["options"])
    wants = options.pop("wants")
    if position.needs_positions:
        wants.discard("k_lengths")
        options.update({n: p.to(place[0]) for n, p in positions_for(position, q_len, k_len).items()})
    if "sinks" in wants:
        options["sinks"] = randn(place, heads)
    if "mask" in wants:
        options["mask"] = (torch.rand(batch, 1, q_len, k_len) < 0.7).to(place[0])
    if "bias" in wants:
        options["bias"] = randn(place, 1, heads, q_len, k_len)
    if "k_lengths" in wants:
        options["k_lengths"] = torch.randint(0, k_len + 1, (batch,)).to(place[0])
    q = randn(place, batch, heads, q_len, dim, dtype=call["dtype"])
    k = randn(place, batch, call["kv_heads"], k_len, dim, dtype=call["dtype"])
    v = randn(place, batch, call["kv_heads"], k_len, dim, dtype=call["dtype"])
    assert_parity(q, k, v, position, options, place[1], seed=call["seed"])
