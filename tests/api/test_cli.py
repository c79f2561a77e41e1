"""The command line: what it prints, what it writes, and its exit status."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from posattn import cli, parity, plot
from posattn.parity import Comparison


def test_info_names_versions_backends_and_threads(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for word in (torch.__version__, "cpu", "cuda", "triton", "reference", "threads", "available"):
        assert word in text
    if not torch.cuda.is_available():
        assert "unavailable: " in text


def test_info_says_why_a_backend_is_missing(capsys, monkeypatch):
    monkeypatch.setattr("posattn.backends.load", lambda name: "it cannot be imported: broken wheel")
    assert cli.main(["info"]) == 0
    assert "unavailable: it cannot be imported: broken wheel" in capsys.readouterr().out


def test_check_prints_a_row_per_encoding_and_passes(capsys):
    assert cli.main(["check", "--tokens", "9", "--head-dim", "8", "--heads", "2", "--dtype", "float32"]) == 0
    text = capsys.readouterr().out
    for name in ("none", *parity.examples(2, 8, 9)):
        assert f"\n{name} " in text


def test_check_fails_with_a_backend_that_is_wrong(capsys, monkeypatch):
    wrong = Comparison("out", 1.0, 1e-7, 2e-7, "out[0]: got 1, expected 0")
    monkeypatch.setattr(parity, "measure", lambda *arguments: [wrong])
    assert cli.main(["check", "--tokens", "5", "--head-dim", "8", "--heads", "2", "--dtype", "float32"]) == 1
    text = capsys.readouterr().out
    assert "FAILED out[0]: got 1, expected 0" in text
    assert "failed" in text.splitlines()[-1]


def test_check_fails_without_any_backend(capsys, monkeypatch):
    monkeypatch.setattr("posattn.backends.load", lambda name: "it cannot be imported: broken wheel")
    assert cli.main(["check"]) == 1
    assert "posattn info" in capsys.readouterr().out


@pytest.mark.parametrize("command", [("check",), ("plot", "ALiBi")], ids=["check", "plot"])
@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (("--heads", "0"), "num_heads: expected a positive int, got 0"),
        (("--tokens", "0"), "expected a positive int, got 0"),
        (("--head-dim", "7"), "expected an even number up to head_dim=7"),
    ],
)
def test_sizes_that_an_encoding_refuses_are_usage_errors(command, option, reason, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, *option])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert " ".join(option) in message
    assert reason in message


@pytest.mark.parametrize("name", ["Kerple", "rope", "DAPE-Kerple", "BiPE-ALiBi"])
def test_plot_writes_a_picture(name, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "bias.png"
    assert cli.main(["plot", name, "--out", str(path), "--tokens", "12", "--heads", "3", "--head-dim", "8"]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_lists_and_names_what_it_knows(capsys):
    assert cli.main(["plot", "--list"]) == 0
    assert capsys.readouterr().out.split("\n")[:-1] == list(parity.examples(4, 64, 128))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plot", "nothing"])
    assert stopped.value.code == 2
    assert "ENCODING: expected one of" in capsys.readouterr().err


def test_plot_without_matplotlib_says_what_to_install(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["plot", "ALiBi", "--tokens", "4", "--out", str(tmp_path / "x.png")]) == 1
    assert "pip install 'posattn[plot]'" in capsys.readouterr().err


def test_the_plotted_bias_of_an_additive_encoding_is_its_bias():
    torch.manual_seed(0)
    for name in ("ALiBi", "Kerple", "T5Bias", "FIRE"):
        position = parity.examples(3, 8, 16)[name]
        torch.testing.assert_close(
            plot.effective_bias(position, 3, 8, 16), position.double().bias(16, 16).detach(), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_other_commands_get_the_rest_of_the_line(command, monkeypatch):
    seen = []
    module = types.SimpleNamespace(main=lambda argv: seen.append(list(argv)) or 3)
    monkeypatch.setitem(sys.modules, f"posattn.{command}", module)
    assert cli.main([command, "--steps", "2", "x"]) == 3
    assert seen == [["--steps", "2", "x"]]


def test_a_missing_extra_is_named(capsys, monkeypatch):
    def load(name):
        raise ModuleNotFoundError("No module named 'tqdm'", name="tqdm")

    monkeypatch.setattr(cli.importlib, "import_module", load)
    assert cli.main(["demo"]) == 1
    assert "posattn demo needs tqdm: pip install 'posattn[plot]'" in capsys.readouterr().err


def test_an_unknown_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fly"])
    assert stopped.value.code == 2
