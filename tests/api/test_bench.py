"""The bench: its arithmetic, its parity check that must catch a wrong kernel, its verdicts, and a tiny run."""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import posattn
from posattn import bench
from posattn import parity as rule
from posattn.bench import cases, encodings, parity, peers, plots, report, runner, timing, work
from posattn.bench.cases import Case, Target, Variant
from posattn.bench.memory import extra_peak

TINY = Case("tiny", (Variant("posattn", "ALiBi"),), mode="both", heads=2, q_len=33, k_len=33, head_dim=16)


def row(variant: str, **figures: float | int | str) -> report.Row:
    shape = {
        "batch": 1,
        "heads": 2,
        "kv_heads": 2,
        "q_len": 64,
        "k_len": 64,
        "head_dim": 16,
        "causal": True,
        "threads": 1,
    }
    values = {**shape, "case": "c", "encoding": "none", "peer": "p", "mode": "forward", "dtype": "float32", **figures}
    return report.Row(variant=variant, **values)  # type: ignore[arg-type]


def test_every_encoding_is_found() -> None:
    found = encodings.names()
    assert {"none", "RoPE", "ALiBi", "Kerple", "T5Bias", "Sandwich", "RelativeTable", "FIRE", "DAPE-Kerple"} <= set(
        found
    )
    for name in found[1:]:
        assert isinstance(encodings.build(name, 4, 16, 32), posattn.encodings.Encoding)
    # Segments are of their caller's making.
    assert not {"BiPE-RoPE", "BiPE-ALiBi"} & set(found)


def test_an_unknown_encoding_is_an_error() -> None:
    with pytest.raises(ValueError, match="encoding: expected one of none"):
        encodings.build("Nope", 4, 16, 32)


@pytest.mark.parametrize("every", [cases.standard(), cases.quick(), cases.sweep(("none", "ALiBi"), (128, 8192))])
def test_cases_are_sound(every: tuple[Case, ...]) -> None:
    assert len({case.name for case in every}) == len(every)
    for case in every:
        names = [variant.name for variant in case.variants]
        assert len(set(names)) == len(names)
        assert all(variant.peer in peers.PEERS for variant in case.variants)
        for target in case.targets:
            assert target.variant in names
            assert target.against in ("", *names)


def test_on_a_gpu_each_backend_is_a_variant() -> None:
    case = cases.on_gpu(replace(TINY, variants=(Variant("posattn", "ALiBi"), Variant("sdpa")), targets=()))
    names = [variant.name for variant in case.variants]
    assert names == ["posattn:ALiBi:cuda", "posattn:ALiBi:triton", "sdpa", "flash-attn", "flash-attn:ALiBi"]


@pytest.mark.parametrize(("q_len", "k_len"), [(32, 32), (20, 33)])
def test_work_counts_the_visible_pairs(q_len: int, k_len: int) -> None:
    case = replace(TINY, mode="forward", q_len=q_len, k_len=k_len)
    visible = torch.ones(q_len, k_len).tril(k_len - q_len).sum().item()
    flop = 2 * visible * (2 * 2 * 16)  # two heads, two products of 16 multiply-adds
    assert work.work(case, "ALiBi") == work.Work(flop, "fma")
    assert work.work(replace(case, mode="both"), "ALiBi").amount == 3.5 * flop
    width, inputs = 32, 4
    network = 2 * visible * (width * inputs + width * 2)
    assert work.work(case, "DAPE-Kerple").amount == flop + network


def test_fewer_key_heads_are_read_once_and_reach_every_peer() -> None:
    case = replace(TINY, mode="forward", heads=4, kv_heads=2, q_len=1)
    assert work.work(case, "none") == work.Work(2 * 2 * 33 * 16 * 4, "read")  # keys and values of two heads
    for variant in (
        Variant("posattn", "ALiBi"),
        Variant("eager", "ALiBi"),
        Variant("sdpa"),
        Variant("sdpa-mask", "ALiBi"),
    ):
        inputs = peers.make_inputs(case, variant.encoding, "cpu")
        assert inputs.q.shape[1] == 4
        assert inputs.k.shape[1] == inputs.v.shape[1] == 2
        out = peers.contender(variant, case, "cpu").forward()
        assert parity.outputs_differ(variant, case, "cpu", out) is None


