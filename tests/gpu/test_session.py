"""`posattn gpu`: its order, its time, its worker that may die, its report; and items on the PTX machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from posattn import cli
from posattn.gpu import items as items_module
from posattn.gpu import main, modelled, report
from posattn.gpu import work as work_module
from posattn.gpu.items import STAGES, Item, catalogue, every, risk
from posattn.gpu.session import Record, Worker, again, in_turn, run
from posattn.gpu.worker import attempt
from tests.gpu import rehearse
from tests.ptxsim.seam import behind_launch
from tools.gpu_budget import budget

# A worker that answers by the item's name alone.
FAKE = """
import json, os, sys, time
for line in sys.stdin:
    name = line.strip()
    if "DAPE" in name: os._exit(3)
    if "FIRE" in name: time.sleep(60)
    wrong = ["a is 1, expected 2"] if "Kerple" in name else []
    found = {"ok": not wrong, "of_allowed": 0.5, "worst": "dq", "wrong": wrong}
    print(json.dumps({"state": "failed" if wrong else "done", **found}), flush=True)
"""


@pytest.fixture
def fake(tmp_path: Path) -> list[str]:
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    return [sys.executable, str(path)]


def test_items_are_all_different_and_the_riskiest_come_first() -> None:
    names = [item.name for item in every()]
    assert len(set(names)) == len(names) > 200
    parity = [item.parts for item in every() if item.stage == "parity"]
    assert parity[0][:2] == ("cuda", "bfloat16")
    assert {parts[2] for parts in parity} == set(catalogue())
    assert parity[0][2].startswith("DAPE")
    risks = [risk(catalogue()[parts[2]]) for parts in parity if parts[:2] == ("cuda", "bfloat16")]
    assert risks == sorted(risks, reverse=True)
    assert ("cuda", "float32") not in {parts[:2] for parts in parity}  # which that backend does not compute in


def test_stages_share_the_time_and_what_is_left_goes_round() -> None:
    now = [0.0]
    order = []
    todo = [Item(f"{stage}/{i}") for stage in STAGES for i in range(10)]
    for item in in_turn(todo, 100.0, lambda: now[0]):
        order.append(item)
        now[0] += 5.0
    counts = {stage: sum(item.stage == stage for item in order) for stage in STAGES}
    assert len(order) == 20
    assert all(counts.values())
    assert counts["parity"] == 7
    assert len(list(in_turn(todo, 1e9, lambda: 0.0))) == 60
    only = [Item(f"cycles/{i}") for i in range(3)]
    assert [item.name for item in in_turn(only, 1e9, lambda: 0.0)] == ["cycles/0", "cycles/1", "cycles/2"]


def test_a_worker_that_dies_or_hangs_is_replaced_and_the_rest_goes_on(tmp_path: Path, fake: list[str]) -> None:
    worker = Worker(fake, tmp_path / "log")
    names = ("none", "DAPE", "RoPE", "FIRE", "ALiBi", "Kerple")
    found = {name: worker.do(Item(f"parity/cuda/bfloat16/{name}"), 3.0) for name in names}
    worker.close()
    assert [found[name]["state"] for name in names] == ["done", "error", "done", "error", "done", "failed"]
    assert found["DAPE"]["why"] == "its process ended with 3; worker.log says more"
    assert found["FIRE"]["why"] == "no answer within 3 s; its process was stopped"


def test_a_session_goes_on_where_it_was(tmp_path: Path, fake: list[str]) -> None:
    items = [Item(f"parity/cuda/bfloat16/{name}") for name in ("none", "RoPE", "DAPE", "Kerple")]
    notes: list[str] = []
    assert run(items[:2], Record(tmp_path), Worker(fake, tmp_path / "log"), 60.0, notes.append) == 0
    with (tmp_path / "items.jsonl").open("a") as file:
        file.write('{"item": "parity/cuda/bfl')  # cut short
        file.write("\n")
    notes.clear()
    assert run(items, Record(tmp_path), Worker(fake, tmp_path / "log"), 60.0, notes.append) == 0
    assert len(notes) == 2  # the first two are not done again
    assert notes[0].startswith("ERROR parity/cuda/bfloat16/DAPE")
    assert again(items[2]) in notes[0]
    assert "FAILED parity/cuda/bfloat16/Kerple: a is 1, expected 2" in notes[1]
    assert run(items, Record(tmp_path / ".."), Worker(fake, tmp_path / "log"), 0.0, notes.append) == 4


def test_the_command(tmp_path: Path, fake: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--report", str(tmp_path / "out"), "--device", "cpu"]
    only = "parity/cuda/bfloat16/ALiBi,parity/cuda/bfloat16/Kerple,parity/cuda/bfloat16/none"
    assert main([*given, "--only", only], worker=fake) == 1
    printed = capsys.readouterr().out
    assert "went wrong" in printed
    page = (tmp_path / "out" / "report.html").read_text()
    assert "python -m posattn.gpu --item &#x27;parity/cuda/bfloat16/Kerple&#x27;" in page
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data["left"] == []
    assert {one["state"] for one in data["items"]} == {"done", "failed"}
    assert main([*given, "--only", "parity/cuda/bfloat16/none"], worker=fake) == 0
    assert "done    " not in capsys.readouterr().out  # it was done before
    assert main([*given, "--only", only, "--retry"], worker=fake) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing", "--device", "cpu"], "--only: expected stages (parity, options"),
        (["--item", "parity/cuda/bfloat16/Rope"], "--item: expected an item of report.json"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["gpu", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--report", str(tmp_path)])
    assert "expected a GPU that torch finds, got none" in capsys.readouterr().err


def test_the_model_is_the_budgets() -> None:
    accepted = budget.load()
    for (backend, arch, which), by_dim in modelled._CYCLES.items():
        for dim, cycles in by_dim.items():
            for operand, value in zip(modelled.OPERANDS, cycles):
                name = (
                    f"CUDA, {arch}, {operand}, D = {dim}, attention_{which}"
                    if backend == "cuda"
                    else f"{arch}, attention_{which}, {operand}, D = {dim}, bfloat16, Tq = 2048"
                )
                assert accepted[name]["two_phase"] == value, name
    assert modelled.cycles("cuda", "sm_90", "forward", 64, "slope") == 512
    assert modelled.cycles("cuda", "sm_89", "forward", 64, "slope") is None


def test_a_page_of_every_table() -> None:
    rows = [{"variant": "posattn", "ms": 1.0, "share": 0.5}, {"variant": "sdpa", "ms": 2.0, "share": float("nan")}]
    cycles = {"ms": 1.0, "clock_mhz": 1980.0, "cycles": 700.0, "modelled": None, "over_model": None}
    found: dict[str, dict[str, Any]] = {
        "parity/cuda/bfloat16/none": {"state": "done", "worst": "dq", "of_allowed": 0.3},
        "sanitizer/memcheck/cuda/ALiBi": {"state": "skipped", "why": "no <sanitizer>"},
        "tuning/forward/64/none": {"state": "done", "shipped_ms": 2.0, "tuned_ms": 1.0, "gain": 2.0},
        "bench/forward/2048/64/none": {"state": "done", "rows": rows, "notes": []},
        "cycles/cuda/forward/64/plain": {"state": "done", **cycles},
    }
    found = {name: {"item": name, **one} for name, one in found.items()}
    page = report.page({"GPU": "an <example>"}, every(), found)
    for text in ("Parity", "Times", "Tiles", "static model", "an &lt;example&gt;", "no &lt;sanitizer&gt;", "1980"):
        assert text in page


@pytest.fixture
def small() -> Iterator[None]:
    names = {items_module: ("HEADS", "QUERIES", "KEYS")}
    names[work_module] = ("HEADS", "QUERIES", "KEYS", "BATCH", "TIMED_HEADS", "TIMED_LENGTH", "clock")
    before = [(module, name, getattr(module, name)) for module, each in names.items() for name in each]
    rehearse.small()
    yield
    for module, name, value in before:
        setattr(module, name, value)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "name",
    [
        "parity/cuda/bfloat16/ALiBi learnable",
        "options/triton/bfloat16/documents",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "parity/triton/float16/RoPE",
                "options/cuda/bfloat16/one query",
                "bench/both/64/64/ALiBi",
                "cycles/triton/backward/64/plain",
                "cycles/cuda/forward/64/table",
            )
        ),
    ],
)
def test_items_on_the_machine(name: str) -> None:
    with behind_launch(90):
        found = attempt(Item(name), "cpu", 0.001)
    assert found["state"] == "done", found
    if name.startswith("cycles"):
        assert found["over_model"] == pytest.approx(found["cycles"] / found["modelled"])


@pytest.mark.usefixtures("small")
def test_a_wrong_kernel_is_a_failure_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from posattn.backends.cuda import attention_forward

    forward = attention_forward.forward
    monkeypatch.setattr("posattn.backends.cuda.forward", lambda call: (1.1 * forward(call)[0], *forward(call)[1:]))
    with behind_launch(90):
        found = attempt(Item("parity/cuda/bfloat16/none"), "cpu", 0.001)
    assert found["state"] == "failed"
    assert "expected" in found["wrong"][0]


@pytest.mark.slow
def test_a_rehearsal_of_the_whole(tmp_path: Path) -> None:
    """The command, its worker in a process of its own, and the PTX machine in the GPU's place."""
    command = [sys.executable, "-m", "tests.gpu.rehearse"]
    only = "parity/cuda/bfloat16/none,options/triton/bfloat16/sinks,cycles/cuda/forward/64/plain,sanitizer"
    given = ["--report", str(tmp_path), "--device", "cpu", "--only", only]
    assert main(given, worker=command) == 0
    data = json.loads((tmp_path / "report.json").read_text())
    assert {one["state"] for one in data["items"]} <= {"done", "skipped"}
    assert data["left"] == []
