"""posattn.weights: for every encoding and option, the rows and heads asked for are those that attention() computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import posattn
from posattn.parity import positions_for
from posattn.plot import plot_weights
from tests.nn.test_paging import scattered

B, HEADS, KV_HEADS, DIM, TQ, TK = 2, 4, 2, 8, 6, 9
EXAMPLES = {
    **posattn.parity.examples(HEADS, DIM, 12),
    "AxialRoPE mixed": posattn.AxialRoPE(DIM, width=4, mixed=True, num_heads=HEADS, kv_heads=KV_HEADS),
}
ROWS, CHOSEN = [4, 0, -1], [3, 1]


def read_back(q: Tensor, k: Tensor, position: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The weights as attention() has them: its output over values that are one-hot."""
    values = torch.eye(k.shape[2], dtype=q.dtype).expand(q.shape[0], k.shape[1], -1, -1)
    return posattn.attention(q, k, values, position, return_lse=True, **options)


def qk(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(B, HEADS, TQ, DIM, dtype=dtype), torch.randn(B, KV_HEADS, TK, DIM, dtype=dtype)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (2, 1), "scale": 0.7, "softcap": 1.5},
    "sinks": {"sinks": torch.randn(HEADS), "causal": True},
    "bias": {"bias": torch.randn(B, 1, TQ, TK).double(), "mask": torch.rand(HEADS, TQ, TK) > 0.3},
    "row bias": {"bias": torch.randn(1, TK).double()},
    "lengths": {"k_lengths": torch.tensor([7, 3]), "causal": True},
    "padded left": {"k_starts": torch.tensor([2, 5]), "causal": True},
    "offset": {"offset": 1, "window": (3, 0)},
    "offsets": {"offset": torch.tensor([2, 0]), "k_lengths": torch.tensor([9, 6]), "causal": True},
    "segments": {
        "segments": (
            torch.tensor([[0, 0, 0, 1, 1, 2], [3, 3, 3, 3, 3, -1]]),
            torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 2], [3, 3, 3, 3, 3, 3, 3, -1, -1]]),
        ),
        "causal": True,
    },
    "empty rows": {"k_lengths": torch.tensor([9, 0])},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", ["none", *EXAMPLES])
def test_rows_and_heads_are_attentions(name: str, options: dict[str, Any]) -> None:
    q, k = qk()
    position = EXAMPLES.get(name)
    options = {**options, **positions_for(position, TQ, TK)}
    expected, lse = read_back(q, k, position, **options)
    got, got_lse = posattn.weights(q, k, position, rows=ROWS, heads=CHOSEN, return_lse=True, **options)
    torch.testing.assert_close(got, expected[:, CHOSEN][:, :, ROWS])
    torch.testing.assert_close(got_lse, lse[:, CHOSEN][:, :, ROWS])
    torch.testing.assert_close(posattn.weights(q, k, position, **options), expected)


def test_packed_documents() -> None:
    q, k = qk()
    q, k = q[:1], k[:1]
    options = {"cu_seqlens_q": torch.tensor([0, 2, 6]), "cu_seqlens_k": torch.tensor([0, 4, 9]), "causal": True}
    position = posattn.RoPE(DIM) + posattn.FIRE(HEADS)
    expected, _ = read_back(q, k, position, **options)
    torch.testing.assert_close(posattn.weights(q, k, position, rows=[5, 1], **options), expected[:, :, [5, 1]])


def test_pages() -> None:
    q, k = torch.randn(3, HEADS, 2, DIM), torch.randn(3, KV_HEADS, 12, DIM)
    pool, table = scattered(k)
    lengths = torch.tensor([11, 4, 8])
    got = posattn.weights(q, pool, posattn.ALiBi(HEADS), causal=True, block_table=table, k_lengths=lengths)
    torch.testing.assert_close(got, posattn.weights(q, k, posattn.ALiBi(HEADS), causal=True, k_lengths=lengths))


