"""The static evidence tool: it reads machine code rightly, and the heart of the package is within its budget."""

import pytest
import torch

from posattn.backends.cuda import compiler
from tests.ptxsim import calibration
from tools.gpu_budget import amdgcn, budget
from tools.gpu_budget.__main__ import check, measure_all, measure_cuda
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
    assert budget.worse(figures(registers=255, two_phase=720, shared=900), ACCEPTED) == []
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


def test_a_spill_in_a_loop_needs_a_reason_and_an_entry_a_launch(capsys: pytest.CaptureFixture[str]) -> None:
    name = "sm_80, attention_forward, slope, D = 64, bfloat16, Tq = 2048"
    accepted = budget.load()[name]
    spilling = Figures(**{**accepted, "spills": 8, "loop_spills": 8})
    assert check(iter([(name, spilling)])) == 1
    assert "spills 8 bytes in its loops, and debts.json gives no reason" in capsys.readouterr().out
    capsys.readouterr()
    assert check(iter([(name, Figures(**accepted))])) == 0
    assert check(iter([(name, Figures(**accepted))]), whole=True) == 1
    assert "is launched no more" in capsys.readouterr().out
    assert budget.debt("sm_90, mixed_forward, mix, D = 64") is not None
