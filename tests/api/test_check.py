"""posattn.check and `posattn check module:name`: posattn's own pass, and each thing that may be wrong is found."""

from __future__ import annotations

import copy
import sys
import textwrap

import pytest
import torch
from torch import nn

import posattn
from posattn import cli, parity, targets
from posattn.encodings import Encoding
from posattn.plan import Bias, Plan, Rotary, Slope, Table

F32 = (torch.float32,)
HEADS = 4


class Gaussian(Encoding):
    """b[h](d) = -(d / width_h)^2, as it should be."""

    def __init__(self, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.width = nn.Parameter(torch.full((num_heads,), 20.0))

    def values(self, context):
        dtype = context.table_dtype(self.width)
        return -((context.distances() / self.width.to(dtype)[:, None]) ** 2)

    def build(self, context):
        return Plan(bias=Bias(table=Table(self.values(context), context.distance_range[0])))


@pytest.mark.parametrize("name", ["ALiBi learnable", "DAPE-RoPE-FIRE", "RoPE partial", "BiPE-RoPE", "RelativeTable2D"])
def test_posattns_own_are_as_they_should_be(name):
    position = parity.examples(HEADS, 16, 40)[name]
    before = copy.deepcopy(position.state_dict())
    report = posattn.check(position, tokens=40, head_dim=16, dtypes=F32)
    assert report, str(report)
    assert report.ok
    assert all(torch.equal(value, before[key]) for key, value in position.state_dict().items())
    text = str(report)
    assert text.endswith("all is as it should be")
    assert len(text.splitlines()) == len(report.findings) + 2
    backends = {finding.what for finding in report.findings} & {f"{b}, float32" for b in ("cpu", "cuda", "triton")}
    assert len(backends) == len(parity.available("cpu", torch.float32)) or torch.cuda.is_available()


def test_of_every_dtype_and_with_the_head_dimension_of_a_rotary_part():
    report = posattn.check(posattn.RoPE(24) + Gaussian(3), tokens=20)
    assert report, str(report)
    assert "3 heads of 24, 20 tokens" in report.name
    assert {"cpu, float32", "cpu, bfloat16", "cpu, float16"} <= {finding.what for finding in report.findings}


class WrongShape(Gaussian):
    def values(self, context):
        return super().values(context)[0]


class ImplicitLengthOnly(Gaussian):
    """Counts from the call's length, whatever the positions and lengths are."""

    def values(self, context):
        return super().values(context) * context.k_len


class AnyHeads(Gaussian):
    def forward(self, context):
        plan = self.build(context)
        return Plan(bias=Bias(table=Table(plan.bias.table.values[:1], plan.bias.table.first)))


class AwayFromTheModel(Gaussian):
    """A tensor made on the CPU that neither moves with the module nor asks for the context's device."""

    def __init__(self, num_heads):
        super().__init__(num_heads)
        self.constant = torch.ones(num_heads, 1)

    def values(self, context):
        return super().values(context) * self.constant


class LeftBehind(Gaussian):
    """A plan of the CPU, wherever the call is."""

    def values(self, context):
        first, count = context.distance_range
        return -torch.arange(float(first), float(first + count)).abs().expand(self.num_heads, -1)


class CutOff(Gaussian):
    def values(self, context):
        width = self.width.detach().to(context.table_dtype(self.width))[:, None]
        return -((context.distances() / width) ** 2) + 0.0 * self.width.sum()


class Infinite(Gaussian):
    def values(self, context):
        distance = (context.distances() / self.width.to(context.table_dtype(self.width))[:, None]).abs()
        return -distance.sqrt()  # whose slope at 0 is infinite


class Unsaved(Gaussian):
    """What counts is in no state_dict."""

    def __init__(self, num_heads):
        super().__init__(num_heads)
        self.factor = nn.Parameter(torch.ones(1))

    def state_dict(self, *args, **kwargs):
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name != "factor"}

    def load_state_dict(self, state_dict, strict=True, assign=False):
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def values(self, context):
        return super().values(context) * self.factor.to(context.table_dtype(self.factor))


