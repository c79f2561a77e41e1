"""Every finding of the PTX machine, planted in a few lines, beside the correct lines that it must accept."""

import pytest
import torch

from tests.ptxsim import Fault, Findings, Options, Report
from tests.ptxsim.snippet import snippet

WORDS = ".reg .b32 %w, %v, %r;"
SLOT = "shl.b32 %w, %t, 2; add.u32 %w, %w, %s;"  # this thread's word of shared memory
MIRROR = "xor.b32 %v, %t, 32; shl.b32 %v, %v, 2; add.u32 %v, %v, %s;"  # the word of a thread in another warp
NEIGHBOUR = "xor.b32 %v, %t, 1; shl.b32 %v, %v, 2; add.u32 %v, %v, %s;"  # of a lane beside this one


def shared_run(body: str, options: Options | None = None, lanes: int = 64) -> tuple[Report, torch.Tensor]:
    out = torch.zeros(lanes, dtype=torch.int32)
    report = snippet(body, [], [out], declare=WORDS, shared=4 * lanes, options=options)
    return report, out


def kinds(report: Report) -> set[str]:
    return set(report.findings)


@pytest.mark.parametrize("barrier", ["bar.sync 0;", "barrier.sync.aligned 0, 64;", ""])
def test_a_read_of_another_warps_word_needs_a_barrier(barrier: str) -> None:
    report, out = shared_run(f"{SLOT}{MIRROR} st.shared.b32 [%w], %t; {barrier} ld.shared.b32 %d0, [%v];")
    if barrier:
        report.check()
        assert out.tolist() == [i ^ 32 for i in range(64)]
    else:
        assert "shared_race" in kinds(report)
        with pytest.raises(Findings, match="shared_race"):
            report.check()


@pytest.mark.parametrize("barrier", ["bar.sync 0;", ""])
def test_a_write_over_another_warps_read_needs_a_barrier(barrier: str) -> None:
    body = (
        f"{SLOT}{MIRROR} st.shared.b32 [%w], %t; bar.sync 0; ld.shared.b32 %d0, [%v]; {barrier} st.shared.b32 [%w], 7;"
    )
    assert ("shared_race" in kinds(shared_run(body)[0])) == (not barrier)


@pytest.mark.parametrize("sync", ["bar.warp.sync 0xffffffff;", ""])
def test_a_read_of_another_lanes_word_needs_a_warp_barrier(sync: str) -> None:
    report, out = shared_run(f"{SLOT}{NEIGHBOUR} st.shared.b32 [%w], %t; {sync} ld.shared.b32 %d0, [%v];")
    assert kinds(report) == (set() if sync else {"intra_warp_race"})
    assert out.tolist() == [i ^ 1 for i in range(64)]


@pytest.mark.parametrize("sync", ["bar.warp.sync 0xffffffff;", ""])
def test_a_write_over_another_lanes_read_needs_a_warp_barrier(sync: str) -> None:
    read = f"{SLOT}{NEIGHBOUR} st.shared.b32 [%w], %t; bar.warp.sync 0xffffffff; ld.shared.b32 %d0, [%v];"
    report, _ = shared_run(f"{read} {sync} st.shared.b32 [%w], 7;")
    assert kinds(report) == (set() if sync else {"intra_warp_race"})


def matrix_store(value: str, then: str) -> set[str]:
    """Two warps store the same four 8x8 matrices, all elements `value`, to the same place."""
    rows = f"and.b32 %w, %t, 31; shl.b32 %w, %w, 4; add.u32 %w, %w, %s; mov.b32 %v, {value};"
    store = "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%w], {%v, %v, %v, %v};"
    return kinds(shared_run(f"{rows}{store} {then} mov.u32 %d0, 0;", lanes=512)[0])


