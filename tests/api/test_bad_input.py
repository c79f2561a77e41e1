"""Bad input one by one: a ValueError or TypeError each, naming the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right

import posattn

Q = torch.zeros(2, 4, 5, 8)
K = torch.zeros(2, 2, 7, 8)
NAN = float("nan")


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def with_nan_parameter(encoding):
    with torch.no_grad():
        next(encoding.parameters()).view(-1)[0] = NAN
    return encoding


ATTENTION = [
    ("q not a tensor", {"q": [[1.0]]}, TypeError, "q: expected a torch.Tensor, got list"),
    ("q rank", {"q": torch.zeros(4, 5, 8)}, ValueError, r"q: expected 4 dimensions .*, got \[4, 5, 8\]"),
    ("k rank", {"k": torch.zeros(2, 7, 8)}, ValueError, "k: expected 4 dimensions"),
    ("v rank", {"v": torch.zeros(8)}, ValueError, "v: expected 4 dimensions"),
    ("q integers", {"q": Q.int()}, TypeError, "q: expected float32, bfloat16, float16 or float64, got torch.int32"),
    ("q complex", {"q": Q.to(torch.complex64)}, TypeError, "q: expected float32"),
    ("q sparse", {"q": Q.to_sparse()}, TypeError, "q: expected a dense tensor with strides, got torch.sparse_coo"),
    ("bias sparse", {"bias": torch.eye(5, 7).to_sparse()}, TypeError, "bias: expected a dense tensor"),
    ("causal a word", {"causal": "no"}, TypeError, "causal: expected True or False, got 'no'"),
    ("return_lse a number", {"return_lse": 1}, TypeError, "return_lse: expected True or False, got 1"),
    ("deterministic None", {"deterministic": None}, TypeError, "deterministic: expected True or False, got None"),
    ("k dtype", {"k": K.half()}, TypeError, "k: expected dtype torch.float32 like q, got torch.float16"),
    ("v dtype", {"v": K.double()}, TypeError, "v: expected dtype torch.float32 like q"),
    ("k device", {"k": K.to("meta")}, ValueError, "k: expected device cpu like q, got meta"),
    ("v device", {"v": K.to("meta")}, ValueError, "v: expected device cpu like q, got meta"),
    ("k head_dim", {"k": torch.zeros(2, 2, 7, 9)}, ValueError, "k: expected head_dim 8 like q, got 9"),
    ("v tokens", {"v": torch.zeros(2, 2, 6, 8)}, ValueError, "v: expected 7 tokens like k, got 6"),
    ("k batch", {"k": K[:1]}, ValueError, "k: expected batch size 2 like q, got 1"),
    ("v batch", {"v": K[:1]}, ValueError, "v: expected batch size 2 like q, got 1"),
    ("v heads", {"v": torch.zeros(2, 4, 7, 8)}, ValueError, "v: expected 2 heads like k, got 4"),
    (
        "heads that do not divide",
        {"k": torch.zeros(2, 3, 7, 8), "v": torch.zeros(2, 3, 7, 8)},
        ValueError,
        "divides q's 4, got 3$",
    ),
    ("no kv heads", {"k": K[:, :0], "v": K[:, :0]}, ValueError, "divides q's 4, got 0"),
    ("position not an encoding", {"position": "alibi"}, TypeError, "position: expected an encoding .*, got str"),
    (
        "position's class",
        {"position": posattn.ALiBi},
        TypeError,
        r"got the class ALiBi; make an instance of it, ALiBi\(",
    ),
    (
        "a mask as position",
        {"position": torch.ones(5, 7)},
        TypeError,
        "got Tensor; a boolean mask goes in mask, a float",
    ),
    ("slopes of three sequences", {"position": posattn.ALiBi(4, slopes=torch.ones(3, 4))}, ValueError, r"got \[3, 4\]"),
    (
        "positions without a position",
        {"q_positions": ints(*range(5)), "k_positions": ints(*range(7))},
        ValueError,
        "q_positions, k_positions: expected None without a position to read them, got tensors",
    ),
    (
        "[batch, tokens, heads, head_dim]",
        {"q": torch.zeros(2, 5, 4, 8), "k": torch.zeros(2, 7, 4, 8), "v": torch.zeros(2, 7, 4, 8)},
        ValueError,
        r"divides q's 5, got 7; q, k and v are \[batch, heads, tokens, head_dim\]: .*, transpose\(1, 2\)",
    ),
    (
        "the same, one query and shared heads",
        {"q": torch.zeros(2, 1, 4, 8), "k": torch.zeros(2, 7, 2, 8), "v": torch.zeros(2, 7, 2, 8)},
        ValueError,
        r"divides q's 1, got 7; .*transpose\(1, 2\)",
    ),
    (
        "the same, as the position finds it",
        {**dict.fromkeys("qkv", torch.zeros(2, 7, 4, 8)), "position": posattn.ALiBi(4)},
        ValueError,
        r"num_heads=4, got queries with 7 heads; .*transpose\(1, 2\)",
    ),
    (
        "the same, as a mask finds it",
        {**dict.fromkeys("qkv", torch.zeros(2, 7, 4, 8)), "mask": torch.ones(7, 7).bool()},
        ValueError,
        r"mask: .* \[2, 7, 4, 4\], got \[7, 7\]; .*transpose\(1, 2\)",
    ),
    ("position's heads", {"position": posattn.ALiBi(8)}, ValueError, "num_heads=8, got queries with 4 heads"),
    ("position's head_dim", {"position": posattn.RoPE(16)}, ValueError, "head_dim"),
    ("NaN slopes", {"position": with_nan_parameter(posattn.ALiBi(4, learnable=True))}, ValueError, "slopes: .* NaN"),
    ("NaN Kerple", {"position": with_nan_parameter(posattn.Kerple(4))}, ValueError, "NaN"),
    ("NaN FIRE", {"position": with_nan_parameter(posattn.FIRE(4))}, ValueError, "NaN"),
    ("NaN DAPE", {"position": with_nan_parameter(posattn.DAPE(None, 4))}, ValueError, "NaN"),
    ("window negative", {"window": -1}, ValueError, "window: expected sides >= 0 .*, got -1"),
    ("window side negative", {"window": (2, -3)}, ValueError, r"window: expected sides >= 0 .*, got \(2, -3\)"),
    ("window of three", {"window": (1, 2, 3)}, TypeError, "window: expected an int or"),
    ("window of floats", {"window": (1.5, 2)}, TypeError, "window: expected ints or None"),
    ("window a bool", {"window": (True, 2)}, TypeError, "window: expected ints or None"),
    ("window a string", {"window": "12"}, TypeError, "window: expected an int or"),
    ("scale NaN", {"scale": NAN}, ValueError, "scale: expected a finite number, within float32's range, got nan"),
    (
        "scale infinite",
        {"scale": float("inf")},
        ValueError,
        "scale: expected a finite number, within float32's range, got inf",
    ),
    ("softcap negative", {"softcap": -1.0}, ValueError, "softcap: expected a finite number of at least .*, got -1.0"),
    ("softcap NaN", {"softcap": NAN}, ValueError, "softcap: .*, got nan"),
    ("dropout negative", {"dropout_p": -0.1}, ValueError, "dropout_p: expected 0 <= dropout_p <= 1, got -0.1"),
    ("dropout above 1", {"dropout_p": 1.1}, ValueError, "dropout_p: .*, got 1.1"),
    ("dropout NaN", {"dropout_p": NAN}, ValueError, "dropout_p: .*, got nan"),
    ("sinks not a tensor", {"sinks": [0.0] * 4}, TypeError, "sinks: expected a torch.Tensor"),
    ("sinks shape", {"sinks": torch.zeros(2)}, ValueError, r"sinks: expected shape \[4\].*, got \[2\]"),
    ("sinks rank", {"sinks": torch.zeros(1, 4)}, ValueError, r"sinks: expected shape \[4\]"),
    ("sinks integers", {"sinks": torch.zeros(4).int()}, TypeError, "sinks: expected a floating dtype"),
    (
        "sinks device",
        {"sinks": torch.zeros(4, device="meta")},
        ValueError,
        "sinks: expected device cpu like q, got meta",
    ),
    ("bias shape", {"bias": torch.zeros(5, 6)}, ValueError, r"bias: .*broadcasts to \[2, 4, 5, 7\], got \[5, 6\]$"),
    ("bias heads", {"bias": torch.zeros(3, 5, 7)}, ValueError, r"bias: .*, got \[3, 5, 7\]"),
    ("bias rank 1", {"bias": torch.zeros(5)}, ValueError, r"bias: .*, got \[5\]"),
    ("bias rank 5", {"bias": torch.zeros(1, 1, 1, 5, 7)}, ValueError, "bias: "),
    ("bias bool", {"bias": torch.ones(5, 7).bool()}, TypeError, r"bias: expected a floating dtype .*mask"),
    ("bias device", {"bias": torch.zeros(5, 7, device="meta")}, ValueError, "bias: expected device cpu"),
    ("mask float", {"mask": torch.zeros(5, 7)}, TypeError, "mask: expected torch.bool, .*bias.*, got torch.float32"),
    ("mask shape", {"mask": torch.ones(2, 5, 7).bool()}, ValueError, r"mask: .*, got \[2, 5, 7\]; mask\[:, None\]"),
    (
        "mask of keys",
        {"mask": torch.ones(2, 7).bool()},
        ValueError,
        r"mask: .*, got \[2, 7\]; mask\[:, None, None\] hides",
    ),
    ("bias of keys", {"bias": torch.ones(2, 7)}, ValueError, r"bias: .*, got \[2, 7\]; bias\[:, None, None\] hides"),
    (
        "bias by head",
        {"bias": torch.ones(2, 4, 7)},
        ValueError,
        r"bias: .*, got \[2, 4, 7\]; bias\[:, :, None\] is one",
    ),
    ("mask not a tensor", {"mask": True}, TypeError, "mask: expected a torch.Tensor, got bool"),
    (
        "k_lengths negative",
        {"k_lengths": ints(-1, 2)},
        ValueError,
        "k_lengths: expected lengths from 0 to 7, got -1 to 2",
    ),
    (
        "k_lengths too long",
        {"k_lengths": ints(1, 8)},
        ValueError,
        "k_lengths: expected lengths from 0 to 7, got 1 to 8",
    ),
    ("k_lengths shape", {"k_lengths": ints(1, 2, 3)}, ValueError, r"k_lengths: expected shape \[2\]"),
    (
        "k_lengths floats",
        {"k_lengths": torch.ones(2)},
        TypeError,
        "k_lengths: expected int32 or int64, got torch.float32",
    ),
    ("k_lengths a list", {"k_lengths": [1, 2]}, TypeError, "k_lengths: expected a torch.Tensor, got list"),
    ("k_starts negative", {"k_starts": ints(-1, 2)}, ValueError, "k_starts: expected starts from 0 to 7, got -1 to 2"),
    ("k_starts too far", {"k_starts": ints(1, 8)}, ValueError, "k_starts: expected starts from 0 to 7, got 1 to 8"),
    (
        "k_starts past k_lengths",
        {"k_starts": ints(1, 6), "k_lengths": ints(3, 5)},
        ValueError,
        "k_starts: expected starts up to k_lengths, got 6 for a sequence of 5",
    ),
    ("k_starts shape", {"k_starts": ints(1)}, ValueError, r"k_starts: expected shape \[2\], one start per sequence"),
    ("k_starts floats", {"k_starts": torch.ones(2)}, TypeError, "k_starts: expected int32 or int64"),
    ("segments a list", {"segments": [1, 2]}, TypeError, "segments: expected a torch.Tensor, got int"),
    ("segments a number", {"segments": 3}, TypeError, "segments: expected a torch.Tensor, or one for queries and one"),
    (
        "segments alone",
        {"segments": ints(*range(5))},
        ValueError,
        "segments: expected a pair, for 5 queries and 7 keys",
    ),
    (
        "segments shape",
        {"segments": (ints(*range(5)), ints(*range(6)))},
        ValueError,
        r"segments: expected shape \[7\], \[1, 7\] or \[2, 7\], got \[6\]",
    ),
    (
        "segments in two runs",
        {"segments": (ints(1, 1, 2, 2, 1), ints(*range(7)))},
        ValueError,
        "segments: expected each document in one run of a row, got two of 1",
    ),
    (
        "segments floats",
        {"segments": (torch.zeros(5), ints(*range(7)))},
        TypeError,
        "segments: expected int32 or int64, got torch.float32",
    ),
    (
        "segments and lengths",
        {"segments": (ints(*range(5)), ints(*range(7))), "k_lengths": ints(7, 7)},
        ValueError,
        "segments, k_lengths: expected one or the other, got both",
    ),
    ("offset a float", {"offset": 1.0}, TypeError, r"offset: expected an int, a torch.Tensor or None, got 1\.0"),
    ("offset a flag", {"offset": True}, TypeError, "offset: expected an int, a torch.Tensor or None, got True"),
    ("offset too large", {"offset": 2**28 + 1}, ValueError, r"offset: expected an int within \+-2\^28"),
    ("offset shape", {"offset": ints(1, 2, 3)}, ValueError, r"offset: expected shape \[2\], one number per sequence"),
    ("offset floats", {"offset": torch.ones(2)}, TypeError, "offset: expected int32 or int64, got torch.float32"),
    ("offset before", {"offset": ints(-6, 0)}, ValueError, "offset: expected numbers from -5 to 7, got -6 to 0"),
    ("offset past", {"offset": ints(0, 8)}, ValueError, "offset: expected numbers from -5 to 7, got 0 to 8"),
    (
        "offset device",
        {"offset": torch.zeros(2, dtype=torch.int32, device="meta")},
        ValueError,
        "offset: expected device cpu like q, got meta",
    ),
    ("q_positions alone", {"q_positions": ints(*range(5))}, ValueError, "q_positions, k_positions: expected both"),
    (
        "positions bool",
        {"q_positions": torch.zeros(5).bool(), "k_positions": ints(*range(7))},
        TypeError,
        "q_positions: expected int32",
    ),
    (
        "positions shape",
        {"q_positions": ints(0), "k_positions": ints(*range(7))},
        ValueError,
        r"q_positions: expected shape \[5\]",
    ),
    (
        "positions batch",
        {"q_positions": ints(*range(5)), "k_positions": torch.zeros(3, 7).int()},
        ValueError,
        r"k_positions: .*, got \[3, 7\]",
    ),
    (
        "positions too far",
        {"q_positions": ints(*range(5)), "k_positions": ints(0, 1, 2, 3, 4, 5, 2**33, dtype=torch.int64)},
        ValueError,
        "k_positions: expected positions between",
    ),
    (
        "positions of a table",
        {"position": posattn.Kerple(4), "q_positions": ints(*range(5)), "k_positions": ints(0, 1, 2, 3, 4, 5, 2**30)},
        ValueError,
        "positions",
    ),
    ("BiPE without positions", {"position": posattn.BiPE.with_alibi(4, 32, 16)}, ValueError, "positions"),
    (
        "backend",
        {"backend": "tpu"},
        ValueError,
        "backend: expected \"auto\", 'cpu', 'cuda', 'triton', 'reference', got 'tpu'",
    ),
    ("backend for another device", {"backend": "triton"}, ValueError, "backend 'triton' cannot run this call: "),
]


@pytest.mark.parametrize(("options", "error", "message"), [c[1:] for c in ATTENTION], ids=[c[0] for c in ATTENTION])
def test_attention(options, error, message):
    arguments = {"q": Q, "k": K, "v": K, **options}
    posattn.attention(Q, K, K)  # so that the shapes are known to be good ones
    with pytest.raises(error, match=message):
        posattn.attention(**arguments)


PACKED = [
    ("one of two", {"cu_seqlens_q": ints(0, 5)}, ValueError, "cu_seqlens_q, cu_seqlens_k: expected both or neither"),
    (
        "not from 0",
        {"cu_seqlens_q": ints(1, 5), "cu_seqlens_k": ints(0, 7)},
        ValueError,
        r"cu_seqlens_q: .* from 0 to 5, got \[1, 5\]",
    ),
    (
        "not to T",
        {"cu_seqlens_q": ints(0, 5), "cu_seqlens_k": ints(0, 6)},
        ValueError,
        r"cu_seqlens_k: .* from 0 to 7, got \[0, 6\]",
    ),
    (
        "past T",
        {"cu_seqlens_q": ints(0, 9, 5), "cu_seqlens_k": ints(0, 2, 7)},
        ValueError,
        "cu_seqlens_q: expected non-decreasing",
    ),
    (
        "decreasing",
        {"cu_seqlens_q": ints(0, 3, 2, 5), "cu_seqlens_k": ints(0, 1, 2, 7)},
        ValueError,
        "cu_seqlens_q: expected non-decreasing",
    ),
    (
        "negative",
        {"cu_seqlens_q": ints(0, -1, 5), "cu_seqlens_k": ints(0, 1, 7)},
        ValueError,
        "cu_seqlens_q: expected non-decreasing",
    ),
    (
        "document counts",
        {"cu_seqlens_q": ints(0, 2, 5), "cu_seqlens_k": ints(0, 7)},
        ValueError,
        "as many documents as cu_seqlens_q, 2, got 1",
    ),
    ("too short", {"cu_seqlens_q": ints(0), "cu_seqlens_k": ints(0)}, ValueError, "at least one document"),
    (
        "rank",
        {"cu_seqlens_q": ints(0, 5)[None], "cu_seqlens_k": ints(0, 7)},
        ValueError,
        "cu_seqlens_q: expected shape",
    ),
    (
        "floats",
        {"cu_seqlens_q": torch.tensor([0.0, 5.0]), "cu_seqlens_k": ints(0, 7)},
        TypeError,
        "cu_seqlens_q: expected int32",
    ),
    (
        "with k_lengths",
        {"cu_seqlens_q": ints(0, 5), "cu_seqlens_k": ints(0, 7), "k_lengths": ints(7)},
        ValueError,
        "k_lengths, cu_seqlens_k: expected one or the other, got both",
    ),
    (
        "with k_starts",
        {"cu_seqlens_q": ints(0, 5), "cu_seqlens_k": ints(0, 7), "k_starts": ints(7)},
        ValueError,
        "k_starts, cu_seqlens_k: expected one or the other, got both",
    ),
    (
        "offset for a batch",
        {"cu_seqlens_q": ints(0, 2, 5), "cu_seqlens_k": ints(0, 2, 7), "offset": ints(1)},
        ValueError,
        r"offset: expected shape \[2\], one number per sequence, got \[1\]",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), [c[1:] for c in PACKED], ids=[c[0] for c in PACKED])
def test_packed(options, error, message):
    with pytest.raises(error, match=message):
        posattn.attention(Q[:1], K[:1], K[:1], **options)


def test_packed_in_a_batch():
    with pytest.raises(ValueError, match="cu_seqlens_q: expected packed documents in a batch of 1, got a batch of 2"):
        posattn.attention(Q, K, K, cu_seqlens_q=ints(0, 5), cu_seqlens_k=ints(0, 7))


SDPA = [
    ("query rank", {"query": torch.zeros(8)}, ValueError, "query: expected at least 2 dimensions"),
    ("key dtype", {"key": Q.half()}, TypeError, "key: expected dtype torch.float32 like query"),
    ("value device", {"value": Q.to("meta")}, ValueError, "value: expected device cpu like query"),
    ("heads without enable_gqa", {"key": Q[:, :2], "value": Q[:, :2]}, ValueError, r"enable_gqa=True .*\[2, 4, 5, 8\]"),
    ("batches", {"key": torch.zeros(3, 4, 5, 8)}, ValueError, "leading dimensions that broadcast"),
    (
        "grouped key heads",
        {"key": torch.zeros(2, 3, 5, 8), "enable_gqa": True},
        ValueError,
        "key: .*divides query's 4, got 3",
    ),
    ("grouped value heads", {"value": torch.zeros(2, 3, 5, 8), "enable_gqa": True}, ValueError, "value: .*got 3"),
    (
        "CausalBias and causal",
        {"attn_mask": causal_lower_right(5, 5), "is_causal": True},
        ValueError,
        "attn_mask, is_causal: .*got both",
    ),
    ("CausalBias of another length", {"attn_mask": causal_lower_right(4, 5)}, ValueError, "attn_mask: .*one for 4"),
    (
        "mask integers",
        {"attn_mask": torch.ones(5, 5).int()},
        TypeError,
        "attn_mask: expected torch.bool, .*, got torch.int32",
    ),
    ("mask float64", {"attn_mask": torch.ones(5, 5).double()}, TypeError, "attn_mask: expected torch.bool"),
    ("mask rank 1", {"attn_mask": torch.ones(4)}, ValueError, r"attn_mask: .*broadcasts to .*, got \[4\]"),
    ("is_causal a word", {"is_causal": "no"}, TypeError, "is_causal: expected True or False, got 'no'"),
    ("enable_gqa a number", {"enable_gqa": 1}, TypeError, "enable_gqa: expected True or False, got 1"),
    (
        "mask shape",
        {"attn_mask": torch.ones(5, 6)},
        ValueError,
        r"attn_mask: .*broadcasts to \[2, 4, 5, 5\], got \[5, 6\]",
    ),
    (
        "mask of keys",
        {"attn_mask": torch.ones(2, 5)},
        ValueError,
        r"attn_mask: .*, got \[2, 5\]; attn_mask\[:, None, None\]",
    ),
    ("mask batch", {"attn_mask": torch.ones(3, 1, 5, 5)}, ValueError, "attn_mask: "),
    ("mask rank 5", {"attn_mask": torch.ones(2, 2, 1, 5, 5)}, ValueError, "attn_mask: "),
    ("dropout", {"dropout_p": 1.5}, ValueError, "dropout_p: "),
    ("scale", {"scale": NAN}, ValueError, "scale: "),
    ("position", {"position": 3}, TypeError, "position: expected an encoding"),
]


@pytest.mark.parametrize(("options", "error", "message"), [c[1:] for c in SDPA], ids=[c[0] for c in SDPA])
def test_scaled_dot_product_attention(options, error, message):
    arguments = {"query": Q, "key": Q, "value": Q, **options}
    with pytest.raises(error, match=message):
        posattn.scaled_dot_product_attention(**arguments)


ELSEWHERE = [
    (posattn.attention, "is_causal", "take causal, which counts from the last key .* is_causal counts from the first"),
    (posattn.attention, "attn_mask", "take mask for a boolean one .* and bias for a float one"),
    (posattn.attention, "softmax_scale", "take scale$"),
    (posattn.attention, "window_size", "take window, whose sides are None, not -1, for no limit"),
    (posattn.attention, "alibi_slopes", r"take position=posattn.ALiBi\(heads, slopes=alibi_slopes\)"),
    (posattn.attention, "enable_gqa", "take nothing: k and v may have any number of heads"),
    (posattn.attention, "dropout", "take dropout_p$"),
    (posattn.attention, "wnidow", "take window$"),
    (posattn.attention, "xyz", "take one of q, k, v, position, causal"),
    (posattn.scaled_dot_product_attention, "causal", "take is_causal, which counts from the first key"),
    (posattn.scaled_dot_product_attention, "mask", "take attn_mask$"),
    (posattn.scaled_dot_product_attention, "window", "take one of query, key, value, attn_mask"),
]


@pytest.mark.parametrize(("function", "name", "message"), ELSEWHERE, ids=[f"{f.__name__}-{n}" for f, n, _ in ELSEWHERE])
def test_arguments_that_functions_elsewhere_have(function, name, message):
    expected = rf"{name}: expected an argument of posattn.{function.__name__}, got one that it does not have; {message}"
    with pytest.raises(TypeError, match=expected):
        function(Q, Q, Q, **{name: True})


@pytest.mark.parametrize(
    ("slopes", "error", "message"),
    [
        (0.5, TypeError, "slopes: expected 4 numbers, one per head, got float"),
        ("1234", TypeError, "slopes: expected 4 numbers, one per head, got str"),
        (torch.tensor(0.5), TypeError, "slopes: expected 4 numbers, one per head, got Tensor"),
        (torch.ones(2, 3), ValueError, r"slopes\[0\]: expected 4 numbers, one per head, got 3"),
        ([[1.0] * 4, [1.0] * 3], ValueError, r"slopes\[1\]: expected 4 numbers, one per head, got 3"),
        ([[1.0] * 4, 1.0], TypeError, r"slopes\[0\]: expected a number, got list"),
        (torch.full((2, 4), NAN), ValueError, r"slopes\[0\]\[0\]: expected a finite number"),
        (torch.ones(2, 3, 4), TypeError, r"slopes\[0\]\[0\]: expected a number, got list"),
        (torch.ones(4, requires_grad=True), TypeError, "slopes: expected numbers to copy, got a tensor that requires"),
    ],
)
def test_slopes(slopes, error, message):
    with pytest.raises(error, match=message):
        posattn.ALiBi(4, slopes=slopes)


def test_mask_of_folded_batches():
    q = torch.zeros(2, 3, 4, 5, 8)
    with pytest.raises(ValueError, match=r"attn_mask: .*broadcast to \[2, 3\], got \[1, 2\]"):
        posattn.scaled_dot_product_attention(q, q, q, torch.ones(1, 2, 1, 5, 5))


def test_every_reason_is_given_when_no_backend_can(monkeypatch):
    from posattn import backends

    monkeypatch.setattr(backends, "load", lambda name: "it cannot be imported: broken")
    with pytest.raises(ValueError, match=r"cpu: it cannot be imported: broken.*backend=\"reference\""):
        posattn.attention(Q, K, K)


@pytest.mark.parametrize("value", [2**31, -(2**31)])
@pytest.mark.parametrize("which", ["q_positions", "k_positions"])
def test_a_position_that_32_bits_cannot_hold(value: int, which: str) -> None:
    """One less is a position like any other."""
    q = torch.randn(1, 2, 3, 8)
    inside = value - 1 if value > 0 else value + 1
    places = {name: torch.tensor([inside, inside, inside]) for name in ("q_positions", "k_positions")}
    out = posattn.attention(q, q, q, posattn.ALiBi(2), **places)
    torch.testing.assert_close(out, posattn.attention(q, q, q))
    places[which] = torch.tensor([inside, value, inside])
    with pytest.raises(ValueError, match=rf"{which}: expected positions between -2\^31 and 2\^31, got .*{value}"):
        posattn.attention(q, q, q, posattn.ALiBi(2), **places)


@pytest.mark.parametrize("bounds", [(-(2**31), 5), (0, 2**31)])
def test_a_position_range_that_32_bits_cannot_hold(bounds: tuple[int, int]) -> None:
    q, places = torch.randn(1, 2, 3, 8), torch.arange(3)
    with pytest.raises(ValueError, match="position_range: expected first <= last within"):
        posattn.attention(q, q, q, posattn.ALiBi(2), q_positions=places, k_positions=places, position_range=bounds)


@pytest.mark.parametrize("bounds", [(1, 2), (0, 1)])
def test_a_position_one_outside_its_range(bounds: tuple[int, int]) -> None:
    q, places = torch.randn(1, 2, 3, 8), torch.arange(3)
    with pytest.raises(ValueError, match="expected positions in position_range"):
        posattn.attention(q, q, q, posattn.ALiBi(2), q_positions=places, k_positions=places, position_range=bounds)