class Narrow(Gaussian):
    def values(self, context):
        return -self.width[:, None] * (context.distances().to(self.width.dtype) / 400.0) ** 2


class Forgetful(Gaussian):
    """Another answer with every call."""

    def values(self, context):
        return super().values(context) + torch.rand(self.num_heads, 1, dtype=context.table_dtype(self.width))


class NoPlan(Gaussian):
    def build(self, context):
        return self.values(context), 0


@pytest.mark.parametrize(
    ("kind", "what", "detail"),
    [
        (WrongShape, "plan", "ArgumentValueError: position: expected bias.table.values"),
        (NoPlan, "plan", "ArgumentTypeError: position: expected NoPlan.build to return a Plan, got tuple"),
        (ImplicitLengthOnly, "batches and documents", "a padded sequence differs from it alone by up to"),
        (AnyHeads, "sizes", "made for num_heads=4, and 5 heads are not refused"),
        (AwayFromTheModel, "device", "RuntimeError"),
        (LeftBehind, "device", "expected bias.table.values of the plan of LeftBehind to be on meta like q, got cpu"),
        (CutOff, "gradients", "along one way width changes the result by"),
        (Infinite, "gradients", "the gradient of width is not finite"),
        (Unsaved, "state", "a copy with its state_dict differs from the original by up to"),
        (Narrow, "narrow parameters", "bias.table.values is torch.bfloat16 where parameters are torch.bfloat16"),
        (Forgetful, "cpu, float32", ""),
    ],
)
def test_what_is_wrong_is_found(kind, what, detail):
    report = posattn.check(kind(HEADS), tokens=20, dtypes=F32)
    assert not report
    found = {finding.what: finding for finding in report.findings}
    assert not found[what].ok
    assert detail in found[what].detail
    assert "checks failed" in str(report).splitlines()[-1]


class LastBits(Encoding):
    """A backend's result, and not the plan, is what differs from run to run."""

    num_heads = HEADS

    def build(self, context):
        return Plan(bias=Bias(slope=Slope(torch.full((HEADS,), 0.1, device=context.device))))


def test_a_backend_that_is_wrong_is_found(monkeypatch):
    wrong = parity.Comparison("out", 1.0, 1e-7, 2e-7, "out[0]: got 1, expected 0")
    monkeypatch.setattr(parity, "measure", lambda *arguments: [wrong])
    report = posattn.check(LastBits(), tokens=10, dtypes=F32)
    assert [finding.detail for finding in report.findings if not finding.ok] == ["out[0]: got 1, expected 0"]


def test_runs_that_differ_are_found(monkeypatch):
    from posattn import checking

    attend = checking.attention

    def restless(*args, **options):
        out = attend(*args, **options)
        return out + 1e-7 * torch.rand(()) if options.get("deterministic") else out

    monkeypatch.setattr(checking, "attention", restless)
    report = posattn.check(LastBits(), tokens=10, dtypes=F32)
    details = [finding.detail for finding in report.findings if not finding.ok]
    assert details == ["the output differs between two runs with deterministic=True"] * len(details)
    assert details


def test_a_straight_through_gradient_is_not_compared():
    kerple = posattn.Kerple(HEADS)
    with torch.no_grad():
        kerple.p.fill_(-1.0)  # where values are clamped and the gradient passes
    assert not posattn.check(kerple, tokens=10, dtypes=F32)
    assert posattn.check(kerple, tokens=10, dtypes=F32, finite_differences=False)


def test_what_attention_does_not_use_is_said():
    report = posattn.check(posattn.BiPE.with_alibi(HEADS, 8, 16), tokens=12, dtypes=F32)
    (gradients,) = [finding for finding in report.findings if finding.what == "gradients"]
    assert gradients.detail.endswith("attention does not use intra.weight")


