"""The demo: its text, its fairness, its scores and maps, and one small run from end to end."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import posattn
from posattn import demo
from posattn.demo import corpus, train
from posattn.demo.contestants import CONTESTANTS
from posattn.demo.model import BYTES, Decoder, Shape
from posattn.demo.plots import effective_bias

SMALL = Shape(layers=1, heads=4, head_dim=8)


def small_decoder(name: str) -> Decoder:
    return Decoder(SMALL, partial(CONTESTANTS[name], SMALL), seed=1, backend="reference")


class Bigram(nn.Module):
    """Logits that depend on the present byte alone, so that a longer input can change nothing."""

    def forward(self, tokens: Tensor) -> Tensor:
        table = torch.randn(BYTES, BYTES, generator=torch.Generator().manual_seed(0))
        return table[tokens]


def test_standard_library_is_long_enough_and_its_parts_are_disjoint() -> None:
    text = corpus.load(None, shortest=4 * max(train.EVAL_LENGTHS))
    assert text.train.dtype == text.held_out.dtype == torch.uint8
    probe = bytes(text.held_out[:4096].tolist())
    assert probe not in bytes(text.train.tolist())


def test_a_text_file_is_cut_into_training_and_held_out_bytes(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(bytes(range(250)) * 4)
    text = corpus.load(path, shortest=100)
    assert torch.cat([text.train, text.held_out]).tolist() == list(path.read_bytes())
    assert len(text.held_out) == 100


def test_a_short_text_is_an_error_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="text: expected at least 2049 bytes"):
        corpus.load(path, shortest=2049)


def test_all_contestants_start_from_the_same_weights() -> None:
    first, *others = [
        {key: value for key, value in small_decoder(name).state_dict().items() if ".encoding." not in key}
        for name in CONTESTANTS
    ]
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[key], other[key]) for key in first)


def test_every_length_scores_the_same_bytes() -> None:
    text = torch.randint(0, BYTES, (5000,), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    perplexity = train.perplexities(Bigram(), text, windows=3, label="")
    assert list(perplexity) == list(train.EVAL_LENGTHS)
    assert list(perplexity.values()) == pytest.approx([perplexity[128]] * len(perplexity), rel=1e-4)


def test_training_learns() -> None:
    text = torch.tensor(list(b"the same few words again and again, " * 50), dtype=torch.uint8)
    losses = train.train(small_decoder("ALiBi"), text, steps=40, seed=0, label="")
    assert losses[-1] < losses[0] - 1.0


@pytest.mark.parametrize("name", [name for name in CONTESTANTS if name != "RoPE"])
@torch.no_grad()
def test_maps_show_what_the_encoding_adds(name: str) -> None:
    """Logits plus map, through a softmax, are the attention itself."""
    model = small_decoder(name)
    tokens = torch.arange(37) * 5 % BYTES
    what, maps = effective_bias(model, tokens)
    assert what == "head"
    layer = model.layers()[0]
    q, k, v = layer.attention.split(layer.norm_attention(model.embedding(tokens[None])))
    logits = (q @ k.transpose(-1, -2)) * SMALL.head_dim**-0.5 + maps
    future = torch.ones(37, 37, dtype=torch.bool).triu(1)
    expected = logits.masked_fill(future, -torch.inf).softmax(-1) @ v
    out = posattn.attention(q, k, v, layer.attention.encoding, causal=True, backend="reference")
    torch.testing.assert_close(out, expected)


@torch.no_grad()
def test_a_rotary_map_depends_on_the_distance_alone() -> None:
    what, maps = effective_bias(small_decoder("RoPE"), torch.arange(37) * 5 % BYTES)
    assert what == "pair"
    torch.testing.assert_close(maps[:, 0, 0], torch.ones(SMALL.head_dim // 2))
    torch.testing.assert_close(maps[:, 5:, 5:], maps[:, :-5, :-5])


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--encodings", "ALiBi", "--steps", "2", "--windows", "1", "--backend", "cpu", "--out", str(tmp_path)]
    assert demo.main(arguments) == 0
    report = json.loads((tmp_path / "results.json").read_text())
    result = report["encodings"]["ALiBi"]
    assert [int(length) for length in result["perplexity"]] == list(train.EVAL_LENGTHS)
    assert len(result["losses"]) == 2
    assert 0 < result["fused"]["memory"] < result["naive"]["memory"]
    for picture in ("perplexity.png", "biases.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert "ALiBi" in capsys.readouterr().out.splitlines()[-3]


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--encodings", "RoPE,Rope"]])
def test_bad_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert "expected" in capsys.readouterr().err
