"""Mutation testing itself: what mutants there are, and that breaking a kernel's synchronisation is noticed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from posattn.backends.cuda import compiler
from tests.ptxsim import survivors
from tests.ptxsim.mutants import mutants
from tests.ptxsim.mutate import run, strangers, table
from tests.ptxsim.scenarios import SCENARIOS

WAIT = "{.reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%r1], %r2; @!done bra again;}"
PTX = f"""\
\tst.shared.b32 [%r1], %r2;
\tbar.sync 0;
\tld.shared.b32 %r3, [%r4];
\tcp.async.wait_group 1;
\tsetp.lt.s32 %p1, %r3, %r5;
\tsetp.lt.f32 %p2, %f1, %f2;
\tmul.f32 %f3, %f1, %f2;
\tmma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{%f1, %f2, %f3, %f4}},
\t  {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {{%f1, %f2, %f3, %f4}};
\t{{.reg .pred p; setp.ne.b32 p, %r1, 0; wgmma.mma_async.m64n8k16.f32.f16.f16 {{%f1, %f2, %f3, %f4}}, %rd1, %rd2, p;}}
\t{WAIT}
\t@first st.release.gpu.global.s32 [%rd1], %r1;
\tret;
"""


def test_each_kind_of_mutant() -> None:
    changes = {
        kind: [mutant.change for mutant in mutants(PTX, kind)] for kind in ("sync", "mask", "fragment", "rescale")
    }
    assert changes["sync"] == [
        "delete bar.sync 0;",
        "move bar.sync 0; later",
        "move bar.sync 0; earlier",
        "delete cp.async.wait_group 1;",
        "move cp.async.wait_group 1; later",
        "move cp.async.wait_group 1; earlier",
        "cp.async.wait_group 1; leaves one more",
        f"delete {WAIT}",
        f"move {WAIT} earlier",
        "@first st.release.gpu.global.s32 [%rd1], %r1; becomes relaxed",
    ]
    assert changes["mask"] == ["lt becomes le: setp.lt.s32 %p1, %r3, %r5;"]
    assert [change.split(":")[0][-1] for change in changes["fragment"]] == ["D", "A", "B", "D"]
    assert changes["rescale"] == ["drop mul.f32 %f3, %f1, %f2;"]


def test_mutants_change_one_thing() -> None:
    lines = PTX.split("\n")
    moved = {mutant.change: mutant.ptx.split("\n") for mutant in mutants(PTX, "sync")}
    assert moved["delete bar.sync 0;"][1] == ""
    assert moved["move bar.sync 0; later"][1:3] == [lines[2], lines[1]]
    assert moved["move bar.sync 0; earlier"][:2] == [lines[1], lines[0]]
    swapped = mutants(PTX, "fragment")[1].ptx
    assert "{%r2, %r1, %r3, %r4}" in swapped
    assert "{%f2, %f1, %f3, %f4}, %rd1" in mutants(PTX, "fragment")[3].ptx
    assert len(mutants(PTX, "sync", limit=2)) == 2


@pytest.mark.parametrize("arch", [80, 90])
def test_broken_synchronisation_of_the_attention_pattern_is_noticed(arch: int) -> None:
    """Deleting a wait or a barrier inside the loop is caught; the drain after the loop is the known survivor."""
    verdicts = list(run(SCENARIOS["attention_full"], arch, ("sync",), limit=12))
    caught = [verdict for verdict in verdicts if verdict.caught_by != "survived"]
    assert len(caught) >= 7, table(verdicts)
    assert all(verdict.caught_by == "machine" for verdict in caught), table(verdicts)


# The kernels that take seconds to compile, one of each backend; the others on one architecture with all that is slow.
QUICK = [("forward_slope", 80), ("forward_slope", 90), ("cuda_slope", 80)]


def _scenarios() -> Iterator[Any]:
    seen: set[str] = set()
    for scenario, arch in survivors.scenarios():
        slow = pytest.mark.sweep if scenario in seen else pytest.mark.slow
        seen.add(scenario)
        yield pytest.param(scenario, arch, marks=() if (scenario, arch) in QUICK else slow)


@pytest.mark.parametrize(("scenario", "arch"), list(_scenarios()))
def test_the_survivors_of_our_own_kernels_are_the_examined_ones(scenario: str, arch: int) -> None:
    """A sample of what `python -m tests.ptxsim.mutate` runs whole."""
    if scenario.startswith("cuda") and compiler.missing() is not None:
        pytest.skip("compiling CUDA needs cuda.core and NVRTC")
    verdicts = list(run(SCENARIOS[scenario], arch, ("sync",), limit=3))
    assert any(verdict.caught_by != "survived" for verdict in verdicts), table(verdicts)
    assert strangers(verdicts, scenario, arch) == []


def test_a_survivor_is_known_by_its_change_and_its_source_line() -> None:
    (deleted, *_) = mutants("// kernel.py:1:2\n\tbar.sync \t0;\n", "sync")
    assert survivors.signature(deleted, deleted.ptx) == ("sync", "delete bar.sync 0;", "")
    root = Path(__file__).resolve().parents[2]
    files = f'\t.file\t1 "{root}/kernels/attention/forward.py"\n\t.file\t2 "{root}/csrc/cuda/ptx/ptx.h"\n'
    lines = files + "\t.loc\t2 7 3, function_name $L__info_string0, inlined_at 1 1 0\n"
    (moved, *_) = mutants(lines + "\tsetp.lt.s32 \t%p13, %r3, %r141;\n", "mask")
    kind, change, place = survivors.signature(moved, moved.ptx)
    assert (kind, change) == ("mask", "lt becomes le: setp.lt.s32 %p, %r, %r;")
    assert place.startswith('attention/forward.py: """Attention forward')
    unknown = survivors.unexplained("forward_slope", 80, "attention_forward", [(kind, change, "nowhere")])
    assert unknown == {(kind, change, "nowhere"): 1}