def test_a_rotation_of_another_head_dimension():
    class Turn(Encoding):
        has_bias = False

        def build(self, context):
            angle = context.token_positions()[0][..., None] * torch.ones(3, dtype=context.table_dtype())
            return Plan(rotary=Rotary(angle.cos(), angle.sin(), angle.cos(), angle.sin()), bias=Bias())

    report = posattn.check(Turn(), head_dim=4, tokens=10)
    assert len(report.findings) == 1  # nothing else would run
    assert not report


@pytest.mark.parametrize("value", [Gaussian, 3])
def test_no_encoding(value):
    with pytest.raises(TypeError, match="position: expected an Encoding, got"):
        posattn.check(value)


# The command.


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module beside which the command is run."""
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            import posattn
            from tests.api.test_check import CutOff, Gaussian

            instance = Gaussian(4)

            class Sized(Gaussian):
                def __init__(self, heads, scale=1.0):
                    super().__init__(heads)

            class WithExamples(Gaussian):
                @classmethod
                def examples(cls, num_heads, head_dim, tokens):
                    return {"one": cls(num_heads), "two": cls(num_heads) + posattn.RoPE(head_dim)}

            def make(num_heads, head_dim):
                return posattn.RoPE(head_dim) + Gaussian(num_heads)

            def several(tokens):
                return {"a": posattn.RelativeTable(2, tokens), "b": posattn.ALiBi(3)}

            class Space:
                inner = instance
            """
        )
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("instance", {"instance": "Gaussian"}),
        ("Gaussian", {"Gaussian": "Gaussian"}),
        ("Sized", {"Sized": "Sized"}),
        ("WithExamples", {"one": "WithExamples", "two": "Sum"}),
        ("make", {"make": "Sum"}),
        ("several", {"a": "RelativeTable", "b": "ALiBi"}),
        ("Space.inner", {"Space.inner": "Gaussian"}),
    ],
)
@pytest.mark.parametrize("file", ["mine", "mine.py"])
def test_what_a_target_stands_for(file, name, made, mine):
    found = targets.load(f"{file}:{name}", 4, 16, 30)
    assert {key: type(value).__name__ for key, value in found.items()} == made


def test_a_module_that_misses_another_shows_its_own_error(mine):
    (mine / "mine.py").write_text("import nothing_of_the_kind\n")
    with pytest.raises(ModuleNotFoundError, match="nothing_of_the_kind"):
        targets.load("mine:X", 4, 16, 30)


def test_check_command(mine, capsys):
    sizes = ["--tokens", "10", "--head-dim", "8", "--dtype", "float32"]
    assert cli.main(["check", "mine:Gaussian", *sizes]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Gaussian, Gaussian: 4 heads of 8, 10 tokens\n")
    assert text.endswith("all is as it should be\n")
    assert cli.main(["check", "mine:CutOff", *sizes]) == 1
    assert "FAILED  gradients" in capsys.readouterr().out
    assert cli.main(["check", "mine:CutOff", "--no-finite-differences", *sizes]) == 0
    assert cli.main(["check", "mine:several", *sizes]) == 0
    assert cli.main(["check", "alibi signed", *sizes]) == 0
    assert "ALiBi signed, ALiBi: 4 heads" in capsys.readouterr().out


def test_plot_command(mine, capsys):
    pytest.importorskip("matplotlib")
    assert cli.main(["plot", "mine:make", "--tokens", "8", "--head-dim", "8"]) == 0
    assert (mine / "make.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["plot", "mine.py:several", "--tokens", "8"]) == 0
    assert capsys.readouterr().out.split() == ["make.png", "a.png", "b.png"]
    with pytest.raises(SystemExit):
        cli.main(["plot", "mine.py:several", "--tokens", "8", "--out", "x.png"])
    assert "--out: expected one encoding with it, got a, b" in capsys.readouterr().err