@pytest.mark.parametrize(("mode", "products", "passes"), [("forward", 2, 1), ("backward", 5, 3), ("both", 7, 4)])
@pytest.mark.parametrize(("dtype", "kind"), [("float32", "fma"), ("float16", "fma"), ("bfloat16", "bf16dot")])
def test_work_by_mode_and_dtype(mode: Any, products: int, passes: int, dtype: str, kind: str) -> None:
    """Two products forward and five backward; DAPE's network runs again in the backward, and has two products there."""
    case = replace(TINY, mode=mode, dtype=dtype, batch=3, causal=False, q_len=20, k_len=30)
    pairs, network = 3 * 2 * 20 * 30, 2 * (32 * 4 + 32 * 2) // 2
    assert work.work(case, "Kerple") == work.Work(pairs * 2 * 16 * products, kind)
    assert work.work(case, "DAPE-Kerple") == work.Work(pairs * (2 * 16 * products + network * passes), kind)


@pytest.mark.parametrize("kind", ["fma", "bf16dot", "read"])
def test_peaks_are_of_the_kind_asked_for(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from posattn import _cpu

    asked = []
    monkeypatch.setattr(_cpu, "probe_peak", lambda *arguments: asked.append(arguments) or 2.0)
    assert work.peak(kind, "cpu", 3, "bfloat16") == 2e9
    assert asked == [(kind, 3)]


def test_a_timing_is_a_median_with_its_spread() -> None:
    assert timing.Timing.of([9.0, 1.0, 2.0, 8.0, 4.0]) == timing.Timing(4.0, 2.0, 9.0, 5)
    assert timing.Timing.of([3.0, 1.0, 100.0]).median == 3.0


PEER_CASES = {
    "sdpa": ("none", True),
    "sdpa-mask": ("Kerple", True),
    "sdpa-mask-build": ("Kerple", True),
    "sdpa-mask-grad": ("Kerple", True),
    "eager": ("DAPE-Kerple", True),
}


@pytest.mark.parametrize("q_len", [1, 20])
@pytest.mark.parametrize("peer", [peer for peer in PEER_CASES if peer != "sdpa"])
def test_a_peer_with_fewer_queries_than_keys(peer: str, q_len: int) -> None:
    """Causal from the last key on, where torch's own causal mask counts from the first."""
    variant = Variant(peer, PEER_CASES[peer][0])
    case = replace(TINY, mode="forward", q_len=q_len)
    with torch.no_grad():
        out = peers.contender(variant, case, "cpu").forward()
    assert parity.outputs_differ(variant, case, "cpu", out) is None


def test_sdpa_says_why_it_has_no_causal_mask_for_fewer_queries_than_keys() -> None:
    case = replace(TINY, mode="forward")
    with pytest.raises(peers.Unavailable, match="its causal mask is aligned top-left"):
        peers.contender(Variant("sdpa"), replace(case, q_len=20), "cpu")
    for fits in (replace(case, q_len=1), replace(case, q_len=20, causal=False), case):
        with torch.no_grad():
            out = peers.contender(Variant("sdpa"), fits, "cpu").forward()
        assert parity.outputs_differ(Variant("sdpa"), fits, "cpu", out) is None


@pytest.mark.parametrize("peer", PEER_CASES)
def test_a_peer_is_not_posattn_itself(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every peer but eager PyTorch, which posattn keeps as its reference, computes without posattn; and it is right."""
    from posattn import backends

    encoding, _ = PEER_CASES[peer]
    case = replace(TINY, mode="forward")
    ready = peers.contender(Variant(peer, encoding), case, "cpu")
    used = []
    monkeypatch.setattr(backends, "choose", lambda *arguments, **named: used.append(arguments))
    with torch.no_grad():
        out = ready.forward()
    assert not used, "the fused kernels ran"
    assert parity.outputs_differ(Variant(peer, encoding), case, "cpu", out) is None
    monkeypatch.setattr(peers.posattn, "attention", lambda *arguments, **named: used.append(named))
    ready = peers.contender(Variant(peer, encoding), case, "cpu")
    ready.forward()
    assert [named["backend"] for named in used] == (["reference"] if peer == "eager" else [])


def test_posattn_is_what_users_call(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(peers.posattn, "attention", lambda *arguments, **named: used.append(named))
    peers.contender(Variant("posattn", "ALiBi"), TINY, "cpu").forward()
    assert used == [{"causal": True, "backend": "auto"}]


def test_a_backward_pass_gives_the_gradients_of_everything_trained() -> None:
    for variant, leaves in (
        (Variant("posattn", "Kerple"), 5),
        (Variant("sdpa"), 3),
        (Variant("sdpa-mask-grad", "Kerple"), 4),
    ):
        ready = peers.contender(variant, TINY, "cpu")
        gradients = ready.backward(ready.forward())
        assert len(gradients) == leaves
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_a_peer_that_cannot_run_is_named() -> None:
    notes: list[str] = []
    case = replace(
        TINY, mode="forward", variants=(*TINY.variants, Variant("flex", "Kerple"), Variant("sdpa")), q_len=30
    )
    rows = runner.run_case(replace(case, seconds=0.01), "cpu", 1, notes.append)
    assert [row.variant for row in rows] == ["posattn:ALiBi"]
    assert notes == [
        "tiny: flex:Kerple left out: its score_mod is written for ALiBi alone",
        "tiny: sdpa left out: its causal mask is aligned top-left",
    ]


def test_a_peer_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = peers.PEERS["sdpa"]

    def doubled(inputs: peers.Inputs, variant: Variant) -> peers.Peer:
        forward, leaves = right(inputs, variant)
        return lambda: 2 * forward(), leaves

    monkeypatch.setitem(peers.PEERS, "sdpa", doubled)
    notes: list[str] = []
    case = replace(TINY, mode="forward", variants=(*TINY.variants, Variant("sdpa")), seconds=0.01)
    assert [row.variant for row in runner.run_case(case, "cpu", 1, notes.append)] == ["posattn:ALiBi"]
    assert "sdpa left out: it disagrees with the reference" in notes[0]


def test_a_row_has_its_rate_and_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([4e9, 5e9])
    monkeypatch.setattr(runner, "peak", lambda *arguments: next(looks))
    monkeypatch.setattr(runner, "interleave", lambda calls, *rest: {n: timing.Timing(0.5, 0.4, 0.6, 3) for n in calls})
    (found,) = runner.run_case(replace(TINY, mode="forward"), "cpu", 1, print)
    amount = work.work(replace(TINY, mode="forward"), "ALiBi").amount
    assert found.rate == pytest.approx(amount / 0.5)
    assert found.peak == 5e9
    assert found.share == pytest.approx(amount / 0.5 / 5e9)
    assert (found.median, found.p20, found.p80, found.rounds) == (0.5, 0.4, 0.6, 3)


def test_a_variant_of_its_own_length_has_its_own_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "peak", lambda *arguments: 4e9)
    monkeypatch.setattr(runner, "interleave", lambda calls, *rest: {n: timing.Timing(0.5, 0.4, 0.6, 3) for n in calls})
    variants = (Variant("posattn", "ALiBi"), Variant("posattn", "ALiBi", length=66))
    usual, longer = runner.run_case(replace(TINY, mode="forward", variants=variants), "cpu", 1, print)
    assert (usual.q_len, longer.q_len, longer.k_len) == (33, 66, 66)
    assert longer.rate / usual.rate == pytest.approx(66 * 67 / (33 * 34))


def test_decoding_is_measured_in_bytes() -> None:
    case = replace(TINY, mode="forward", q_len=1, k_len=100, dtype="bfloat16")
    assert work.work(case, "none") == work.Work(2 * 2 * 100 * 16 * 2, "read")


def test_parity_accepts_posattn_and_rejects_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = Variant("posattn", "Kerple")
    assert parity.posattn_differs(variant, TINY, "cpu") is None
    right = posattn.attention

    def wrong(*args: Any, backend: str, **options: Any) -> Any:
        out, lse = right(*args, backend=backend, **options)
        return (out if backend == "reference" else out.detach() + 1.001 * (out - out.detach())), lse

    monkeypatch.setattr(rule, "attention", wrong)
    assert str(parity.posattn_differs(variant, TINY, "cpu")).startswith("dq[")


def test_parity_looks_at_the_last_rows_of_the_whole_output() -> None:
    case = replace(TINY, mode="forward", q_len=200, k_len=200)
    variant = Variant("posattn", "ALiBi")
    with torch.no_grad():
        out = peers.contender(variant, case, "cpu").forward()
    assert parity.outputs_differ(variant, case, "cpu", out) is None
    out[0, 1, 199, 3] += 1e-3
    assert parity.outputs_differ(variant, case, "cpu", out) is not None
    out[0, 1, 199, 3] = math.nan
    assert "got nan" in str(parity.outputs_differ(variant, case, "cpu", out))


@pytest.mark.parametrize(
    ("target", "figures", "other", "value", "reached"),
    [
        (Target("speed", "a", 2.0, "b"), {"median": 1.0}, {"median": 3.0}, 3.0, True),
        (Target("speed", "a", 2.0, "b"), {"median": 2.0}, {"median": 3.0}, 1.5, False),
        (Target("cost", "a", 1.05, "b"), {"median": 1.04}, {"median": 1.0}, 1.04, True),
        (Target("share", "a", 0.8), {"share": 0.79}, {}, 0.79, False),
        (Target("overhead", "a", 30e-6, "b"), {"median": 5e-5}, {"median": 1e-5}, 4e-5, False),
        (Target("growth", "a", 0.15, "b"), {"median": 4.4, "q_len": 128}, {"median": 1.0}, 0.1, True),
        (Target("growth", "a", 0.15, "b"), {"memory": 1.6, "q_len": 128}, {"memory": 1.0}, 0.2, False),
        (Target("bits", "a", 1.0, "b"), {"digest": "x"}, {"digest": "y"}, 0.0, False),
        (Target("memory", "a", 200.0), {"memory": 130.0}, {}, 130.0, True),
    ],
)
def test_verdicts(
    target: Target, figures: dict[str, float], other: dict[str, float], value: float, reached: bool
) -> None:
    case = Case("c", (), (target,))
    (verdict,) = report.judge(case, [row("a", **figures), row("b", **other)])
    assert verdict.value == pytest.approx(value)
    assert verdict.reached is reached
    assert str(verdict).startswith("reached" if reached else "MISSED")


@pytest.mark.parametrize(
    ("target", "value", "text"),
    [
        (Target("overhead", "a", 30e-6, "b"), -589e-6, "a beside b: 589.0 us less a call; wanted at most 30 us more"),
        (Target("overhead", "a", 30e-6, "b"), 12e-6, "a beside b: 12.0 us more a call; wanted at most 30 us more"),
        (Target("speed", "a", 1.7, "b"), 1.851, "a beside b: 1.85 times as fast; wanted at least 1.7"),
        (Target("cost", "a", 1.05, "b"), 1.04, "a beside b: 1.04 times the time; wanted at most 1.05"),
        (Target("share", "a", 0.8), 0.791, "a: 79.1 % of the measured peak; wanted at least 80 %"),
        (Target("growth", "a", 0.15, "b"), 0.1, "a beside b: 10.0 % off the law; wanted at most 15 %"),
        (Target("bits", "a", 1.0, "b"), 0.0, "a beside b: other bits; wanted the same bits"),
        (Target("bits", "a", 1.0, "b"), 1.0, "a beside b: the same bits; wanted the same bits"),
        (Target("memory", "a", 200.0), 130.0, "a: 130.0 MB; wanted at most 200 MB"),
    ],
)
def test_verdicts_in_words(target: Target, value: float, text: str) -> None:
    verdict = report.Verdict("c", target.measure, target.variant, target.against, value, target.bound, True)
    assert str(verdict) == f"reached  {text}"


def test_every_peer_is_explained_in_the_plots() -> None:
    assert set(plots.PEERS) == set(peers.PEERS)


def test_a_figure_that_was_not_measured_is_not_judged() -> None:
    case = Case("c", (), (Target("share", "a", 0.8), Target("speed", "a", 1.0, "gone")))
    assert report.judge(case, [row("a", median=1.0)]) == []


def test_timing_interleaves_and_lets_slow_calls_go(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    order = []

    def spend(name: str, seconds: float) -> None:
        nonlocal clock
        order.append(name)
        clock += seconds

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock)
    calls = {"fast": lambda: spend("fast", 0.1), "slow": lambda: spend("slow", 5.0)}
    timings = timing.interleave(calls, seconds=20.0, device="cpu")
    assert order[2:8] == ["fast", "slow"] * 3
    assert timings["slow"].rounds == timing.MIN_ROUNDS
    assert timings["fast"].rounds > timing.MIN_ROUNDS
    assert timings["fast"].median == pytest.approx(0.1)


def test_extra_peak_sees_what_is_freed_again() -> None:
    megabytes = extra_peak(lambda: torch.ones(64_000_000).sum())
    assert 250 < megabytes < 300


@pytest.mark.skipif(sys.platform != "linux", reason="malloc of other systems gives its pages back by itself or never")
def test_extra_peak_sees_what_lies_where_something_was_freed() -> None:
    """Blocks too small for mappings of their own, so that malloc keeps their pages."""

    def blocks() -> list[torch.Tensor]:
        return [torch.ones(8_000) for _ in range(1_000)]

    blocks()
    assert 25 < extra_peak(blocks) < 45


def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = "forward-float32,both-float32,backward-bfloat16,decode-float32,memory-dape,dape-both-float32,growth"
    assert bench.main(["--quick", "--device", "cpu", "--cases", chosen, "--out", str(tmp_path)]) == 0
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {r["case"] for r in rows} == set(chosen.split(","))
    assert all(float(r["memory"] if r["case"] == "memory-dape" else r["median"]) > 0 for r in rows)
    assert all(r["device"] and r["torch"] == torch.__version__ for r in rows)
    for picture in ("speed.png", "share.png", "length.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert "posattn:DAPE-Kerple" in capsys.readouterr().out


def test_a_wrong_kernel_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = peers.PEERS["posattn"]

    def doubled(inputs: peers.Inputs, variant: Variant) -> peers.Peer:
        forward, leaves = right(inputs, variant)
        return lambda: 2 * forward(), leaves

    monkeypatch.setitem(peers.PEERS, "posattn", doubled)
    assert bench.main(["--quick", "--device", "cpu", "--cases", "full-float32", "--out", str(tmp_path)]) == 1
    assert (tmp_path / "results.csv").read_text().count("\n") == 1


def test_an_unknown_case_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--cases", "nothing", "--out", str(tmp_path)]) == 2
    assert "--cases: expected" in capsys.readouterr().err


def test_lines_lie_inside_their_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    figures = {"case": "c", "peer": "posattn", "encoding": "FIRE", "variant": "v", "share": "nan", "peak_kind": "fma"}
    rows = [{**figures, "q_len": n, "median": 9e-9 * n**2, "memory": 3e-3 * n} for n in (2048, 4096, 8192)]
    with (tmp_path / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plots.plot_all(tmp_path / "results.csv", tmp_path)
    lines = [(axes, line) for figure in drawn for axes in figure.axes for line in axes.lines]
    assert len(lines) == 2
    for axes, line in lines:
        low, high = axes.get_ylim()
        assert all(low <= value <= high for value in line.get_ydata())