def test_warps_may_store_the_same_value_to_one_place() -> None:
    assert shared_run("st.shared.b32 [%s], 7; mov.u32 %d0, 0;")[0].findings == {}
    assert "shared_race" in kinds(shared_run("st.shared.b32 [%s], %t; mov.u32 %d0, 0;")[0])
    assert matrix_store("7", "") == set()
    assert matrix_store("%t", "") == {"shared_race"}
    assert matrix_store("7", "bar.sync 0; ld.shared.b32 %v, [%w];") == set()
    assert "intra_warp_race" in matrix_store("7", "ld.shared.b32 %v, [%w];")


def test_neighbouring_bytes_of_two_warps_are_no_race() -> None:
    report, _ = shared_run("add.u32 %w, %t, %s; st.shared.b8 [%w], %t; mov.u32 %d0, 0;")
    report.check()


def test_shared_atomics_do_not_race_with_one_another() -> None:
    count = "red.shared.add.u32 [%s], 1;"
    clear = "setp.eq.u32 %p, %t, 0; @%p st.shared.b32 [%s], 0; bar.sync 0;"
    shared_run(f"{clear} {count} bar.sync 0; ld.shared.b32 %d0, [%s];")[0].check()
    assert "shared_race" in kinds(shared_run(f"{count} ld.shared.b32 %d0, [%s];")[0])


def test_an_uninitialised_read() -> None:
    report, out = shared_run(f"{SLOT} ld.shared.b32 %d0, [%w];")
    assert kinds(report) == {"uninitialised_shared"}
    assert out.view(torch.float32).isnan().all()


COPY = f"{SLOT} mad.wide.u32 %at, %t, 4, %x0; cp.async.ca.shared.global [%w], [%at], 4;"


def copy_run(body: str, options: Options | None = None) -> tuple[Report, list[int]]:
    out = torch.zeros(32, dtype=torch.int32)
    source = torch.arange(32, dtype=torch.int32)
    report = snippet(body, [], [out], declare=WORDS, shared=128, extra=[source], options=options)
    return report, out.tolist()


@pytest.mark.parametrize("late", [True, False])
def test_copied_bytes_may_be_read_after_the_wait(late: bool) -> None:
    body = f"{COPY} cp.async.commit_group; cp.async.wait_group 0; ld.shared.b32 %d0, [%w];"
    report, out = copy_run(body, Options(late=late))
    report.check()
    assert out == list(range(32))


@pytest.mark.parametrize("wait", ["", "cp.async.wait_group 1;"])
def test_copied_bytes_may_not_be_read_before_the_wait(wait: str) -> None:
    report, out = copy_run(f"{COPY} cp.async.commit_group; {wait} ld.shared.b32 %d0, [%w];")
    assert kinds(report) == {"in_flight"}
    assert out != list(range(32))


def test_a_copy_that_was_not_committed_is_not_waited_for() -> None:
    assert kinds(copy_run(f"{COPY} cp.async.wait_group 0; ld.shared.b32 %d0, [%w];")[0]) == {"in_flight"}
    copy_run(f"{COPY} cp.async.wait_all; ld.shared.b32 %d0, [%w];")[0].check()


def test_copy_groups_belong_to_threads() -> None:
    """Odd lanes commit twice, so that wait_group 1 covers the first group of theirs and none of the even lanes'."""
    body = f"""{COPY} cp.async.commit_group; and.b32 %r, %t, 1; setp.eq.u32 %p, %r, 1;
    @%p cp.async.commit_group; cp.async.wait_group 1; mov.u32 %d0, 99; @%p ld.shared.b32 %d0, [%w];"""
    report, out = copy_run(body)
    report.check()
    assert out == [lane if lane % 2 else 99 for lane in range(32)]
    report, _ = copy_run(body.replace("@%p ld", "@!%p ld"))
    assert kinds(report) == {"in_flight"}


def test_copies_fill_what_they_do_not_read_with_zeros() -> None:
    read = "cp.async.ca.shared.global [%w], [%at], 4, %r; cp.async.wait_all; ld.shared.b32 %d0, [%w];"
    body = f"{SLOT} mad.wide.u32 %at, %t, 4, %x0; and.b32 %r, %t, 4; {read}"
    report, out = copy_run(body)
    report.check()
    assert out == [lane if lane & 4 else 0 for lane in range(32)]


