"""Statistics, heat maps, the report and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from posattn import cli
from posattn.experiments import main, report
from posattn.experiments.contestants import DECODERS
from posattn.experiments.heatmaps import added
from posattn.experiments.model import Transformer
from posattn.experiments.presets import PRESETS, Shape
from posattn.experiments.statistics import (
    accuracy_table,
    distance_trend,
    half_width,
    losses_frame,
    paired,
    perplexity_table,
)

FEW = ["--encodings", "Kerple;DAPE-Kerple", "--tasks", "bucket sort;binary addition"]


def result(name: str, seed: int, losses: dict[str, list[float]]) -> dict[str, Any]:
    return {"train_length": 16, "contestant": name, "seed": seed, "losses": losses}


def test_perplexities_and_their_intervals() -> None:
    results = [result("A", seed, {"16": [math.log(2.0 + seed)] * 2}) for seed in range(3)]
    (row,) = perplexity_table(losses_frame(results)).to_dict("records")
    assert row["perplexity"] == pytest.approx(3.0)
    assert row["half_width"] == pytest.approx(stats.t.ppf(0.975, 2) / math.sqrt(3))
    assert math.isnan(half_width([1.0]))


def test_a_paired_test_sees_a_small_difference_that_all_windows_share() -> None:
    random = np.random.default_rng(0)
    windows = random.normal(2.0, 1.0, 20)
    shift = random.normal(0.05, 0.01, 20)
    results = [
        one
        for seed in range(2)
        for one in (
            result("A", seed, {"32": list(windows)}),
            result("B", seed, {"32": list(windows + shift)}),
        )
    ]
    test = paired(losses_frame(results), "A", "B", 32)
    assert test.difference == pytest.approx(shift.mean())
    assert test.low < shift.mean() < test.high
    assert test.p == pytest.approx(stats.ttest_rel(windows + shift, windows).pvalue)
    assert test.p_wilcoxon < 1e-4
    assert test.seeds == "2 of 2"
    assert paired(losses_frame(results), "B", "A", 32).difference == pytest.approx(-shift.mean())


def test_equal_losses_have_no_p() -> None:
    results = [result(name, 0, {"32": [1.0, 2.0]}) for name in "AB"]
    assert math.isnan(paired(losses_frame(results), "A", "B", 32).p)


def test_best_and_mean_of_seeds() -> None:
    results = [
        {"task": "t", "contestant": "A", "seed": seed, "accuracies": {"41": x, "500": x / 2}}
        for seed, x in enumerate((0.4, 0.8))
    ]
    (row,) = accuracy_table(results).to_dict("records")
    assert (row["best"], row["mean"], row["seeds"]) == (pytest.approx(60.0), pytest.approx(45.0), 2)


def test_local_heads_have_a_falling_trend() -> None:
    assert distance_trend([1.0, 2.0, 3.0]) == pytest.approx(-1.0)  # the nearest key is the last
    assert distance_trend([3.0, 2.0, 1.0]) == pytest.approx(1.0)
    assert distance_trend([1.0, 1.0]) == 0.0


@pytest.mark.parametrize("name", ["ALiBi", "FIRE", "DAPE-Kerple", "DAPE-ALiBi"])
def test_what_is_added_is_what_the_softmax_sees(name: str) -> None:
    """The last query's logits with the encoding, less those without, from the reference's own weights."""
    torch.manual_seed(0)
    model = Transformer(Shape(2, 4, 8), 256, None, DECODERS[name], 16, True, seed=3, backend="reference").double()
    tokens = torch.randint(256, (20,))
    found = added(model, tokens, name)
    assert [one.layer for one in found] == [0, 1]
    x = model.embed(tokens[None])
    for one, block in zip(found, model.layers()):
        from posattn import weights

        q, k, _ = block.attention.split(block.norm_attention(x))
        with_it = weights(q, k, block.attention.encoding, causal=True, rows=torch.tensor([19]))[0, :, 0].log()
        without = weights(q, k, causal=True, rows=torch.tensor([19]))[0, :, 0].log()
        seen, computed = with_it - without, one.values
        torch.testing.assert_close(seen - seen[:, :1], computed - computed[:, :1], rtol=1e-8, atol=1e-8)
        x = block(x)


def test_a_rotary_encoding_adds_nothing() -> None:
    model = Transformer(Shape(1, 4, 8), 256, None, DECODERS["RoPE"], 16, True, seed=3)
    assert added(model, torch.randint(256, (20,)), "RoPE") == []


def test_the_whole_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["all", "--preset", "smoke", "--out", str(tmp_path), *FEW, "--remark", "A <remark>."]) == 0
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    for text in (
        "trained at 16",
        "DAPE-Kerple over Kerple",
        "bucket sort †",
        "f(B)",
        "anti-local",
        "A &lt;remark&gt;.",
    ):
        assert text in page
    assert "http" not in page.replace("http://www.w3.org", "")
    data = json.loads((tmp_path / "report.json").read_text())
    assert len(data["extrapolation"]) == 4
    assert {one["size"] for one in data["ablations"]} == {"", "small"}
    assert data["about"]["preset"] == "smoke"
    assert all(row["train fused"] > 0 for row in data["speed"]["rows"])
    # Again: nothing is trained, and the page says the same of the runs.
    assert main(["extrapolation", "--preset", "smoke", "--out", str(tmp_path), *FEW]) == 0
    assert (
        json.loads((tmp_path / "report.json").read_text())["extrapolation"] == report.collect(tmp_path)["extrapolation"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["extrapolation", "--encodings", "Rope"], "--encodings: expected some of NoPE, sinusoidal, RoPE"),
        (["chomsky", "--tasks", "sort"], "--tasks: expected some of even pairs"),
        (["extrapolation", "--train-length", "100"], "--train-length: expected some of 128, 512, got 100"),
        (["extrapolation", "--device", "abacus"], "--device: expected one that torch has here, got 'abacus'"),
        (["report"], "--out: expected a folder with finished experiments"),
        (["extrapolation", "--seeds", "0"], "expected a positive integer"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["experiments", *arguments, "--out", str(tmp_path)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_other_settings_in_the_folder_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["extrapolation", "--preset", "smoke", "--encodings", "NoPE", "--seeds", "1", "--out", str(tmp_path)]
    assert main(given) == 0
    with pytest.raises(SystemExit):
        main([*given, "--steps", "5"])
    assert "whose training is different; choose another --out" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_in_a_browser(width: int, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    import shutil

    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no Chromium here")
    main(["all", "--preset", "smoke", "--out", str(tmp_path), *FEW])
    problems: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: problems.append(message.text))
        page.on(
            "request",
            lambda request: None if request.url.startswith(("file:", "data:")) else problems.append(request.url),
        )
        page.goto((tmp_path / "report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        browser.close()
    assert problems == []


def test_presets_are_what_the_papers_train() -> None:
    paper = PRESETS["paper-125m"]
    with torch.device("meta"):
        model = Transformer(paper.extrapolation.shape, 50304, None, DECODERS["RoPE"], 512, True, seed=0)
    assert 120e6 < sum(p.numel() for p in model.parameters()) < 130e6
    assert set(paper.extrapolation.training) == {128, 512}
    assert max(paper.chomsky.lengths) == 500
