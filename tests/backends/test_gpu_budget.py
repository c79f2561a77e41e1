"""The static evidence tool: it reads machine code rightly, and the heart of the package is within its budget."""

from pathlib import Path

import pytest
import torch

from posattn.backends.cuda import compiler
from tests.ptxsim import calibration
from tools.gpu_budget import amdgcn, budget
from tools.gpu_budget.__main__ import check, measure_all, measure_cuda, update
from tools.gpu_budget.flow import BasicBlock, loops
from tools.gpu_budget.measure import Figures, measure

ACCEPTED = {"registers": 100, "spills": 0, "loop_spills": 0, "shared": 1000, "blocks": 2, "tensor": 8, "two_phase": 700}


def figures(**changed: object) -> Figures:
    return Figures(**{**ACCEPTED, "overlap": 400, **changed})  # type: ignore[arg-type]


def test_loops_are_found_with_what_every_iteration_runs() -> None:
    # 0 -> 1; 1 -> 2 or 3; 2 -> 3; 3 -> 1 or 4: a loop of 1, 2, 3 in which 2 is conditional.
    graph = [BasicBlock([], successors) for successors in ([1], [2, 3], [3], [1, 4], [])]
    (loop,) = loops(graph)
    assert (loop.head, loop.body, loop.always) == (1, {1, 2, 3}, {1, 3})


AMD = """\
kernel:                                 ; @kernel
\tscratch_store_dwordx2 off, v[2:3], off ; 8-byte Folded Spill
\tv_writelane_b32 v9, s4, 0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tscratch_load_dword v1, off, off offset:4 ; 4-byte Folded Reload
\ts_cbranch_execz .LBB0_3
\tv_mfma_f32_32x32x8_bf16_1k v[0:15], v[16:17], v[18:19], v[0:15]
\tscratch_store_short off, v1, off
.LBB0_3:
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
\t.amdhsa_kernel kernel
    .vgpr_count:     40
"""


def test_spills_of_amd_kernels_are_what_goes_to_scratch() -> None:
    assert amdgcn.read(AMD) == amdgcn.Counts(registers=40, spills=14, loop_spills=6, tensor=1)
    assert amdgcn.read(AMD.replace("scc1 .LBB0_1", "scc1 .LBB0_3")).loop_spills == 0


def test_what_counts_as_worse() -> None:
    assert budget.worse(figures(), ACCEPTED) == []
    assert budget.worse(figures(registers=108, two_phase=720, shared=900, tensor=4), ACCEPTED) == []
    assert budget.worse(figures(registers=109), ACCEPTED) == ["registers 100 -> 109"]
    assert budget.worse(figures(shared=1001, loop_spills=4), ACCEPTED) == ["loop_spills 0 -> 4", "shared 1000 -> 1001"]
    assert budget.worse(figures(tensor=16), ACCEPTED) == ["tensor 8 -> 16"]
    assert budget.worse(figures(two_phase=None), ACCEPTED) == ["two_phase 700 -> None"]
    assert budget.worse(figures(overlap=420), {**ACCEPTED, "overlap": 400}) == ["overlap 400 -> 420"]
    assert budget.worse(figures(spills=8), ACCEPTED) == ["spills 0 -> 8"]
    assert budget.worse(figures(two_phase=722), ACCEPTED) == ["two_phase 700 -> 722"]
    assert budget.worse(figures(blocks=1, tensor=0), ACCEPTED) == [
        "blocks on a multiprocessor 2 -> 1",
        "no tensor-core instruction is left",
    ]


def test_every_configuration_fits_in_shared_memory() -> None:
    assert [problem for name, x in budget.load().items() if (problem := budget.too_large(name, x["shared"]))] == []
    assert budget.too_large("sm_80, kernel, plain, D = 64", 163 * 1024) is None
    assert budget.too_large("CUDA, sm_120, kernel", 163 * 1024) is not None


