"""nn.MultiheadAttention beside torch's: outputs, weights and every gradient over its arguments; and with a position."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import posattn
from posattn.nn import MultiheadAttention

E, HEADS, N, L, S = 24, 4, 3, 5, 7


def both(seed: int = 0, **options: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    torch.manual_seed(seed)
    theirs = nn.MultiheadAttention(E, HEADS, **options)
    torch.manual_seed(seed)
    ours = MultiheadAttention(E, HEADS, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, parameter in theirs.named_parameters():
        nn.init.normal_(parameter, 0.0, 0.3 if "bias" in name else 0.2)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def compare(theirs: nn.Module, ours: nn.Module, inputs: tuple[Tensor, ...], **call: Any) -> None:
    found = []
    for module in (theirs, ours):
        leaves = [x.detach().requires_grad_() for x in inputs]
        arguments = leaves if len(leaves) == 3 else leaves * 3
        out, w = module(*arguments, **call)
        results = [out] if w is None else [out, w]
        torch.manual_seed(9)
        total = sum((x * torch.randn(x.shape)).sum() for x in results)
        grads = torch.autograd.grad(total, [*leaves, *module.parameters()])
        found.append((out, w, grads))
    (out, w, grads), (got, got_w, got_grads) = found
    torch.testing.assert_close(got, out, rtol=2e-5, atol=2e-6)
    assert (got_w is None) == (w is None)
    if w is not None:
        torch.testing.assert_close(got_w, w, rtol=2e-5, atol=2e-6)
    for a, b in zip(got_grads, grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def tensors(batch_first: bool, kdim: int = E, vdim: int = E) -> tuple[Tensor, Tensor, Tensor]:
    found = torch.randn(N, L, E), torch.randn(N, S, kdim), torch.randn(N, S, vdim)
    return found if batch_first else tuple(x.transpose(0, 1).contiguous() for x in found)  # type: ignore[return-value]


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "bool": {"attn_mask": (torch.rand(L, S) > 0.6).index_fill_(1, torch.tensor(2), 0)},
    "float": {"attn_mask": torch.randn(L, S)},
    "of each head": {"attn_mask": (torch.rand(N * HEADS, L, S) > 0.6).index_fill_(2, torch.tensor(0), 0)},
    "padding": {"key_padding_mask": torch.arange(S) >= torch.tensor([[7], [3], [1]])},
    "float padding": {"key_padding_mask": torch.randn(N, S)},
    "both bool": {
        "attn_mask": (torch.rand(L, S) > 0.6).index_fill_(1, torch.tensor(0), 0),
        "key_padding_mask": torch.arange(S) >= torch.tensor([[7], [3], [1]]),
    },
    "both float": {"attn_mask": torch.randn(N * HEADS, L, S), "key_padding_mask": torch.randn(N, S)},
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "bias_kv and zero": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim and vdim": {"kdim": 9, "vdim": 13},
    "kdim, no bias": {"kdim": 9, "bias": False, "add_zero_attn": True},
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("batch_first", [False, True], ids=["T first", "B first"])
def test_outputs_weights_and_gradients_are_torchs(
    form: dict[str, Any], mask: dict[str, Any], batch_first: bool
) -> None:
    theirs, ours = both(batch_first=batch_first, **form)
    inputs = tensors(batch_first, form.get("kdim", E), form.get("vdim", E))
    for need, average in ((False, True), (True, True), (True, False)):
        compare(theirs, ours, inputs, need_weights=need, average_attn_weights=average, **mask)


@pytest.mark.parametrize("need_weights", [False, True])
def test_self_attention(need_weights: bool) -> None:
    theirs, ours = both(batch_first=True)
    compare(theirs, ours, (torch.randn(N, L, E),), need_weights=need_weights)
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    compare(theirs, ours, (torch.randn(N, L, E),), need_weights=need_weights, attn_mask=causal, is_causal=True)


def test_the_causal_hint_with_padding_and_other_lengths() -> None:
    theirs, ours = both(batch_first=True)
    padding = torch.arange(L) >= torch.tensor([[5], [2], [4]])
    mask = torch.ones(L, L).triu(1).bool()
    compare(theirs, ours, (torch.randn(N, L, E),), attn_mask=mask, is_causal=True, key_padding_mask=padding)
    inputs = tensors(True)
    compare(theirs, ours, inputs, attn_mask=torch.ones(L, S).triu(1).bool(), is_causal=True, need_weights=False)


@pytest.mark.parametrize("batch_first", [False, True])
def test_without_a_batch(batch_first: bool) -> None:
    theirs, ours = both(batch_first=batch_first)
    inputs = torch.randn(L, E), torch.randn(S, E), torch.randn(S, E)
    padding = torch.arange(S) >= 4
    for need, average in ((False, True), (True, True), (True, False)):
        compare(theirs, ours, inputs, need_weights=need, average_attn_weights=average, key_padding_mask=padding)
    mask = torch.randn(HEADS, L, S)
    compare(theirs, ours, inputs, attn_mask=mask)


def test_more_rows_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posattn.nn.multihead.ROWS", 2)
    theirs, ours = both(add_bias_kv=True, add_zero_attn=True)
    compare(theirs, ours, tensors(False), **MASKS["both float"])


def test_inference_where_torch_has_a_path_of_its_own() -> None:
    theirs, ours = both(batch_first=True)
    x = torch.randn(N, L, E)
    with torch.no_grad():
        out, _ = theirs.eval()(x, x, x)
        got, _ = ours.eval()(x, x, x)
    torch.testing.assert_close(got, out, rtol=2e-5, atol=2e-6)


def test_rows_that_see_no_key_give_zeros() -> None:
    _, ours = both(bias=False)
    inputs = tensors(False)
    hidden = torch.zeros(N, S, dtype=torch.bool)
    hidden[1] = True
    out, w = ours(*inputs, key_padding_mask=hidden)
    fused, _ = ours(*inputs, key_padding_mask=hidden, need_weights=False)
    assert (out[:, 1] == 0).all()
    assert (w[1] == 0).all()
    torch.testing.assert_close(fused, out)


@pytest.mark.parametrize("form", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=["plain", "added keys"])
def test_dropout_drops_what_the_weights_show(form: dict[str, Any]) -> None:
    _, ours = both(dropout=0.4, bias=False, **form)
    inputs = tensors(False)
    plain = ours.eval()(*inputs, average_attn_weights=False)[1]
    dropped = ours.train()(*inputs, average_attn_weights=False)[1]
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], plain[kept] / 0.6)
    assert 0.4 < kept.float().mean() < 0.8
    # The mean over many draws is what no dropout gives, in both ways of computing it.
    expected = ours.eval()(*inputs)[0]
    ours.train()
    for need in (False, True):
        mean = torch.stack([ours(*inputs, need_weights=need)[0].detach() for _ in range(200)]).mean(0)
        assert (mean - expected).abs().max() < 0.35 * expected.abs().max()


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_of_an_added_key(need_weights: bool) -> None:
    """Where it is the only one that is seen, a head gives it whole, or nothing."""
    ours = MultiheadAttention(E, HEADS, dropout=0.5, bias=False, add_bias_kv=True)
    nn.init.eye_(ours.out_proj.weight)
    hidden = torch.ones(N, S, dtype=torch.bool)
    out, _ = ours(*tensors(False), key_padding_mask=hidden, need_weights=need_weights)
    assert ours.bias_v is not None
    shares = (out / ours.bias_v).view(L, N, HEADS, -1)
    dropped = (shares == 0).all(-1)
    torch.testing.assert_close(shares[~dropped], torch.full_like(shares[~dropped], 2.0))
    assert 0.25 < dropped.float().mean() < 0.75


@pytest.mark.parametrize(
    "position", [posattn.RoPE(6), posattn.Kerple(HEADS), posattn.DAPE(posattn.ALiBi(HEADS), HEADS)]
)
@pytest.mark.parametrize("need_weights", [False, True])
def test_with_a_position(position: posattn.encodings.Encoding, need_weights: bool) -> None:
    theirs, _ = both(batch_first=True)
    ours = MultiheadAttention(E, HEADS, batch_first=True, position=position)
    missing = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert missing.unexpected_keys == []
    assert all(name.startswith("position.") for name in missing.missing_keys)
    x, kv, _ = tensors(True)
    q, k, v = (
        torch.nn.functional.linear(y, w, b).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for y, w, b in zip((x, kv, kv), ours.in_proj_weight.chunk(3), ours.in_proj_bias.chunk(3))
    )
    expected = ours.out_proj(posattn.attention(q, k, v, position).transpose(1, 2).flatten(2))
    got, w = ours(x, kv, kv, need_weights=need_weights)
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)
    if need_weights:
        torch.testing.assert_close(w, posattn.weights(q, k, position).mean(1))
    at = torch.arange(L) * 2
    moved, _ = ours(x, kv, kv, need_weights=need_weights, q_positions=at, k_positions=torch.arange(S))
    assert not torch.allclose(moved, got)


def test_added_keys_have_no_place() -> None:
    """They weigh what their logits say, however strongly the position hides what is far."""
    position = posattn.ALiBi(HEADS, learnable=True)
    nn.init.constant_(position.slopes, 1e4)
    ours = MultiheadAttention(E, HEADS, add_bias_kv=True, add_zero_attn=True, position=position)
    x = torch.randn(S, N, E)
    _, w = ours(x, x, x, average_attn_weights=False)
    assert (w[..., S:] > 1e-4).all()
    fused, _ = ours(x, x, x, need_weights=False)
    torch.testing.assert_close(fused, ours(x, x, x)[0], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("made", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies(made: Any) -> None:
    ours = MultiheadAttention(E, HEADS, position=posattn.Kerple(HEADS), add_bias_kv=True)
    inputs = tensors(False)
    assert torch.equal(made(ours)(*inputs)[0], ours(*inputs)[0])


def test_it_compiles() -> None:
    _, ours = both(batch_first=True, add_zero_attn=True)
    x = torch.randn(N, L, E)
    for need in (False, True):
        compiled = torch.compile(lambda x: ours(x, x, x, need_weights=need)[0], backend="aot_eager", fullgraph=True)  # noqa: B023
        torch.testing.assert_close(compiled(x), ours(x, x, x)[0], rtol=2e-5, atol=2e-6)


def test_narrow_types() -> None:
    theirs, ours = both(add_bias_kv=True, add_zero_attn=True, dtype=torch.bfloat16)
    inputs = tuple(x.bfloat16() for x in tensors(False))
    for need in (False, True):
        out, w = theirs(*inputs, need_weights=need)
        got, got_w = ours(*inputs, need_weights=need)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, out, rtol=0.05, atol=0.05)
        if need:
            assert got_w.dtype == torch.bfloat16
            torch.testing.assert_close(got_w, w, rtol=0.05, atol=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        assert both()[1](*tensors(False))[0].dtype == torch.bfloat16


Q = torch.zeros(L, N, E)
K = torch.zeros(S, N, E)
NESTED = torch.nested.nested_tensor([torch.zeros(2, E), torch.zeros(3, E)], layout=torch.jagged)
WRONG = [
    ("nested", {"query": NESTED}, TypeError, "query: expected a dense torch.Tensor, got a nested tensor"),
    ("a list", {"key": [1]}, TypeError, "key: expected a dense torch.Tensor, got list"),
    ("rank", {"query": Q[None]}, ValueError, "query: expected 2 or 3 dimensions, the last of 24"),
    ("ranks", {"key": K[0]}, ValueError, r"key: expected 3 dimensions, the last of 24, got \[3, 24\]"),
    ("width", {"value": K[..., 1:]}, ValueError, "value: expected 3 dimensions, the last of 24"),
    ("tokens", {"value": K[1:]}, ValueError, r"value: expected \[7, 3\] like key, got \[6, 3\]"),
    ("batch", {"key": K[:, 1:], "value": K[:, 1:]}, ValueError, "key: expected a batch of 3 like query, got 2"),
    ("the hint alone", {"is_causal": True}, ValueError, "attn_mask: expected the mask that is_causal is a hint of"),
    ("mask", {"attn_mask": torch.zeros(L, L)}, ValueError, r"attn_mask: expected \[5, 7\] or \[12, 5, 7\], got"),
    ("mask dtype", {"attn_mask": torch.zeros(L, S).int()}, TypeError, "attn_mask: expected torch.bool or a floating"),
    ("padding", {"key_padding_mask": torch.zeros(S, N)}, ValueError, r"key_padding_mask: expected \[3, 7\], got"),
    ("padding a list", {"key_padding_mask": [0]}, TypeError, "key_padding_mask: expected a torch.Tensor, got list"),
]


@pytest.mark.parametrize(("changed", "kind", "message"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_wrong_calls(changed: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        MultiheadAttention(E, HEADS)(**{"query": Q, "key": K, "value": K, **changed})


def test_a_wrong_position() -> None:
    with pytest.raises(TypeError, match="position: expected an encoding or None, got str"):
        MultiheadAttention(E, HEADS, position="alibi")  # type: ignore[arg-type]


# --- torch.nn.TransformerEncoderLayer


LAYERS = list(itertools.product([False, True], [False, True], ["relu", "gelu"], [True, False]))


@pytest.mark.parametrize(("batch_first", "norm_first", "activation", "bias"), LAYERS)
def test_the_encoder_layer_is_torchs(batch_first: bool, norm_first: bool, activation: str, bias: bool) -> None:
    options = {"batch_first": batch_first, "norm_first": norm_first, "activation": activation, "bias": bias}
    torch.manual_seed(3)
    theirs = nn.TransformerEncoderLayer(E, HEADS, 16, 0.0, **options)  # type: ignore[arg-type]
    torch.manual_seed(3)
    ours = posattn.nn.TransformerEncoderLayer(E, HEADS, 16, 0.0, **options)  # type: ignore[arg-type]
    for (name, a), (other, b) in zip(ours.state_dict().items(), theirs.state_dict().items()):
        assert name == other
        assert torch.equal(a, b)
    assert all(parameter.requires_grad for parameter in ours.parameters())
    x = torch.randn(N, L, E) if batch_first else torch.randn(L, N, E)
    padding = torch.arange(L) >= torch.tensor([[5], [2], [4]])
    causal = torch.ones(L, L).triu(1).bool()
    for mask, hidden, hint in (
        (None, None, False),
        (None, padding, False),
        (causal, None, True),
        (causal, padding, True),
    ):
        out = [m(x, src_mask=mask, src_key_padding_mask=hidden, is_causal=hint) for m in (theirs, ours)]
        torch.testing.assert_close(out[1], out[0], rtol=2e-5, atol=5e-6)
        grads = [torch.autograd.grad(y.square().sum(), list(m.parameters())) for y, m in zip(out, (theirs, ours))]
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_an_encoder_of_them_has_a_position_of_each_layer() -> None:
    layer = posattn.nn.TransformerEncoderLayer(E, HEADS, 16, batch_first=True, position=posattn.Kerple(HEADS))
    encoder = nn.TransformerEncoder(layer, 2).eval()
    assert "layers.1.self_attn.position.p" in encoder.state_dict()
    x = torch.randn(N, L, E)
    padding = torch.arange(L) >= torch.tensor([[5], [2], [4]])
    with torch.no_grad():
        got = encoder(x, src_key_padding_mask=padding)
        expected = x
        for part in encoder.layers:
            expected = part(expected, src_key_padding_mask=padding)
        torch.testing.assert_close(got, expected)
        plain = nn.TransformerEncoder(posattn.nn.TransformerEncoderLayer(E, HEADS, 16, batch_first=True), 2).eval()
        theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, HEADS, 16, batch_first=True), 2).eval()
        plain.load_state_dict(theirs.state_dict())
        theirs_out = theirs(x, src_key_padding_mask=padding)
        seen = ~padding  # torch's nested tensors leave zeros at the padding
        torch.testing.assert_close(plain(x, src_key_padding_mask=padding)[seen], theirs_out[seen], rtol=2e-5, atol=5e-6)


def test_torchs_layer_with_our_attention_uses_it() -> None:
    """torch's layer has a kernel of its own that would read our weights and know of no position."""
    layer = nn.TransformerEncoderLayer(E, HEADS, 16, batch_first=True).eval()
    attention = MultiheadAttention(E, HEADS, batch_first=True, position=posattn.ALiBi(HEADS)).eval()
    attention.load_state_dict(layer.self_attn.state_dict())
    x = torch.randn(N, L, E)
    with torch.no_grad():
        before = layer(x)
        layer.self_attn = attention
        expected = layer.norm1(x + attention(x, x, x, need_weights=False)[0])
        expected = layer.norm2(expected + layer._ff_block(expected))
        assert torch.equal(layer(x), expected)
        assert not torch.allclose(before, expected)
