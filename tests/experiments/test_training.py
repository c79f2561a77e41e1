"""Training: the fused step is the eager one, runs go on to the same bits, and every token is scored once."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import posattn
from posattn.demo.corpus import Corpus
from posattn.experiments import chomsky, extrapolation
from posattn.experiments.chomsky_tasks import TASKS
from posattn.experiments.contestants import DECODERS, ENCODERS, Contestant, ablations
from posattn.experiments.model import Transformer
from posattn.experiments.presets import PRESETS, Shape, Training
from posattn.experiments.runs import OtherSettings, Run
from posattn.experiments.training import rate, train

SHAPE = Shape(layers=2, heads=4, head_dim=8)
SMOKE = PRESETS["smoke"]
TRAINED = {name: one for name, one in (DECODERS | ablations((4,))).items() if one.trained_as is None}


def decoder(contestant: Contestant, backend: str = "auto", causal: bool = True) -> Transformer:
    return Transformer(SHAPE, 256, None, contestant, 16, causal, seed=1, backend=backend)


def gradients(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_step_is_the_eager_one(name: str) -> None:
    tokens = torch.randint(256, (2, 40))
    fused, eager, exact = (decoder(TRAINED[name], backend) for backend in ("auto", "reference", "reference"))
    exact.double()
    for got, naive, truth in zip(*(gradients(model, tokens) for model in (fused, eager, exact))):
        error, allowed = ((x.double() - truth).abs().max() for x in (got, naive))
        assert error <= 4 * allowed + 1e-6 * truth.abs().max() + 1e-9


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_sees_both_sides(name: str) -> None:
    model = Transformer(SHAPE, 6, 5, ENCODERS[name], 16, causal=False, seed=1)
    tokens = torch.randint(6, (1, 12))
    later = tokens.clone()
    later[0, -1] = (later[0, -1] + 1) % 6
    assert not torch.equal(model(tokens)[0, 0], model(later)[0, 0])


def test_all_contestants_begin_alike() -> None:
    first, *others = [
        {key: value for key, value in decoder(one).state_dict().items() if ".encoding." not in key}
        for one in TRAINED.values()
    ]
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)


def test_f_of_b_is_the_network_of_the_bias_alone() -> None:
    encoding = ablations((4,))["f(B)"].make(SHAPE, 16)
    assert encoding is not None
    bias = encoding.inner.bias(5, 9)
    expected = bias + encoding.mlp(bias.movedim(0, -1)).movedim(-1, 0)
    torch.testing.assert_close(encoding.bias(5, 9), expected)
    for inner in (posattn.RoPE(8), posattn.ALiBi(4)):
        from posattn.experiments.static_mix import StaticMix

        with pytest.raises(ValueError, match="inner: expected an encoding whose bias is a table alone"):
            StaticMix(inner, 4).bias(5, 9)


class Stopped(Exception):
    pass


def quadratic(stop_at: int | None = None) -> Any:
    """A loss with a batch of its own each step, that stops where it is told to."""
    steps = 0

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        nonlocal steps
        if steps == stop_at:
            raise Stopped
        steps += 1
        x = torch.randn(4, 3, generator=generator)
        return (model(x) - x.sum(1, keepdim=True)).square().mean() + 0.0 * torch.rand(())

    return loss


TRAINING = Training(steps=12, batch=4, rate=0.1, warmup=3, checkpoint_seconds=0.0)


def fitted(run: Run, stop_at: int | None = None) -> list[Tensor]:
    torch.manual_seed(7)
    model = nn.Linear(3, 1)
    train(model, quadratic(stop_at), TRAINING, 5, run, "")
    return [p.detach().clone() for p in model.parameters()]


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = fitted(Run(tmp_path / "whole", {}))
    with pytest.raises(Stopped):
        fitted(Run(tmp_path / "stopped", {}), stop_at=5)
    # A line of a step that no checkpoint has, and one cut short.
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step"')
    assert all(torch.equal(a, b) for a, b in zip(whole, fitted(Run(tmp_path / "stopped", {}))))
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "stopped")]
    assert lines[0] == lines[1]
    assert [json.loads(line)["step"] for line in lines[0].splitlines()] == list(range(12))


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        return model(torch.ones(1, 3)).sum() * math.nan

    with pytest.raises(RuntimeError, match="this one: the loss of step 0 is nan"):
        train(nn.Linear(3, 1), loss, TRAINING, 5, Run(tmp_path, {}), "this one")


def test_other_settings_are_refused(tmp_path: Path) -> None:
    Run(tmp_path, {"seed": 1, "shape": SHAPE, "lengths": (1, 2)})
    Run(tmp_path, {"seed": 1, "shape": SHAPE, "lengths": (1, 2)})
    with pytest.raises(OtherSettings, match="whose seed, shape is different"):
        Run(tmp_path, {"seed": 2, "shape": replace(SHAPE, layers=3), "lengths": (1, 2)})


def test_the_rate_warms_up_and_falls_to_a_tenth() -> None:
    rates = [rate(step, TRAINING) for step in range(12)]
    assert rates[0] == pytest.approx(1 / 3)
    assert max(rates) == rates[2]
    assert rate(12, TRAINING) == pytest.approx(0.1)


class Bigram(nn.Module):
    """Logits of the present byte alone, so that a longer input can change nothing."""

    def forward(self, tokens: Tensor, last: int | None = None) -> Tensor:
        table = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
        return table[tokens][:, -(last or tokens.shape[1]) :]


def test_every_length_scores_the_same_bytes() -> None:
    text = torch.randint(0, 256, (5000,)).to(torch.uint8)
    lengths = (16, 64, 200, 1000)
    found = [
        extrapolation.losses_of(Bigram(), text, n, lengths, windows=3, scored=64, device="cpu")  # type: ignore[arg-type]
        for n in lengths
    ]
    for losses in found:
        assert losses == pytest.approx(found[0], rel=1e-5)


def corpus() -> Corpus:
    generator = torch.Generator().manual_seed(4)
    train_text, held_out = (torch.randint(97, 105, (400,), generator=generator).to(torch.uint8) for _ in range(2))
    return Corpus(train_text, held_out, "letters")


def test_a_finished_run_is_read_and_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = extrapolation.Setting(tmp_path, corpus(), "auto", "cpu")
    first = extrapolation.run_all(SMOKE.extrapolation, ["RoPE", "RoPE, NTK", "RoPE, YaRN"], 1, [16], setting)
    monkeypatch.setattr(extrapolation, "train", None)
    second = extrapolation.run_all(SMOKE.extrapolation, ["RoPE", "RoPE, NTK", "RoPE, YaRN"], 1, [16], setting)
    assert first == second
    plain, ntk, yarn = (result["losses"] for result in first)
    assert plain["16"] == ntk["16"] == yarn["16"]  # trained length: the same model
    assert plain["64"] != ntk["64"] != yarn["64"]
    assert first[0]["train_seconds"] > 0.0
    assert first[1]["train_seconds"] is None


def test_an_encoder_learns_what_it_can_and_its_accuracy_counts_symbols(tmp_path: Path) -> None:
    training = Training(steps=60, batch=32, rate=3e-3, warmup=5)
    given = replace(SMOKE.chomsky, training=training, train_length=8, lengths=(9,), tested=64)
    result = chomsky.run_one("bucket sort", "NoPE", 0, given, tmp_path, "auto", "cpu")
    assert result["trained"] > 0.3  # guessing gives 0.2

    class Right(nn.Module):
        def forward(self, tokens: Tensor, last: int) -> Tensor:
            ordered = tokens[:, :-last].sort(1).values.roll(1, 1)  # one symbol too late
            return nn.functional.one_hot(ordered, 5).float()

    task = TASKS["bucket sort"]
    assert 0.3 < chomsky.accuracy(Right(), task, 9, 50, "cpu") < 1.0