@pytest.mark.parametrize(("arch", "tensor"), [("sm_80", 128), ("sm_90", 16)])
def test_figures_of_the_attention_pattern(arch: str, tensor: int) -> None:
    """HMMA.16816 does 2048 multiply-adds a warp, wgmma m64nNk16 a whole warpgroup's tile."""
    q = torch.empty(12, 2048, 64, dtype=torch.bfloat16, device="meta")
    lse = torch.empty(12, 2048, device="meta")
    args = [q, q, q, q, lse, 0.125, 2048, 2048 * 64, 64]
    found = measure(arch, calibration.attention, args, {"CAUSAL": True, "D": 64, "BLOCK_M": 128, "BLOCK_N": 64}, 4, 3)
    assert (found.loop_spills, found.tensor) == (0, tensor)
    # Two products of 64 multiply-adds for each of 4096 logits, over the tensor cores' rate.
    assert found.pipes["tensor"] == 4096 * 2 * 64 / {"sm_80": 1024, "sm_90": 2048}[arch]
    assert found.overlap is not None
    assert found.two_phase is not None
    assert found.overlap < found.two_phase < 1200


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_the_forward_kernel_is_within_its_budget(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One configuration an architecture; `python -m tools.gpu_budget check` holds all of them."""
    match = f"{arch}, attention_forward, slope, D = 64, bfloat16, Tq = 2048"
    status = check(measure_all([arch], match, 1))
    told = capsys.readouterr().out
    assert status == 0, told
    assert "1 of 1 configurations" in told


@pytest.mark.skipif(compiler.missing() is not None, reason="compiling CUDA needs cuda.core and NVRTC")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_cuda_forward_kernel_is_within_its_budget(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = check(measure_cuda([arch], f"CUDA, {arch}, slope, D = 64"))
    assert status == 0, capsys.readouterr().out


@pytest.mark.parametrize("figure", [name for name in Figures.__dataclass_fields__ if name != "pipes"])
def test_every_figure_of_every_entry_is_held(figure: str) -> None:
    """No figure is kept for show: the same entry with this one much worse is refused."""
    holding = {name: x for name, x in budget.load().items() if figure in x}
    assert holding
    for name, x in holding.items():
        kept = {key: value for key, value in x.items() if key != "reason"} | {"blocks": x.get("blocks")}
        assert budget.worse(Figures(**kept), x) == [], name
        changed = 0 if figure == "blocks" else 2 * x[figure] + 9
        assert bool(budget.worse(Figures(**{**kept, figure: changed}), x)) or x[figure] == changed == 0, name


def test_reasons_are_of_few_entries_and_one_kernel() -> None:
    reasons = budget.reasons()
    kernels: dict[str, list[str]] = {reason: [] for reason in reasons}
    for name, x in budget.load().items():
        assert ("reason" in x) == (x["loop_spills"] > 0), name
        if "reason" in x:
            parts = name.rstrip("'").split(", ")
            kernels[x["reason"]].append(parts[-1] if parts[0] == "CUDA" else parts[1])
    for reason, found in kernels.items():
        assert len(set(found)) == 1, f"{reason}: {sorted(set(found))}"
        assert len(found) <= 10, f"{reason} is given by {len(found)} entries: too many for one cause"


NAME = "sm_80, attention_forward, slope, D = 64, bfloat16, Tq = 2048"


@pytest.fixture
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """One entry, in a budget file of the test's own."""
    accepted: dict[str, object] = budget.load()[NAME]
    monkeypatch.setattr(budget, "PATH", tmp_path / "budget.json")
    monkeypatch.setattr(budget, "REASONS", tmp_path / "reasons.json")
    budget.REASONS.write_text('{"outputs": "they take 128 registers"}')
    budget.accept(NAME, Figures(**accepted))  # type: ignore[arg-type]
    return accepted


def test_a_spill_in_a_loop_needs_a_reason_and_an_entry_a_launch(
    own_file: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    spilling = Figures(**{**own_file, "spills": 8, "loop_spills": 8})  # type: ignore[arg-type]
    fine = Figures(**own_file)  # type: ignore[arg-type]

    def told(status: int, expected: int) -> str:
        assert status == expected
        return capsys.readouterr().out

    assert "spills 8 bytes in its loops, and its entry names no reason" in told(check(iter([(NAME, spilling)])), 1)
    assert "1 of 1 configurations" in told(check(iter([(NAME, fine)])), 0)
    assert "is launched no more" in told(check(iter([]), whole=True), 1)
    assert "is not in the budget file" in told(check(iter([("sm_80, another", fine)])), 1)
    # Accepted with a reason alone, which an update keeps, and which goes when the spills do.
    assert "names no reason" in told(update(iter([(NAME, spilling)])), 1)
    assert "reasons.json has no 'inputs'" in told(update(iter([(NAME, spilling)]), "inputs"), 1)
    told(update(iter([(NAME, spilling)]), "outputs"), 0)
    told(update(iter([(NAME, spilling)])), 0)
    assert "1 spill in their loops: they take 128 registers" in told(check(iter([(NAME, spilling)])), 0)
    told(update(iter([(NAME, fine)])), 0)
    assert "reason" not in budget.load()[NAME]