def test_gradients() -> None:
    q, k = (x.requires_grad_() for x in qk())
    position = posattn.DAPE(posattn.Kerple(HEADS), HEADS).double()
    leaves = [q, k, *position.parameters()]
    grad = torch.randn(B, 2, 3, TK, dtype=torch.float64)
    got = torch.autograd.grad(posattn.weights(q, k, position, rows=ROWS, heads=CHOSEN), leaves, grad)
    expected = torch.autograd.grad(read_back(q, k, position)[0][:, CHOSEN][:, :, ROWS], leaves, grad)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


def test_all_ways_of_naming_rows() -> None:
    q, k = qk(torch.float32)
    k = k[:, :1]  # a key head for all
    whole = posattn.weights(q, k)
    assert whole.shape == (B, HEADS, TQ, TK)
    for rows in (slice(1, 4), range(1, 4), (1, 2, 3), torch.tensor([1, 2, 3]), [-5, -4, -3]):
        torch.testing.assert_close(posattn.weights(q, k, rows=rows), whole[:, :, 1:4])
    for heads in (slice(1, 4), range(1, 4), (1, 2, 3), torch.tensor([1, 2, 3]), [-3, -2, -1]):
        torch.testing.assert_close(posattn.weights(q, k, heads=heads), whole[:, 1:4])
    assert posattn.weights(q, k, rows=[], heads=[]).shape == (B, 0, 0, TK)
    assert posattn.weights(q[:, :, :1], k, rows=[0, 0]).shape == (B, HEADS, 2, TK)


def test_narrow_types_are_computed_in_float32_and_dropout_is_left_out() -> None:
    q, k = qk(torch.bfloat16)
    got = posattn.weights(q, k, dropout_p=0.5, backend="auto", deterministic=True)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, posattn.weights(q.float(), k.float()))
    torch.testing.assert_close(got.sum(-1), torch.ones(B, HEADS, TQ))


@pytest.mark.parametrize("position", [posattn.RoPE(64), posattn.FIRE(2)])
def test_memory_grows_with_the_rows_alone(position: posattn.encodings.Encoding) -> None:
    from posattn.bench.memory import extra_peak

    q = torch.randn(1, 2, 2048, 64)
    with torch.no_grad():
        few = extra_peak(lambda: posattn.weights(q, q, position, rows=[-1], causal=True))
    assert few < 12 << 20  # one array [2, 2048, 2048] of float32 is 32 MB


@pytest.mark.parametrize("rows", [[-1, 3], None], ids=["lines", "map"])
def test_a_picture(rows: list[int] | None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    q, k = qk()
    path = tmp_path / "weights.png"
    plot_weights(posattn.weights(q[:1], k[:1], rows=rows), path, rows=rows)
    assert path.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match=r"weights: expected \[heads, rows, keys\] of one sequence"):
        plot_weights(posattn.weights(q, k), path)
    with pytest.raises(ValueError, match="heads: expected 4 names, got 1"):
        plot_weights(posattn.weights(q, k)[0], path, heads=[2])


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"rows": [TQ]}, ValueError, "rows: expected indices from -6 to 5, got 6"),
        ({"heads": [-5]}, ValueError, "heads: expected indices from -4 to 3, got -5"),
        ({"rows": 3}, TypeError, "rows: expected a list of indices, a slice or None, got 3"),
        ({"rows": [1.0]}, TypeError, "rows: expected integers, got 1.0"),
        ({"heads": [True]}, TypeError, "heads: expected integers, got True"),
        ({"rows": torch.ones(2)}, TypeError, "rows: expected integers of one dimension"),
        ({"is_causal": True}, TypeError, "unexpected option 'is_causal'"),
        ({"window": -1}, ValueError, "window: expected sides >= 0"),
    ],
)
def test_wrong_calls(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    q, k = qk()
    with pytest.raises(kind, match=message):
        posattn.weights(q, k, **options)
