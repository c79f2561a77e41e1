"""Embeddings of absolute positions, and BiPE's two levels."""

from __future__ import annotations

import math

import pytest
import torch

from posattn.encodings import BiPE, Context, LearnedEmbedding, SinusoidalEmbedding, segment_positions

CPU = torch.device("cpu")


def test_sinusoidal():
    table = SinusoidalEmbedding(6)(50)
    assert table.shape == (50, 6)
    for position in (0, 1, 49):
        for c in range(3):
            angle = position / 10000 ** (2 * c / 6)
            assert float(table[position, 2 * c]) == pytest.approx(math.sin(angle), abs=1e-7)
            assert float(table[position, 2 * c + 1]) == pytest.approx(math.cos(angle), abs=1e-7)


def test_sinusoidal_at_positions():
    embedding, positions = SinusoidalEmbedding(4), torch.tensor([[3, 0], [7, 2**20]])
    out = embedding(positions, torch.float64)
    assert out.shape == (2, 2, 4)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out[0, 0], embedding(8, torch.float64)[3])
    assert float(out[1, 1, 0]) == pytest.approx(math.sin(2**20), abs=1e-12)


def test_learned():
    embedding = LearnedEmbedding(10, 4)
    assert torch.equal(embedding(10), embedding.weight)
    positions = torch.tensor([[0, 9], [3, 3]])
    assert torch.equal(embedding(positions), embedding.weight[positions])
    embedding(positions).sum().backward()
    assert embedding.weight.grad[:, 0].tolist() == [1, 0, 0, 2, 0, 0, 0, 0, 0, 1]
    assert embedding(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 4)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (11, "positions: expected a length up to 10, got 11"),
        (-1, "positions: expected a length up to 10, got -1"),
        (torch.tensor([0, 10]), r"positions: expected positions in \[0, 10\), got 0 .. 10"),
        (torch.tensor([-1, 3]), r"positions: expected positions in \[0, 10\), got -1 .. 3"),
    ],
)
def test_learned_knows_its_range(positions, message):
    with pytest.raises(ValueError, match=message):
        LearnedEmbedding(10, 4)(positions)


@pytest.mark.parametrize("embedding", [SinusoidalEmbedding(4), LearnedEmbedding(10, 4)])
def test_positions_are_integers(embedding):
    with pytest.raises(TypeError, match="positions: expected a length or a tensor of integers"):
        embedding(torch.tensor([0.5]))


def test_bad_sizes():
    with pytest.raises(ValueError, match="dim: expected an even number, got 5"):
        SinusoidalEmbedding(5)
    with pytest.raises(ValueError, match="max_positions: expected a positive int, got 0"):
        LearnedEmbedding(0, 4)


def scalar_segments(tokens, separators, longest):
    places, numbers, place, number = [], [], 0, 0
    for token in tokens:
        places.append(place)
        numbers.append(number)
        place += 1
        if token in separators or place == longest:
            place, number = 0, number + 1
    return places, numbers


@pytest.mark.parametrize("longest", [None, 1, 3, 4])
def test_segments(longest):
    torch.manual_seed(0)
    tokens = torch.randint(0, 6, (8, 40))
    tokens[0, :3] = 5
    tokens[1] = 0
    index, number = segment_positions(tokens, {5, 4}, longest)
    for row in range(8):
        expected = scalar_segments(tokens[row].tolist(), {5, 4}, longest)
        assert (index[row].tolist(), number[row].tolist()) == expected


def test_segments_of_one_row_and_of_nothing():
    index, number = segment_positions(torch.tensor([1, 9, 1, 1]), [9])
    assert (index.tolist(), number.tolist()) == ([0, 1, 0, 1], [0, 0, 1, 1])
    index, number = segment_positions(torch.zeros(2, 0, dtype=torch.int64), [9])
    assert index.shape == number.shape == (2, 0)
    assert segment_positions(torch.tensor([1, 2]), [])[1].tolist() == [0, 0]


def test_segments_need_token_ids():
    with pytest.raises(TypeError, match="tokens: expected a tensor of integers"):
        segment_positions(torch.randn(3), [1])


def test_bipe_alibi_counts_segments_with_slopes_times_96():
    bipe = BiPE.with_alibi(2, dim=8, max_segment_length=4)
    _, segment = bipe.segments(torch.tensor([1, 9, 1, 1, 9, 1]), [9])
    bias = bipe.bias(6, 6, q_positions=segment, k_positions=segment)
    numbers = [0, 0, 1, 1, 1, 2]
    for h, slope in enumerate((2.0**-4, 2.0**-8)):
        expected = torch.tensor([[-96 * slope * abs(i - j) for j in numbers] for i in numbers])
        torch.testing.assert_close(bias[h], expected)


def test_bipe_rope_turns_by_segment_numbers():
    bipe = BiPE.with_rope(4, dim=8, max_segment_length=4)
    segment = torch.tensor([[0, 0, 1, 2]])
    context = Context(4, 4, 2, 4, CPU, torch.float64, q_positions=segment, k_positions=segment)
    cos = bipe.lower(context).rotary.k_cos[0, :, 0]
    torch.testing.assert_close(cos, segment[0].double().cos())


def test_bipe_cuts_segments_that_its_embedding_cannot_hold():
    bipe = BiPE.with_rope(4, dim=8, max_segment_length=3)
    index, segment = bipe.segments(torch.zeros(1, 7, dtype=torch.int64), [9])
    assert segment.tolist() == [[0, 0, 0, 1, 1, 1, 2]]
    assert bipe.intra(index).shape == (1, 7, 8)


def test_bipe_needs_segment_numbers():
    with pytest.raises(ValueError, match=r"q_positions, k_positions: BiPE expects the segment number of every token"):
        BiPE.with_alibi(2, dim=8, max_segment_length=4).bias(3, 3)
