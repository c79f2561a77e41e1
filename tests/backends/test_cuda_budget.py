"""Machine code of the CUDA forward kernels: no spill in a loop, modelled cycles within what the docs claim."""

from __future__ import annotations

import pytest

pytest.importorskip("cuda.core")
from tools.gpu_budget.cuda import cases, figures, launches

CASES = {case.label: case for case in cases()}

# Two-phase cycles of FlashAttention-2 (sm_80) and -3 (sm_90), which the plain kernel keeps, and their share for a plan.
LIMITS = {
    ("sm_80", "plain, D = 64"): 776,
    ("sm_80", "profile, D = 64"): 776 * 1.12,
    ("sm_80", "slope, D = 128"): 1310 * 1.03,
    ("sm_90", "plain, D = 128"): 776,
    ("sm_90", "table, D = 64"): 520 * 1.10,
}


@pytest.mark.parametrize(("arch", "label"), LIMITS)
def test_forward_keeps_its_figures(arch, label):
    *_, noted = launches(CASES[label], arch)  # behind those that look for reach
    found = figures(noted, arch)
    assert (noted.kernel.name, found.loop_spills) == ("attention_forward", 0)
    assert found.two_phase <= LIMITS[arch, label]


@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_100", "sm_120"])
@pytest.mark.parametrize("label", ["profile, D = 128", "decoding, slope, D = 64"])
def test_other_architectures_spill_in_no_loop(arch, label):
    *_, noted = launches(CASES[label], arch)  # behind those that look for reach
    found = figures(noted, arch)
    assert found.loop_spills == 0
    assert noted.shared <= 99 * 1024  # what the least of them grants a block
