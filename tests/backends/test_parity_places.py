"""Where queries sit on the keys' axis (offset, k_starts) on every backend: within the rule, and the same as other ways
to say it."""

from __future__ import annotations

import pytest
import torch

import posattn
from tests.tolerance import assert_parity

HEADS, DIM = 4, 16
Q_LEN, K_LEN = 37, 53

pytestmark = pytest.mark.usefixtures("poisoned")


def tensors(place, q_len=Q_LEN, k_len=K_LEN, batch=2, dtype=torch.float32):
    return [torch.randn(batch, HEADS, n, DIM).to(place[0], dtype) for n in (q_len, k_len, k_len)]


POSITIONS = {
    "RoPE, slope": lambda: posattn.RoPE(DIM) + posattn.ALiBi(HEADS, learnable=True),
    "table": lambda: posattn.Kerple(HEADS),
    "profile": lambda: posattn.FIRE(HEADS, width=6, initial_length=20.0),
    "none": lambda: None,
    "mix of a table": lambda: posattn.DAPE(posattn.Kerple(HEADS), HEADS, width=6),
    "mix of a profile": lambda: posattn.DAPE(posattn.FIRE(HEADS, width=6), HEADS, width=6),
}


# Quick: rotations and a slope, a table, and a mix of a profile.
QUICK = {"RoPE, slope", "table", "mix of a profile"}


@pytest.fixture(params=[pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in POSITIONS])
def position(request, place):
    torch.manual_seed(2)
    made = POSITIONS[request.param]()
    return None if made is None else made.to(place[0])


def ints(place, *values):
    return torch.tensor(values, device=place[0])


OFFSETS = {
    "top left": 0,
    "inside": 5,
    "before the keys": -20,
    "past the keys": 60,
    "far before": -300,
    "of each": (3, -7),
    "of each, at the ends": (-Q_LEN, K_LEN),
}
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (9, 0)},
    "right": {"window": (None, 4)},
}


