"""The demo: its text, its fairness, its scores and maps, and one small run from end to end."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import posattn
from posattn import demo
from posattn.demo import corpus, plots, train
from posattn.demo.contestants import CONTESTANTS
from posattn.demo.model import BYTES, Decoder, Shape
from posattn.demo.plots import effective_bias

measure = importlib.import_module("posattn.demo.measure")  # the package's own name for it is a function
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


def test_off_a_terminal_there_are_no_progress_bars(capsys: pytest.CaptureFixture[str]) -> None:
    text = torch.randint(0, BYTES, (5000,), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    train.train(small_decoder("ALiBi"), text, steps=2, seed=0, label="ALiBi")
    train.perplexities(Bigram(), text, windows=1, label="ALiBi")
    assert capsys.readouterr() == ("", "")


def test_training_learns() -> None:
    text = torch.tensor(list(b"the same few words again and again, " * 50), dtype=torch.uint8)
    losses = train.train(small_decoder("ALiBi"), text, steps=40, seed=0, label="")
    assert losses[-1] < losses[0] - 1.0


def test_what_cannot_be_guessed_is_not_learned() -> None:
    text = torch.randint(0, BYTES, (4000,), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    losses = train.train(small_decoder("ALiBi"), text, steps=40, seed=0, label="")
    assert losses[-1] > 5.0  # the byte that is read, not the next one, would be known by now


@pytest.mark.parametrize("name", list(CONTESTANTS))
@torch.no_grad()
def test_the_encoding_takes_part(name: str) -> None:
    model, tokens = small_decoder(name), torch.arange(40)[None] * 7 % BYTES
    before = model(tokens)
    for module in model.modules():
        if hasattr(module, "encoding"):
            module.encoding = None
    assert (model(tokens) - before).abs().max() > 1e-6


@pytest.mark.parametrize("name", list(CONTESTANTS))
@torch.no_grad()
def test_no_byte_sees_those_after_it(name: str) -> None:
    model = small_decoder(name)
    tokens = torch.arange(40)[None] * 7 % BYTES
    changed = tokens.clone()
    changed[:, 25:] = 3
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :25], after[:, :25])
    assert (before[:, 25:] - after[:, 25:]).abs().amax(-1).min() > 1e-6
    assert (model(tokens[:, 5:])[:, -1] - before[:, -1]).abs().max() > 1e-6  # and it sees those before


def test_the_schedule_warms_up_and_falls_to_a_tenth() -> None:
    rates = [train._rate(step, 300) for step in range(301)]
    assert rates[0] == pytest.approx(1 / train.WARMUP_STEPS, rel=1e-3)
    assert rates[9] == pytest.approx(0.5, rel=1e-2)
    assert max(rates) == pytest.approx(1.0, rel=2e-2)
    assert rates.index(max(rates)) == train.WARMUP_STEPS - 1
    assert rates[150] == pytest.approx(0.55)
    assert rates[300] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates[train.WARMUP_STEPS - 1 :]))


def test_training_steps_follow_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *arguments: Any) -> Any:
        seen.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    text = torch.randint(0, BYTES, (1000,), dtype=torch.uint8)
    losses = train.train(small_decoder("ALiBi"), text, steps=4, seed=0, label="")
    assert seen == pytest.approx([train.LEARNING_RATE * train._rate(i, 4) for i in range(4)])
    assert losses[0] == pytest.approx(5.55, abs=0.3)  # ln 256 at the start: the loss is in nats a byte


def test_perplexity_is_that_of_the_next_byte() -> None:
    """A model that gives the right byte a chance of 1/2 has perplexity 2, whatever the length."""

    class Knows(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            sure = torch.full((*tokens.shape, BYTES), math.log(0.5 / (BYTES - 1)))
            return sure.scatter(-1, ((tokens + 1) % BYTES)[..., None], math.log(0.5))

    text = (torch.arange(5000) % BYTES).to(torch.uint8)
    assert list(train.perplexities(Knows(), text, 3, "").values()) == pytest.approx([2.0] * len(train.EVAL_LENGTHS))


def test_the_cost_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median, of calls that are causal, on the backend asked for, with a backward pass in `both` alone."""
    clock = 0.0
    made: list[tuple[int, str, bool, bool]] = []
    peaks: list[bool] = []
    pace = iter((9.0, 1.0, 0.5, 1.0, 9.0))
    right = posattn.attention

    def watched(q: Tensor, *arguments: Any, **options: Any) -> Tensor:
        nonlocal clock
        made.append((q.shape[2], options["backend"], options["causal"], torch.is_grad_enabled()))
        out = right(q, *arguments, **{**options, "backend": "reference"})
        if out.requires_grad:
            out.register_hook(lambda grad: spend(100.0))
        spend(0.1)
        return out

    def spend(seconds: float) -> None:
        nonlocal clock
        clock += seconds

    def peak(call: Callable[[], object]) -> float:
        call()
        peaks.append(True)
        return 7.0

    monkeypatch.setattr(measure.posattn, "attention", watched)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock)
    monkeypatch.setattr(measure, "extra_peak", peak)
    monkeypatch.setattr(measure, "PATIENCE", 1e9)
    cost = measure._run(measure.Request("ALiBi", 40, 1, "cpu"))
    assert cost == measure.Cost(pytest.approx(0.1), pytest.approx(100.1), 7.0)
    assert (
        made
        == [(16, "cpu", True, True)]
        + [(40, "cpu", True, True)]
        + [(40, "cpu", True, False)] * 5
        + [(40, "cpu", True, True)] * 5
    )
    assert peaks == [True]

    def uneven() -> None:
        spend(next(pace))

    assert measure._median_seconds(uneven, []) == 1.0


def test_the_table_shows_a_training_step_and_its_memory() -> None:
    costs = {
        "fused": {"forward": 1.0, "both": 2.0, "memory": 3.0},
        "naive": {"forward": 4.0, "both": 5.0, "memory": 6.0},
    }
    text = demo.table({"ALiBi": {"perplexity": dict.fromkeys(train.EVAL_LENGTHS, 1.5), **costs}}, 2048)
    assert text.splitlines()[-1].split() == ["ALiBi", *["1.50"] * 5, "2000", "ms", "3", "MB", "5000", "ms", "6", "MB"]


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


def test_names_at_the_ends_of_lines_do_not_lie_on_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    ends = {"a": 30.0, "b": 6.0, "c": 6.01, "d": 6.02, "e": 5.9}
    plots.plot_perplexity({name: {128: 7.0, 2048: end} for name, end in ends.items()}, tmp_path / "x.png")
    (axes,) = drawn[0].axes
    names = [text for text in axes.texts if text.get_text() in ends]
    assert [text.get_text() for text in names] == ["e", "b", "c", "d", "a"]
    drawn[0].draw_without_rendering()
    boxes = [text.get_window_extent() for text in names]
    assert not any(one.overlaps(other) for one, other in pairwise(boxes))
    colours = [line.get_color() for line in axes.lines]
    assert {text.get_text(): text.get_color() for text in names} == dict(zip(ends, colours))


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