BLOCKS = "mov.u32 %r, %ctaid.x; mad.wide.u32 %at, %r, 4, %x0; setp.eq.u32 %p, %t, 0;"


def block_findings(body: str) -> set[str]:
    """What two blocks of 32 threads that run `body` and exit find; %r is the block, %at its word of %x0."""
    memory = torch.zeros(8, dtype=torch.int32)
    out = torch.zeros(32, dtype=torch.int32)
    return kinds(snippet(BLOCKS + body + "exit;", [], [out], declare=WORDS, grid=(2,), extra=[memory]))


def test_blocks_may_not_write_what_others_touch() -> None:
    assert block_findings("@%p st.global.b32 [%at], 1;") == set()
    assert block_findings("@%p st.global.b32 [%x0], 1;") == {"global_race"}
    assert block_findings("ld.global.b32 %w, [%x0]; @%p st.global.b32 [%at], 1;") == {"global_race"}
    assert block_findings("ld.global.b32 %w, [%x0];") == set()


def test_atomics_of_blocks_may_meet() -> None:
    assert block_findings("red.global.add.u32 [%x0], 1;") == set()
    assert block_findings("red.global.add.u32 [%x0], 1; ld.global.b32 %w, [%x0];") == {"global_race"}


def test_volatile_reads_may_meet_atomics() -> None:
    poll = "ld.volatile.global.u32 %w, [%x0];"
    assert block_findings(f"{poll} red.global.add.u32 [%x0], 1;") == set()
    assert block_findings(f"{poll} ld.relaxed.gpu.global.u32 %w, [%x0];") == set()
    assert block_findings(f"{poll} @%p st.global.b32 [%x0], 1;") == {"global_race"}
    assert block_findings("ld.global.u32 %w, [%x0]; red.global.add.u32 [%x0], 1;") == {"global_race"}


PUBLISH = "setp.eq.and.u32 %p, %r, 0, %p; @%p st.global.b32 [%x0+16], %r; {fence} @%p {add} [%x0], 1;"
CONSUME = """setp.eq.u32 %q, %r, 1; @!%q bra ON; AGAIN: {load} %w, [%x0]; setp.eq.u32 %p, %w, 0; @%p bra AGAIN;
{fence} ld.global.b32 %v, [%x0+16]; ON:"""


@pytest.mark.parametrize(
    ("add", "before", "load", "after", "found"),
    [
        ("red.release.gpu.global.add.u32", "", "ld.acquire.gpu.global.u32", "", set()),
        ("red.relaxed.gpu.global.add.u32", "", "ld.acquire.gpu.global.u32", "", {"global_race"}),
        ("red.release.gpu.global.add.u32", "", "ld.relaxed.gpu.global.u32", "", {"global_race"}),
        ("red.relaxed.gpu.global.add.u32", "fence.acq_rel.gpu;", "ld.volatile.global.u32", "membar.gl;", set()),
        ("red.relaxed.gpu.global.add.u32", "", "ld.relaxed.gpu.global.u32", "membar.gl;", {"global_race"}),
        ("red.relaxed.gpu.global.add.u32", "membar.gl;", "ld.relaxed.gpu.global.u32", "", {"global_race"}),
        ("red.relaxed.gpu.global.add.u32", "membar.cta;", "ld.relaxed.gpu.global.u32", "membar.gl;", {"global_race"}),
    ],
)
def test_an_acquire_orders_what_a_release_published(
    add: str, before: str, load: str, after: str, found: set[str]
) -> None:
    body = PUBLISH.format(fence=before, add=add) + CONSUME.format(load=load, fence=after)
    assert block_findings(body) == found


