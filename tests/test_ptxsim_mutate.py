"""Mutation testing itself: what mutants there are, and that breaking a kernel's synchronisation is noticed."""

import pytest

from tests.ptxsim.mutants import mutants
from tests.ptxsim.mutate import run, table
from tests.ptxsim.scenarios import SCENARIOS

PTX = """\
\tst.shared.b32 [%r1], %r2;
\tbar.sync 0;
\tld.shared.b32 %r3, [%r4];
\tcp.async.wait_group 1;
\tsetp.lt.s32 %p1, %r3, %r5;
\tsetp.lt.f32 %p2, %f1, %f2;
\tmul.f32 %f3, %f1, %f2;
\tmma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1, %f2, %f3, %f4},
\t  {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%f1, %f2, %f3, %f4};
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
        "move cp.async.wait_group 1; earlier",
        "cp.async.wait_group 1; leaves one more",
    ]
    assert changes["mask"] == ["lt becomes le: setp.lt.s32 %p1, %r3, %r5;"]
    assert len(changes["fragment"]) == 3
    assert changes["rescale"] == ["drop mul.f32 %f3, %f1, %f2;"]


def test_mutants_change_one_thing() -> None:
    lines = PTX.split("\n")
    moved = {mutant.change: mutant.ptx.split("\n") for mutant in mutants(PTX, "sync")}
    assert moved["delete bar.sync 0;"][1] == ""
    assert moved["move bar.sync 0; later"][1:3] == [lines[2], lines[1]]
    assert moved["move bar.sync 0; earlier"][:2] == [lines[1], lines[0]]
    swapped = mutants(PTX, "fragment")[1].ptx
    assert "{%r2, %r1, %r3, %r4}" in swapped
    assert len(mutants(PTX, "sync", limit=2)) == 2


@pytest.mark.parametrize("arch", [80, 90])
def test_broken_synchronisation_of_the_attention_pattern_is_noticed(arch: int) -> None:
    """Deleting a wait or a barrier inside the loop is caught; the drain after the loop is the known survivor."""
    verdicts = list(run(SCENARIOS["attention_full"], arch, ("sync",), limit=12))
    caught = [verdict for verdict in verdicts if verdict.caught_by != "survived"]
    assert len(caught) >= 7, table(verdicts)
    assert all(verdict.caught_by == "machine" for verdict in caught), table(verdicts)
