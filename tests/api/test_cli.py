"""The command line: what it prints, what it writes, and its exit status."""

from __future__ import annotations

import importlib.metadata
import sys
import types

import pytest
import torch

import posattn
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
    assert capsys.readouterr().out.split("\n")[:-1] == list(parity.examples(4, 64, 128, every=True))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plot", "nothing"])
    assert stopped.value.code == 2
    assert "ENCODING: expected module:name or one of DAPE, " in one_line(capsys)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plot"])
    assert stopped.value.code == 2
    assert "ENCODING: expected a name (--list shows them) or module:name, got none" in one_line(capsys)


def test_plot_without_matplotlib_says_what_to_install(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["plot", "ALiBi", "--tokens", "4", "--out", str(tmp_path / "x.png")]) == 1
    assert "pip install matplotlib tqdm" in capsys.readouterr().err


def test_the_maps_of_an_additive_encoding_are_its_bias():
    for name in ("ALiBi", "Kerple", "T5Bias", "FIRE"):
        position = parity.examples(3, 8, 16)[name]
        maps = plot.maps_of(position, 3, 8, 16)
        torch.testing.assert_close(maps.values, position.double().bias(16, 16).detach())
        assert maps.panels == ("head 0", "head 1", "head 2")
        assert maps.caption == "colour: what is added to the logit"


def test_the_maps_of_far_segments_are_finite():
    """Where a softmax has only zeros to show: BiPE's slopes are 96 times ALiBi's."""
    position = parity.examples(3, 8, 400)["BiPE-ALiBi"]
    maps = plot.maps_of(position, 3, 8, 400)
    segment = torch.arange(400) // 3
    expected = -position.inter.slopes[0] * (segment[:, None] - segment).abs()
    assert expected.min() < -745.0  # whose exponential is 0 in float64
    torch.testing.assert_close(maps.values[0], expected.double())
    assert maps.caption.endswith("; segments of three tokens")


def test_the_maps_of_a_rotary_encoding_are_cosines():
    position = parity.examples(3, 16, 32)["RoPE"]
    maps = plot.maps_of(position, 3, 16, 32)
    assert maps.panels == ("pair 0 of 8", "pair 2 of 8", "pair 4 of 8", "pair 7 of 8")
    assert maps.caption.startswith("adds nothing; colour: cosine")
    distance = (torch.arange(32)[:, None] - torch.arange(32)).double()
    torch.testing.assert_close(maps.values[1], torch.cos(distance * 10000.0 ** (-2 * 2 / 16)))


def test_the_maps_of_dape_are_of_random_logits():
    position = parity.examples(3, 16, 32)["DAPE-RoPE-FIRE"]
    maps = plot.maps_of(position, 3, 16, 32)
    assert "which depends on the logits: here of random q and k; not shown: q and k are turned too" in maps.caption
    assert not torch.equal(maps.values, plot.maps_of(position, 3, 16, 32, seed=1).values)
    with torch.no_grad():
        position.mlp[2].weight.zero_()
        position.mlp[2].bias.zero_()
    fire = position.inner.parts[1]
    torch.testing.assert_close(plot.maps_of(position, 3, 16, 32).values, fire.bias(32, 32).detach())


def test_every_panel_has_a_colour_scale_of_its_own(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    values = torch.stack([torch.eye(5), 100.0 * torch.eye(5), -3.0 * torch.eye(5)]).double()
    values[2, 0, 1] = -torch.inf
    plot.draw(plot.Maps(values, ("a", "b", "c"), "colour: this"), "title", tmp_path / "x.png")
    images = [image for axes in drawn[0].axes for image in axes.images]
    assert [image.get_clim() for image in images] == [(0.0, 1.0), (0.0, 100.0), (-3.0, 0.0)]
    assert drawn[0].get_suptitle() == "title\ncolour: this; grey: forbidden"


def one_line(capsys):
    """What went to stderr, which is a single line."""
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    return text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("demo --text /nope", "--text: expected a file to read, got none of that name: '/nope'"),
        ("demo --text /", "--text: expected a file to read, got a folder"),
        ("demo --out /proc/nope", "--out: expected a folder that can be made, got '/proc/nope'"),
        ("demo --steps none", "--steps: expected a positive integer, got 'none'"),
        ("plot --out /nope/x.png ALiBi", "--out: expected a file in a folder that is there, got '/nope/x.png'"),
        ("plot --out / ALiBi", "--out: expected a file to write, got a folder"),
        ("plot --out x.nope ALiBi --tokens 4", "--out: expected a file name that ends in one of"),
        ("bench --device cuda", "--device cuda: expected a GPU that torch finds, got none"),
        ("bench --out /proc/nope", "--out: expected a folder that can be made"),
        ("bench --threads 0", "--threads: expected a positive integer, got '0'"),
        ("check nothing", "ENCODING: expected module:name or one of"),
        ("check no.such.module:X", "no.such.module: expected a module that can be imported, got No module named 'no'"),
        ("check nothing.py:X", "nothing.py: expected a file, got none of that name"),
        ("check posattn.encodings:Nope", "expected a name in posattn.encodings, got 'Nope', which is not there"),
        ("check posattn:segment_positions", "which are given, got separators besides; name an instance, or"),
        ("check posattn.cli:COMMANDS", "expected an Encoding, a subclass, or a function that makes one, got tuple"),
        ("fly", "command: invalid choice: 'fly'"),
    ],
)
def test_a_mistake_is_one_line(line, message, capsys):
    if line.startswith("bench --device cuda") and torch.cuda.is_available():
        pytest.skip("it has the GPU that this machine should lack")
    if line.split()[0] in ("demo", "bench") or "x.nope" in line:
        pytest.importorskip("matplotlib")
        pytest.importorskip("tqdm")
    with pytest.raises(SystemExit) as stopped:
        cli.main(line.split())
    assert stopped.value.code == 2
    assert message in one_line(capsys)


def test_a_file_that_may_not_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    for line in (["plot", "ALiBi", "--out", str(tmp_path / "x.png")], ["bench", "--out", str(tmp_path)]):
        with pytest.raises(SystemExit):
            cli.main(line)
        assert "writing is not allowed" in one_line(capsys)


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"posattn {posattn.__version__}\n"
    assert posattn.__version__ == importlib.metadata.version("posattn")


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
    assert "posattn demo needs tqdm: pip install matplotlib tqdm" in capsys.readouterr().err


def test_an_unknown_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fly"])
    assert stopped.value.code == 2