# Each block adds its number to one word, after the block before it: block n waits for n in %x1, then publishes n + 1.
# Warp 1 does the adding and thread 0 the publishing.
TURNS = """mov.u32 %r, %ctaid.x; {wait} {before}
setp.eq.u32 %p, %t, 32; @%p ld.global.b32 %v, [%x0]; @%p add.u32 %v, %v, %r; @%p st.global.b32 [%x0], %v;
{after} add.u32 %v, %r, 1; setp.eq.u32 %q, %t, 0; @%q st.release.gpu.global.b32 [%x1], %v; exit;"""
WAIT = "AGAIN: ld.acquire.gpu.global.b32 %w, [%x1]; setp.lt.u32 %p, %w, %r; @%p bra AGAIN;"


@pytest.mark.parametrize(
    ("wait", "before", "after", "found"),
    [
        (WAIT, "", "bar.sync 0;", set()),
        (WAIT, "", "", {"global_race"}),  # what warp 1 wrote is published by warp 0
        (WAIT.replace("setp", "add.u32 %w, %w, 1; setp"), "", "bar.sync 0;", {"global_race"}),  # for the wrong turn
        (WAIT.replace("acquire", "relaxed"), "", "bar.sync 0;", {"global_race"}),
        ("setp.eq.u32 %q, %t, 0; @!%q bra ON;" + WAIT + "ON:", "bar.sync 0;", "bar.sync 0;", set()),
        ("setp.eq.u32 %q, %t, 0; @!%q bra ON;" + WAIT + "ON:", "", "bar.sync 0;", {"global_race"}),
    ],
)
def test_blocks_that_take_turns(wait: str, before: str, after: str, found: set[str]) -> None:
    body = TURNS.format(wait=wait, before=before, after=after)
    met: set[str] = set()
    for seed in range(1, 9):  # whether a block meets the one before in the act depends on the schedule
        total, turn = (torch.zeros(1, dtype=torch.int32) for _ in range(2))
        out = torch.zeros(64, dtype=torch.int32)
        options = Options(seed=seed, limit=1_000_000)
        try:
            met |= kinds(snippet(body, [], [out], declare=WORDS, grid=(7,), extra=[total, turn], options=options))
        except Fault as error:
            met.add(str(error))
        assert found or total.item() == 21
    assert found <= met
    assert found or not met


def test_warps_of_a_block_race_on_global_memory_too() -> None:
    out = torch.zeros(64, dtype=torch.int32)
    memory = torch.zeros(64, dtype=torch.int32)
    store = "mad.wide.u32 %at, %t, 4, %x0; st.global.b32 [%at], %t;"
    load = "xor.b32 %w, %t, 32; mad.wide.u32 %at, %w, 4, %x0; ld.global.b32 %d0, [%at];"
    for sync, want in (("bar.sync 0;", set()), ("", {"global_race"})):
        report = snippet(store + sync + load, [], [out], declare=WORDS, extra=[memory])
        assert kinds(report) == want


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %d0, [%x0+32];", "global memory out of bounds"),
        ("ld.global.b32 %d0, [%x0+-4];", "global memory out of bounds"),
        ("ld.global.b32 %d0, [%x0+2];", "misaligned global access"),
        ("ld.shared.b32 %d0, [%s+256];", "shared memory out of bounds"),
        ("ld.shared.v2.b32 {%d0, %r}, [%s+4];", "misaligned shared access"),
        ("setp.lt.u32 %p, %t, 8; @%p bar.sync 0; mov.u32 %d0, 0;", "some live lanes"),
        ("setp.lt.u32 %p, %t, 32; @%p bra SKIP; bar.sync 1, 64; SKIP: mov.u32 %d0, 0;", "deadlock"),
        ("trap;", "trap"),
    ],
)
def test_what_stops_a_kernel(body: str, message: str) -> None:
    memory = torch.zeros(8, dtype=torch.int32)
    out = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(Fault, match=message):
        snippet(body, [], [out], declare=WORDS, shared=256, extra=[memory])


def test_labels_belong_to_their_braces() -> None:
    loop = "{ .reg .pred %more; again: add.u32 %d0, %d0, 1; setp.lt.u32 %more, %d0, LIMIT; @%more bra again; }"
    _, out = shared_run("mov.u32 %d0, 0;" + loop.replace("LIMIT", "3") + loop.replace("LIMIT", "5"))
    assert out.tolist() == [5] * 64