@pytest.mark.parametrize("offset", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("mask", [MASKS["causal"], pytest.param(MASKS["right"], marks=pytest.mark.slow)], ids=str)
def test_offset(place, position, offset, mask):
    offset = ints(place, *offset) if isinstance(offset, tuple) else offset
    assert_parity(*tensors(place), position, {**mask, "offset": offset}, place[1])


BOUNDS = {
    "starts": {"k_starts": (0, 20)},
    "starts, lengths": {"k_starts": (3, 20), "k_lengths": (53, 31)},
    "nothing left": {"k_starts": (53, 17), "k_lengths": (53, 17)},
    "starts, offset": {"k_starts": (6, 30), "offset": 10},
    "starts, lengths, offsets": {"k_starts": (6, 1), "k_lengths": (50, 40), "offset": (13, 2)},
}


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize("mask", [MASKS["window"], pytest.param(MASKS["full"], marks=pytest.mark.slow)], ids=str)
def test_key_starts(place, position, bounds, mask):
    bounds = {name: ints(place, *x) if isinstance(x, tuple) else x for name, x in bounds.items()}
    assert_parity(*tensors(place), position, {**mask, **bounds}, place[1])


def test_key_starts_with_every_option(place, position):
    options = {
        "causal": True,
        "window": (30, 0),
        "softcap": 6.0,
        "dropout_p": 0.2,
        "sinks": torch.randn(HEADS),
        "bias": torch.randn(HEADS, Q_LEN, K_LEN),
        "mask": torch.rand(2, 1, Q_LEN, K_LEN) < 0.7,
        "k_lengths": torch.tensor([K_LEN, 40]),
        "k_starts": torch.tensor([1, 6]),
        "offset": torch.tensor([14, 5]),
    }
    options = {name: x.to(place[0]) if torch.is_tensor(x) else x for name, x in options.items()}
    assert_parity(*tensors(place), position, options, place[1])


@pytest.mark.parametrize("shape", [(Q_LEN, K_LEN), (2, 1, 1, K_LEN), (1, HEADS, Q_LEN, 1)], ids=str)
def test_a_shared_bias_and_key_starts(place, position, shape):
    """The gradient is summed over sequences whose keys begin at different places."""
    options = {"bias": torch.randn(shape).to(place[0]), "k_starts": ints(place, 5, 18), "causal": True}
    assert_parity(*tensors(place), position, options, place[1])


def test_offsets_of_documents(place, position):
    bounds = {"cu_seqlens_q": ints(place, 0, 5, 5, 20, 37), "cu_seqlens_k": ints(place, 0, 30, 31, 31, 53)}
    for offset in (0, 3, ints(place, 2, 0, -4, 9)):
        assert_parity(*tensors(place, batch=1), position, {**bounds, "causal": True, "offset": offset}, place[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(place, position, dtype):
    options = {"causal": True, "offset": 7, "k_starts": ints(place, 2, 11)}
    assert_parity(*tensors(place, dtype=dtype), position, options, place[1])


@pytest.mark.parametrize("k_len", [1400, 2100])
def test_decoding_in_a_cache_that_is_partly_filled(place, position, k_len):
    """Few queries, many slots: the kernels that split the keys."""
    options = {"causal": True, "offset": ints(place, 700, 37), "k_starts": ints(place, 90, 0)}
    assert_parity(*tensors(place, 3, k_len), position, options, place[1])


def numbers(place, *rows):
    """Rows of (document, tokens) pairs as the document of each token."""
    return torch.stack([torch.tensor([n for n, count in row for _ in range(count)]) for row in rows]).to(place[0])


SELF = [[(4, 20), (0, 1), (7, 26), (-1, 6)], [(0, 53)]]
CROSS = ([[(3, 9), (5, 20), (9, 8)], [(1, 30), (-2, 7)]], [[(3, 30), (8, 3), (5, 20)], [(-1, 13), (1, 40)]])


@pytest.mark.parametrize("mask", [MASKS["causal"], MASKS["right"]], ids=str)
def test_segments(place, position, mask):
    assert_parity(*tensors(place, K_LEN), position, {**mask, "segments": numbers(place, *SELF)}, place[1])
    pair = tuple(numbers(place, *rows) for rows in CROSS)
    assert_parity(*tensors(place), position, {**mask, "segments": pair}, place[1])


def test_segments_with_every_option(place, position):
    options = {
        "causal": True,
        "window": (30, 0),
        "softcap": 6.0,
        "dropout_p": 0.2,
        "sinks": torch.randn(HEADS).to(place[0]),
        "bias": torch.randn(HEADS, Q_LEN, K_LEN).to(place[0]),
        "mask": (torch.rand(2, 1, Q_LEN, K_LEN) < 0.7).to(place[0]),
        "segments": tuple(numbers(place, *rows) for rows in CROSS),
    }
    assert_parity(*tensors(place), position, options, place[1])


def test_segments_are_documents(place, position):
    """The numbers say what cu_seqlens say of one row, and rows are by themselves."""
    q, k, v = tensors(place, K_LEN, K_LEN)
    out = posattn.attention(q, k, v, position, causal=True, segments=numbers(place, *SELF), backend=place[1])
    bounds = torch.tensor([0, 20, 21, 47, 53], dtype=torch.int32, device=place[0])
    options = {"causal": True, "cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "backend": place[1]}
    first = posattn.attention(q[:1], k[:1], v[:1], position, **options)
    torch.testing.assert_close(out[:1, :, :47], first[:, :, :47], rtol=1e-5, atol=1e-5)
    assert not out[0, :, 47:].any()
    second = posattn.attention(q[1:], k[1:], v[1:], position, causal=True, backend=place[1])
    torch.testing.assert_close(out[1:], second, rtol=1e-5, atol=1e-5)


def test_what_is_hidden_is_never_read(place, position):
    q, k, v = tensors(place)
    for tensor in (k, v):
        tensor[1, :, :20] = torch.nan
        tensor[0, :, 40:] = torch.nan
    bounds = {"k_starts": ints(place, 0, 20), "k_lengths": ints(place, 40, 53)}
    assert_parity(q, k, v, position, {**bounds, "causal": True}, place[1])


def test_a_padded_row_is_what_it_is_without_padding(place, position):
    """Left padding, and right padding of queries and keys alike, beside each row by itself."""
    q, k, v = tensors(place, K_LEN, K_LEN)
    for padding, length in ((19, K_LEN), (0, K_LEN - 19)):
        kept = slice(padding, length)
        alone = posattn.attention(*(x[1:, :, kept] for x in (q, k, v)), position, causal=True, backend=place[1])
        bounds = {"k_starts": ints(place, 0, padding), "k_lengths": ints(place, K_LEN, length), "offset": 0}
        padded = posattn.attention(q, k, v, position, causal=True, **bounds, backend=place[1])
        torch.testing.assert_close(padded[1:, :, kept], alone, rtol=2e-5, atol=2e-5)


def test_chunks_of_a_prefill_are_the_whole(place, position):
    """A preallocated cache: each chunk sees the keys written so far by its offset alone."""
    q, k, v = tensors(place, K_LEN, K_LEN)
    whole = posattn.attention(q, k, v, position, causal=True, backend=place[1])
    spare = torch.full((2, HEADS, 11, DIM), 3.0, device=place[0])
    k, v = torch.cat([k, spare], 2), torch.cat([v, spare], 2)
    for first in range(0, K_LEN, 20):
        chunk = q[:, :, first : first + 20]
        out = posattn.attention(chunk, k, v, position, causal=True, offset=first, backend=place[1])
        torch.testing.assert_close(out, whole[:, :, first : first + 20], rtol=2e-5, atol=2e-5)


def test_a_shard_is_its_part_of_the_whole(place):
    """Queries and keys of different shards: the table holds the distances of that pair alone."""
    position = posattn.Kerple(HEADS).to(place[0])
    q, k, v = tensors(place, 120, 120)
    out, lse = posattn.attention(q, k, v, position, causal=True, return_lse=True, backend=place[1])
    parts = []
    for shard in range(3):
        keys = slice(40 * shard, 40 * shard + 40)
        options = {"causal": True, "offset": 80 - 40 * shard, "return_lse": True, "backend": place[1]}
        parts.append(posattn.attention(q[:, :, 80:], k[:, :, keys], v[:, :, keys], position, **options))
    weights = torch.stack([part[1] for part in parts]).softmax(0)
    merged = sum(weight[..., None] * part[0] for weight, part in zip(weights, parts))
    torch.testing.assert_close(merged, out[:, :, 80:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.stack([part[1] for part in parts]).logsumexp(0), lse[:, :, 80:])
