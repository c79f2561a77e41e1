"""PagedCache(rotation=): keys that are turned once, as they are appended, give what keys turned in each call give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import posattn
from posattn.backends import cpu
from tests.tolerance import assert_parity

HEADS, KV_HEADS, DIM = 4, 2, 16
ROTATIONS = {
    "half": posattn.RoPE(DIM),
    "interleaved": posattn.RoPE(DIM, layout="interleaved"),
    "part": posattn.RoPE(DIM, rotary_dim=6),
    "yarn": posattn.RoPE(DIM, scaling=posattn.YaRN(4.0, 8)),
    "a fixed length": posattn.RoPE(DIM, scaling=posattn.DynamicNTK(4.0, 8, length=20)),
}


def tokens(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, count, DIM).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return q, k, v


def cache(rotation: posattn.RoPE | None, **options: Any) -> posattn.PagedCache:
    return posattn.PagedCache(40, 4, 3, KV_HEADS, DIM, rotation=rotation, **options)


def generated(rotation: posattn.RoPE | None, position: posattn.Encoding, dtype: torch.dtype, **given: Any) -> Tensor:
    """A prompt in two chunks, rows of different lengths, then single tokens; row 2 begins as row 0 is."""
    q, k, v = tokens(14, dtype)
    held = cache(rotation, dtype=dtype, positions=bool(given))
    rows, out = held.select([0, 1]), []
    for part, lengths in ((slice(0, 5), None), (slice(5, 9), [4, 2])):
        where = {name: x[:, part] for name, x in given.items()}
        keys = rows.append(k[:, :, part], v[:, :, part], lengths=lengths, **where)
        if where:
            keys["q_positions"] = where["positions"]
        out.append(posattn.attention(q[:, :, part], position=position, causal=True, **keys))
    held.share(0, 2, 6)
    both = held.select([2, 1])
    for t in range(9, 14):
        where = {name: x[:, t : t + 1] for name, x in given.items()}
        keys = both.append(k[:, :, t : t + 1], v[:, :, t : t + 1], **where)
        if where:
            keys["q_positions"] = where["positions"]
        out.append(posattn.attention(q[:, :, t : t + 1], position=position, causal=True, **keys))
    out[1][1, :, 2:] = 0.0  # padding
    return torch.cat(out, 2)


@torch.no_grad()
@pytest.mark.parametrize("bias", [None, posattn.ALiBi(HEADS), posattn.FIRE(HEADS)], ids=["alone", "slope", "profile"])
@pytest.mark.parametrize("name", ROTATIONS)
def test_as_keys_that_are_turned_in_each_call(name: str, bias: posattn.Encoding | None) -> None:
    rotation = ROTATIONS[name]
    position = rotation if bias is None else rotation + bias
    got, expected = (generated(turned, position, torch.float32) for turned in (rotation, None))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_bfloat16_is_rounded_once() -> None:
    rotation = ROTATIONS["half"]
    got, expected = (generated(turned, rotation, torch.bfloat16) for turned in (rotation, None))
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    held = cache(rotation, dtype=torch.bfloat16)
    _, k, v = tokens(3, torch.bfloat16)
    held.select([0, 1]).append(k, v)
    kept = held.k[held.block_table[:2, 0].long(), :3].transpose(1, 2)
    assert torch.equal(kept, rotation.rotate(k.float()).bfloat16())


@torch.no_grad()
def test_explicit_positions() -> None:
    rotation = ROTATIONS["half"]
    positions = torch.arange(14).expand(2, -1) * 3 + torch.tensor([[0], [7]])
    got, expected = (generated(turned, rotation, torch.float32, positions=positions) for turned in (rotation, None))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_layer_takes_such_a_cache() -> None:
    torch.manual_seed(0)
    layer = posattn.nn.Attention(HEADS * DIM, HEADS, kv_heads=KV_HEADS, position=ROTATIONS["half"], causal=True)
    x = torch.randn(3, 9, HEADS * DIM)
    held = cache(ROTATIONS["half"])
    out = torch.cat([layer(x[:, :6], cache=held), *(layer(x[:, t : t + 1], cache=held) for t in range(6, 9))], 1)
    torch.testing.assert_close(out, layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_over_turned_keys_keeps_the_rule(dtype: torch.dtype) -> None:
    """Outputs and gradients, those of the turned keys among them, by the same rule as everything."""
    q, k, v = tokens(11, dtype)
    assert_parity(q[:, :, :4], k, v, ROTATIONS["half"] + posattn.Kerple(HEADS), {"causal": True, "k_rotated": True})


@torch.no_grad()
def test_queries_alone_are_turned() -> None:
    q, k, v = tokens(7)
    for rotation in ROTATIONS.values():
        got = posattn.attention(q, rotation.rotate(k), v, rotation, causal=True, k_rotated=True)
        torch.testing.assert_close(got, posattn.attention(q, k, v, rotation, causal=True), rtol=1e-5, atol=1e-5)


WRONG = [
    ("a kind", posattn.AxialRoPE(DIM, width=4), TypeError, "rotation: expected a RoPE, .* got AxialRoPE"),
    ("one that learns", posattn.RoPE(DIM, learnable=True), ValueError, "rotation: expected a RoPE that does not learn"),
    (
        "by length",
        posattn.RoPE(DIM, scaling=posattn.DynamicNTK(4.0, 8)),
        ValueError,
        "rotation: expected a scaling that does not go by the length",
    ),
    ("a size", posattn.RoPE(DIM * 2), ValueError, "rotation: expected head_dim 16 like the cache, got 32"),
]


@pytest.mark.parametrize(("rotation", "kind", "message"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_rotations(rotation: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        cache(rotation)


def test_wrong_calls() -> None:
    q, k, v = tokens(5)
    for position in (None, posattn.ALiBi(HEADS)):
        with pytest.raises(ValueError, match="k_rotated: expected a position that rotates"):
            posattn.attention(q, k, v, position, k_rotated=True)
    with pytest.raises(ValueError, match="k_rotated, k_starts: expected one or the other"):
        posattn.attention(q, k, v, ROTATIONS["half"], k_rotated=True, k_starts=torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="k_rotated: expected True or False, got 1"):
        posattn.attention(q, k, v, ROTATIONS["half"], k_rotated=1)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [None, *ROTATIONS])
def test_one_pass_writes_what_torch_writes(name: str | None, dtype: torch.dtype, monkeypatch: Any) -> None:
    pools = []
    for in_one_pass in (True, False):
        if not in_one_pass:
            monkeypatch.setattr(cpu, "appends", lambda *_: False)
        held = cache(None if name is None else ROTATIONS[name], dtype=dtype)
        _, k, v = tokens(70, dtype)
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))  # as a projection gives them
        rows = held.select([2, 0])
        for part, lengths in ((slice(0, 37), [37, 11]), (slice(37, 70), None), (slice(0, 1), [0, 1])):
            rows.append(k[:, :, part], v[:, :, part], lengths=lengths)
        pools.append((held.k, held.v))
    assert torch.equal(pools[0][1], pools[1][1])
    assert pools[0][1].any()
    torch.testing.assert_close(pools[0][0], pools[1][0], rtol=torch.finfo(dtype).eps, atol=1e-6)


@torch.no_grad()
def test_a_pool_that_autograd_holds_is_seen_to_change() -> None:
    held = cache(None)
    _, k, v = tokens(3)
    q = torch.randn(2, HEADS, 1, DIM, requires_grad=True)
    rows = held.select([0, 1])
    with torch.enable_grad():
        product = (q.sum() * held.v).sum()
        before = held.v._version
        with torch.no_grad():
            rows.append(k, v)
        assert held.v._version > before
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