def test_a_view_bounds_what_may_be_touched() -> None:
    """Of a storage, only the bytes that the tensor given to the kernel spans."""
    storage = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(Fault, match="out of bounds"):
        snippet("ld.global.b32 %d0, [%x0+128];", [], [torch.zeros(32, dtype=torch.int32)], extra=[storage[:32]])


def test_bank_conflicts_and_sectors_are_counted() -> None:
    body = "mul.lo.u32 %w, %t, {stride}; add.u32 %w, %w, %s; st.shared.b32 [%w], %t; mov.u32 %d0, 0;"
    for stride, wavefronts in ((4, 1), (8, 2), (128, 32)):
        out = torch.zeros(32, dtype=torch.int32)
        report = snippet(body.format(stride=stride), [], [out], declare=WORDS, shared=4096)
        assert report.counters["shared_wavefronts"] == wavefronts
        assert report.counters["global_sectors"] == 4  # the store of %d0: 128 bytes


def test_bank_conflicts_are_told_by_instruction_and_loop() -> None:
    """Two loops store with a stride of two words; one of them multiplies matrices."""
    mma = "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f0, %f1, %f2, %f3}, {%r, %r}, {%r}, {%f0, %f1, %f2, %f3};"
    loop = """mov.u32 %w, 0; LOOP{n}: st.shared.b32 [%v], %t;
    {body} add.u32 %w, %w, 1; setp.lt.u32 %p, %w, 3; @%p bra LOOP{n};"""
    setup = f"{WORDS} .reg .f32 %f<4>;"
    body = "shl.b32 %v, %t, 3; add.u32 %v, %v, %s; mov.u32 %r, 0; mov.f32 %f0, 0f00000000; mov.f32 %f1, 0f00000000;"
    body += "mov.f32 %f2, 0f00000000; mov.f32 %f3, 0f00000000;" + loop.format(n=0, body="") + loop.format(n=1, body=mma)
    report = snippet(body + "mov.u32 %d0, 0;", [], [torch.zeros(32, dtype=torch.int32)], declare=setup, shared=256)
    found = [(x.text, x.requests, x.wavefronts, x.ideal, x.main_loop) for x in report.conflicts]
    assert found == [("st.shared.b32 [%v], %t;", 3, 6, 3, main) for main in (False, True)]
    assert report.main_loop_conflicts == report.conflicts[1:]


@pytest.mark.parametrize(
    ("access", "stride", "wavefronts"),
    [
        # Eight lanes of 16 bytes fill the banks; rows of 128 bytes all start in the same one, of 144 do not.
        ("st.shared.v4.b32 [%w], {%t, %t, %t, %t};", 16, 4),
        ("st.shared.v4.b32 [%w], {%t, %t, %t, %t};", 128, 32),
        ("st.shared.v2.b32 [%w], {%t, %t};", 8, 2),
        ("st.shared.v2.b32 [%w], {%t, %t};", 128, 32),
        ("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%w], {%t, %t, %t, %t};", 128, 32),
        ("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%w], {%t, %t, %t, %t};", 144, 4),
        ("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%w], {%t, %t};", 144, 2),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%w, %w, %w, %w}, [%w];", 128, 32),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%w, %w, %w, %w}, [%w];", 144, 4),
        ("add.u32 %w, %s, 0; ld.shared.b32 %w, [%w];", 0, 1),
    ],
)
def test_wavefronts_of_wide_accesses(access: str, stride: int, wavefronts: int) -> None:
    body = f"mul.lo.u32 %w, %t, {stride}; add.u32 %w, %w, %s; {access} mov.u32 %d0, 0;"
    out = torch.zeros(32, dtype=torch.int32)
    report = snippet(body, [], [out], declare=WORDS, shared=32 * 144)
    assert report.counters["shared_wavefronts"] == wavefronts
