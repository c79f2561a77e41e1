"""nn.Attention beside plain torch, and step by step beside at once, with every cache."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import posattn
from posattn.nn import Attention, DynamicCache, KVCache, PagedCache, StaticCache

B, DIM, HEADS, KV_HEADS, HEAD_DIM, T = 2, 24, 4, 2, 8, 11

CACHES: dict[str, Callable[[], KVCache]] = {
    "dynamic": DynamicCache,
    "static": lambda: StaticCache(B, KV_HEADS, 20, HEAD_DIM),
    "paged": lambda: PagedCache(20, 3, B, KV_HEADS, HEAD_DIM),
}


@pytest.fixture(params=CACHES.values(), ids=CACHES)
def cache(request: pytest.FixtureRequest) -> KVCache:
    return request.param()  # type: ignore[no-any-return]


def layer(**options: Any) -> Attention:
    position = posattn.RoPE(HEAD_DIM) + posattn.Kerple(HEADS)
    given = {"kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "position": position, "causal": True, **options}
    return Attention(DIM, HEADS, **given)


def by_hand(module: Attention, x: Tensor, memory: Tensor | None = None, causal: bool = True) -> Tensor:
    """The layer in plain torch, without a position."""
    source = x if memory is None else memory

    def heads(projected: Tensor, norm: Any) -> Tensor:
        h = projected.unflatten(-1, (-1, module.head_dim))
        return (h if norm is None else F.rms_norm(h, (module.head_dim,), norm.weight, 1e-6)).transpose(1, 2)

    q, k = heads(module.q_proj(x), module.q_norm), heads(module.k_proj(source), module.k_norm)
    v = heads(module.v_proj(source), None)
    k, v = (t.repeat_interleave(module.heads // module.kv_heads, 1) for t in (k, v))
    logits = q @ k.transpose(-1, -2) / module.head_dim**0.5
    if causal:
        logits = logits.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -torch.inf)
    if module.sinks is not None:
        sink = module.sinks[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], -1)
    w = logits.softmax(-1)[..., : source.shape[1]]
    return module.o_proj((w @ v).transpose(1, 2).flatten(2))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True},
        {"bias": True, "out_bias": False},
        {"qk_norm": True},
        {"sinks": True},
        {"kv_heads": None, "head_dim": None},
        {"kv_heads": 1},
    ],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_plain_torch(options: dict[str, Any]) -> None:
    dim_of = {"kv_heads": KV_HEADS, "head_dim": HEAD_DIM, **options}
    module = Attention(DIM, HEADS, causal=True, **dim_of)
    assert (module.o_proj.bias is None) == (not options.get("out_bias", options.get("bias", False)))
    for name, parameter in module.named_parameters():
        if "norm" in name or name == "sinks":
            torch.nn.init.normal_(parameter, 0.5)
    x = torch.randn(B, T, DIM, requires_grad=True)
    grad = torch.randn(B, T, DIM)
    got, expected = module(x), by_hand(module, x)
    close(got, expected)
    leaves = [x, *module.parameters()]
    for a, b in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(expected, leaves, grad)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_options_reach_attention() -> None:
    module = layer(window=(3, 0), scale=0.3, softcap=2.0)
    x, bias = torch.randn(B, T, DIM), torch.randn(HEADS, T, T)
    mask = torch.rand(B, 1, T, T) > 0.3
    q, k, v = (
        p(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj)
    )
    out = posattn.attention(
        q, k, v, module.position, causal=True, window=(3, 0), scale=0.3, softcap=2.0, bias=bias, mask=mask
    )
    assert torch.equal(module(x, bias=bias, mask=mask), module.o_proj(out.transpose(1, 2).flatten(2)))


@torch.no_grad()
def test_step_by_step_is_the_whole(cache: KVCache) -> None:
    module = layer(qk_norm=True, sinks=True)
    x = torch.randn(B, T, DIM)
    outs = [module(part, cache=cache) for part in x.split([4, 1, 1, 3, 1, 1], 1)]
    close(torch.cat(outs, 1), module(x))


@torch.no_grad()
def test_paged_rows_come_and_go() -> None:
    """Two sequences of a pool of three rows, of which one begins where the other does."""
    module = layer()
    x = torch.randn(2, T, DIM)
    x[1, :5] = x[0, :5]
    pool = PagedCache(20, 4, 3, KV_HEADS, HEAD_DIM)
    module(x[:1, :5], cache=pool.select([2]))
    pool.share(2, 0)
    both = pool.select([2, 0])
    outs = [module(x[:, t : t + 1], cache=both) for t in range(5, T)]
    close(torch.cat(outs, 1), module(x)[:, 5:])


@torch.no_grad()
def test_explicit_positions(cache: KVCache) -> None:
    module = layer(position=posattn.BiPE(posattn.ALiBi(HEADS), DIM, 3))
    x, at = torch.randn(B, T, DIM), torch.arange(T) // 3
    whole = module(x, positions=at)
    if not isinstance(cache, DynamicCache):
        options = {"positions": True}
        sizes = (B, KV_HEADS, 20, HEAD_DIM) if isinstance(cache, StaticCache) else (20, 3, B, KV_HEADS, HEAD_DIM)
        cache = type(cache)(*sizes, **options)
    parts = [module(x[:, a:b], cache=cache, positions=at[a:b]) for a, b in ((0, 6), (6, 7), (7, T))]
    close(torch.cat(parts, 1), whole)


def test_rows_of_documents() -> None:
    module = layer()
    x = torch.randn(B, T, DIM)
    segments = torch.tensor([[0] * 4 + [1] * 7, [5] * 10 + [-1]])
    got = module(x, segments=segments)
    close(got[:1], torch.cat([module(x[:1, :4]), module(x[:1, 4:])], 1))
    close(got[1:, :10], module(x[1:, :10]))


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_padding_on_the_right(causal: bool) -> None:
    module = layer(causal=causal)
    x = torch.randn(B, T, DIM)
    got = module(x, lengths=torch.tensor([T, 4]))
    assert got.isfinite().all()
    close(got[:1], module(x[:1]))
    close(got[1:, :4], module(x[1:, :4]))


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_padding_on_the_left(causal: bool) -> None:
    module = layer(causal=causal)
    x = torch.randn(B, T, DIM)
    got = module(x, starts=torch.tensor([0, 5]))
    assert got.isfinite().all()
    close(got[:1], module(x[:1]))
    close(got[1:, 5:], module(x[1:, 5:]))


@torch.no_grad()
def test_ragged_prompts_and_steps(cache: KVCache) -> None:
    """Prompts padded on the right, a ragged chunk behind them, then steps: each row as if it were alone."""
    module = layer()
    x = torch.randn(B, 12, DIM)
    prompt = module(x[:, :5], cache=cache, lengths=torch.tensor([5, 2]))
    chunk = module(x[:, 5:9], cache=cache, lengths=torch.tensor([1, 4]))
    steps = [module(x[:, t : t + 1], cache=cache) for t in range(9, 12)]
    assert cache.lengths.tolist() == [9, 9]
    for b, (first, second) in enumerate([(5, 1), (2, 4)]):
        seen = [*range(first), *range(5, 5 + second), 9, 10, 11]
        alone = module(x[b : b + 1, seen])
        got = torch.cat([prompt[b, :first], chunk[b, :second], *(step[b] for step in steps)])
        close(got[None], alone)


@torch.no_grad()
def test_left_padded_steps(cache: KVCache) -> None:
    module = layer()
    x, starts = torch.randn(B, T, DIM), torch.tensor([3, 0])
    outs = [module(part, cache=cache, starts=starts) for part in x.split([5, 1, 3, 1, 1], 1)]
    close(torch.cat(outs, 1)[:1, 3:], module(x[:1, 3:]))
    close(torch.cat(outs, 1)[1:], module(x[1:]))


def test_packed_documents() -> None:
    module = layer()
    x = torch.randn(1, T, DIM)
    bounds = torch.tensor([0, 3, 4, T])
    got = module(x, cu_seqlens=bounds)
    close(got, torch.cat([module(x[:, a:b]) for a, b in pairwise(bounds)], 1))


@torch.no_grad()
def test_cross_attention_reads_a_memory_once(cache: KVCache) -> None:
    module = layer(cross=True, causal=False, memory_dim=10, position=None)
    x, memory = torch.randn(B, T, DIM), torch.randn(B, 7, 10)
    whole = module(x, memory)
    close(whole, by_hand(module, x, memory, causal=False))
    outs = [module(x[:, :4], memory, cache=cache)]
    outs += [module(x[:, t : t + 1], cache=cache) for t in range(4, T)]
    close(torch.cat(outs, 1), whole)
    with pytest.raises(ValueError, match="memory: expected None, for the cache holds one already"):
        module(x, memory, cache=cache)


@torch.no_grad()
def test_cross_attention_with_memories_of_their_own_lengths(cache: KVCache) -> None:
    module = layer(cross=True, causal=False, position=None)
    x, memory = torch.randn(B, T, DIM), torch.randn(B, 7, DIM)
    lengths = torch.tensor([7, 3])
    expected = torch.cat([module(x[:1], memory[:1]), module(x[1:], memory[1:, :3])])
    close(module(x, memory, lengths=lengths), expected)
    close(module(x, memory, lengths=lengths, cache=cache), expected)
    close(module(x, cache=cache), expected)


def test_packed_memories() -> None:
    module = layer(cross=True, causal=False, position=None)
    x, memory = torch.randn(1, 5, DIM), torch.randn(1, 9, DIM)
    got = module(x, memory, cu_seqlens=torch.tensor([0, 2, 5]), memory_cu_seqlens=torch.tensor([0, 6, 9]))
    close(got, torch.cat([module(x[:, :2], memory[:, :6]), module(x[:, 2:], memory[:, 6:])], 1))


def test_names_of_llama_and_a_state_dict_that_goes_round() -> None:
    module = layer(qk_norm=True, bias=True, sinks=True)
    names = {n.removesuffix(".weight").removesuffix(".bias") for n in module.state_dict()}
    assert names == {
        *(f"{p}_proj" for p in "qkvo"),
        *("q_norm", "k_norm", "sinks", "position.parts.1.p", "position.parts.1.a"),
    }
    x = torch.randn(B, T, DIM)
    other = layer(qk_norm=True, bias=True, sinks=True)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    for made in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(made(x), module(x))
    with torch.device("meta"):
        empty = layer(sinks=True)
    empty.to_empty(device="cpu")
    for part in empty.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    assert empty.sinks is not None
    assert (empty.sinks == 0).all()
    assert empty(x).isfinite().all()


def test_dropout_in_training_alone() -> None:
    module = layer(dropout=0.5)
    x = torch.randn(B, T, DIM)
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), module(x))


@torch.no_grad()
def test_a_compiled_step() -> None:
    module = layer().eval()
    x = torch.randn(B, T, DIM)
    cache = StaticCache(B, KV_HEADS, T, HEAD_DIM)
    whole = module(x)
    module(x[:, :3], cache=cache)
    step = torch.compile(module, backend="aot_eager", fullgraph=True)
    close(torch.cat([step(x[:, t : t + 1], cache=cache) for t in range(3, T)], 1), whole[:, 3:])


@pytest.mark.slow  # many small graphs
@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "paged"])
def test_a_compiled_layer_over_a_cache_of_the_host(kind: str) -> None:
    module, x, cache = layer().eval(), torch.randn(B, T, DIM), CACHES[kind]()
    step = torch.compile(module, backend="aot_eager")
    outs = [step(part, cache=cache) for part in x.split([4, 1, 1, 1, 4], 1)]
    close(torch.cat(outs, 1), module(x))


def test_mixed_precision() -> None:
    module, x = layer(), torch.randn(B, T, DIM)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        cache = DynamicCache()
        out = module(x, cache=cache)
        assert out.dtype == torch.bfloat16
        assert cache.keys()["k"].dtype == torch.bfloat16
    assert (out - module(x)).abs().max() < 0.1


X = torch.zeros(B, T, DIM)
WRONG_SIZES = [
    ("kv_heads", {"kv_heads": 3}, ValueError, "kv_heads: expected a divisor of heads=4, got 3"),
    ("heads", {"dim": 25, "head_dim": None}, ValueError, r"heads: expected a divisor of dim=25 \(or head_dim\), got 4"),
    ("dim", {"dim": 0}, ValueError, "dim: expected a positive int, got 0"),
    ("head_dim", {"head_dim": 8.0}, TypeError, "head_dim: expected an int, got float"),
    ("position", {"position": posattn.ALiBi}, TypeError, "position: expected an encoding or None, got type"),
    ("cross", {"cross": True}, ValueError, "cross: expected no causal and no window"),
    ("memory_dim", {"memory_dim": 8}, ValueError, "memory_dim: expected None without cross, got 8"),
    ("dropout", {"dropout": 2}, ValueError, "dropout: expected 0 <= dropout <= 1, got 2"),
]
WRONG_CALLS = [
    ("x", {"x": X[0]}, r"x: expected \[B, T, 24\], got \[11, 24\]"),
    ("memory", {"memory": X}, "memory: expected None in a layer made without cross"),
    ("documents", {"cu_seqlens": torch.tensor([0, T]), "lengths": torch.tensor([1])}, "cu_seqlens: expected no cache"),
    ("a graph", {"cache": DynamicCache()}, "k: expected no gradient, .*torch.no_grad"),
]


@pytest.mark.parametrize(("changed", "kind", "message"), [c[1:] for c in WRONG_SIZES], ids=[c[0] for c in WRONG_SIZES])
def test_wrong_sizes(changed: dict[str, Any], kind: type[Exception], message: str) -> None:
    given = {"dim": DIM, "heads": HEADS, "head_dim": HEAD_DIM, "causal": True, **changed}
    with pytest.raises(kind, match=message):
        Attention(**given)


@pytest.mark.parametrize(("changed", "message"), [c[1:] for c in WRONG_CALLS], ids=[c[0] for c in WRONG_CALLS])
def test_wrong_calls(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer()(**{"x": X, **changed})


def test_wrong_memories() -> None:
    module = layer(cross=True, causal=False)
    with pytest.raises(ValueError, match=r"memory: expected .*, or a cache that holds it, got neither"):
        module(X)
    with pytest.raises(ValueError, match=r"memory: expected \[B, S, 24\], got \[11, 24\]"):
        module(X, X[0])
    cache = DynamicCache()
    with torch.no_grad():
        module(X, X, cache=cache)
    with pytest.raises(ValueError, match="lengths, memory_positions: expected them with memory alone"):
        module(X, cache=cache, lengths=torch.tensor([1, 2]))
