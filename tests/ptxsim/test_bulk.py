"""mbarriers, bulk copies and tensor (TMA) copies: where every byte lands, and what is found when nobody waits."""

import itertools

import pytest
import torch

from tests.ptxsim import Fault, Options, Report
from tests.ptxsim.snippet import snippet
from tests.ptxsim.tensor_map import encode

BARRIER = 8192  # the shared address of the first mbarrier, beyond what the copies fill
DECLARE = ".reg .b32 %w, %v, %r, %b; .reg .b64 %state; .reg .pred %first, %done;"
PLACE = f"add.u32 %b, %s, {BARRIER};"
FIRST = "setp.eq.u32 %first, %t, 0;"
FENCE = "@%first fence.mbarrier_init.release.cluster;"
INIT = f"{FIRST} @%first mbarrier.init.shared::cta.b64 [%b], 1; {FENCE} bar.sync 0;"


def wait(parity: int, barrier: str = "%b", name: str = "W") -> str:
    test = f"mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 %done, [{barrier}], {parity};"
    return f"{name}: {test} @!%done bra {name};"


def run(
    body: str,
    extra: list[torch.Tensor],
    maps: list[bytes] = (),
    threads: int = 64,
    late: bool = True,  # type: ignore[assignment]
) -> tuple[Report, torch.Tensor]:
    out = torch.zeros(threads, dtype=torch.int32)
    options = Options(late=late)
    report = snippet(
        PLACE + body, [], [out], declare=DECLARE, shared=BARRIER + 64, extra=extra, maps=maps, options=options
    )
    return report, out


def kinds(report: Report) -> set[str]:
    return set(report.findings)


LOAD = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%x0], 256, [%b];"
EXPECT = "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 %state, [%b], {bytes};"
READ = "shl.b32 %w, %t, 2; add.u32 %w, %w, %s; ld.shared.b32 %d0, [%w];"


def copy(bytes_: int = 256, init: str = INIT, then: str = "", waiting: str | None = None) -> str:
    """One thread starts a copy of 64 words; all wait for it and read a word each."""
    sent = f"@%first {EXPECT.format(bytes=bytes_)} @%first {LOAD}"
    return f"{init} {sent} {then} {wait(0) if waiting is None else waiting} {READ}"


@pytest.mark.parametrize("late", [True, False])
def test_a_bulk_copy_is_there_after_the_wait(late: bool) -> None:
    source = torch.arange(64, dtype=torch.int32)
    report, out = run(copy(), [source], late=late)
    report.check()
    assert torch.equal(out, source)


def test_bytes_may_not_be_touched_before_their_phase_completes() -> None:
    source = torch.arange(64, dtype=torch.int32)
    report, out = run(copy(waiting=""), [source])
    assert "in_flight" in kinds(report)
    assert not torch.equal(out, source)
    assert report.counters["unwaited_copies"] == 16
    # A wait for the phase before succeeds at once.
    assert "in_flight" in kinds(run(copy(waiting=wait(1)), [source])[0])
    # The answer of a single try_wait must be looked at.
    single = "mbarrier.try_wait.parity.shared::cta.b64 %done, [%b], 0;"
    assert kinds(run(copy(waiting=single), [source])[0]) & {"in_flight", "shared_race"}
    # A relaxed wait orders nothing: the second warp may see the barrier before the bytes.
    assert "shared_race" in kinds(run(copy(waiting=wait(0).replace("acquire", "relaxed")), [source])[0])
    overwrite = "@%first st.shared.b32 [%s], 7;"
    assert "in_flight" in kinds(run(copy(then=overwrite), [source])[0])
    assert "in_flight" in kinds(run(copy(bytes_=512, then=f"@%first {LOAD}"), [source])[0])


def test_early_bytes_are_still_a_race_without_a_wait() -> None:
    assert "shared_race" in kinds(run(copy(waiting=""), [torch.arange(64, dtype=torch.int32)], late=False)[0])


@pytest.mark.parametrize("bytes_", [240, 272])
def test_a_wrong_byte_count_is_a_deadlock(bytes_: int) -> None:
    with pytest.raises(Fault, match=f"deadlock.*lacks 0 arrivals and {bytes_} bytes .256 on their way. for phase 0"):
        run(copy(bytes_=bytes_), [torch.arange(64, dtype=torch.int32)])


def test_a_wait_for_one_barrier_does_not_cover_the_copies_of_another() -> None:
    second = "add.u32 %v, %b, 8; @%first mbarrier.init.shared::cta.b64 [%v], 1;"
    send = "add.u32 %r, %s, 1024; @%first mbarrier.arrive.expect_tx.shared::cta.b64 %state, [%v], 256;"
    send += "@%first cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r], [%x0], 256, [%v];"
    both = copy(init=f"{FIRST} {second} @%first mbarrier.init.shared::cta.b64 [%b], 1; {FENCE} bar.sync 0;", then=send)
    read_second = "ld.shared.b32 %d0, [%w+1024];"
    source = torch.arange(64, dtype=torch.int32)
    run(both + wait(0, "%v", "V") + read_second, [source])[0].check()
    assert kinds(run(both + read_second, [source])[0]) == {"in_flight"}
    assert kinds(run(both + read_second, [source], late=False)[0]) == {"shared_race"}


def test_the_initialisation_must_be_published() -> None:
    source = torch.arange(64, dtype=torch.int32)
    init = "mbarrier.init.shared::cta.b64 [%b], 1;"
    assert "proxy_fence" in kinds(run(copy(init=f"{FIRST} @%first {init} bar.sync 0;"), [source])[0])
    run(copy(init=f"{FIRST} @%first {init} @%first fence.proxy.async.shared::cta; bar.sync 0;"), [source])[0].check()
    unordered = f"setp.eq.u32 %first, %t, 0; @%first {init} {FENCE}"
    with pytest.raises((AssertionError, Fault)):
        run(copy(init=unordered), [source])[0].check()
    with pytest.raises(Fault, match="was not initialised"):
        run(copy(init=FIRST), [source])


def test_bytes_written_before_a_copy_over_them_need_a_fence() -> None:
    source = torch.arange(64, dtype=torch.int32)
    dirty = "shl.b32 %w, %t, 2; add.u32 %w, %w, %s; st.shared.b32 [%w], 0; {fence} bar.sync 0;"
    for fence, found in (("fence.proxy.async.shared::cta;", set()), ("", {"proxy_fence"})):
        assert kinds(run(copy(init=INIT + dirty.format(fence=fence)), [source])[0]) == found


# Warp 0 fills a word a lane and arrives; warp 1 waits, doubles and arrives on the second barrier; three rounds.
HANDSHAKE = f"""{FIRST} add.u32 %v, %b, 8; and.b32 %w, %t, 31; shl.b32 %w, %w, 2; add.u32 %w, %w, %s;
@%first mbarrier.init.shared::cta.b64 [%b], 32; @%first mbarrier.init.shared::cta.b64 [%v], 32; bar.sync 0;
mov.u32 %r, 0; mov.u32 %d0, 0; setp.lt.u32 %p, %t, 32; @!%p bra CONSUMER;
PRODUCER: and.b32 %a, %r, 1; xor.b32 %c, %a, 1;
E: mbarrier.try_wait.parity.shared::cta.b64 %done, [%v], %c; @!%done bra E;
st.shared.b32 [%w], %r; mbarrier.arrive.shared::cta.b64 _, [%b];
add.u32 %r, %r, 1; setp.lt.u32 %done, %r, 3; @%done bra PRODUCER; bra END;
CONSUMER: and.b32 %a, %r, 1;
F: mbarrier.test_wait.parity.shared::cta.b64 %done, [%b], %a; @!%done bra F;
ld.shared.b32 %c, [%w]; add.u32 %d0, %d0, %c; mbarrier.arrive.shared::cta.b64 %state, [%v];
add.u32 %r, %r, 1; setp.lt.u32 %done, %r, 3; @%done bra CONSUMER;
END:"""


def handshake(body: str, seed: int = 1) -> tuple[Report, torch.Tensor]:
    out = torch.zeros(64, dtype=torch.int32)
    report = snippet(
        PLACE + body, [], [out], declare=DECLARE + ".reg .b32 %a, %c;", shared=BARRIER + 64, options=Options(seed=seed)
    )
    return report, out


def test_phases_hand_a_buffer_to_and_fro() -> None:
    report, out = handshake(HANDSHAKE)
    report.check()
    assert out.tolist() == [0] * 32 + [3] * 32


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("@!%done bra E;", ""),
        ("@!%done bra F;", ""),
        ("xor.b32 %c, %a, 1", "xor.b32 %c, %a, 0"),
        ("st.shared.b32 [%w], %r; mbarrier.arrive.shared::cta.b64 _, [%b];",
         "mbarrier.arrive.shared::cta.b64 _, [%b]; st.shared.b32 [%w], %r;"),
        ("mbarrier.arrive.shared::cta.b64 %state, [%v];", ""),
        ("[%b], 32;", "[%b], 24;"),
        ("[%b], 32;", "[%b], 33;"),
    ],
)  # fmt: skip
def test_a_broken_handshake_is_noticed(before: str, after: str) -> None:
    assert before in HANDSHAKE
    with pytest.raises((AssertionError, Fault)):
        handshake(HANDSHAKE.replace(before, after))[0].check()


def test_a_wait_may_name_the_phase_by_its_state() -> None:
    body = f"""{FIRST} @%first mbarrier.init.shared::cta.b64 [%b], 64; bar.sync 0;
    shl.b32 %w, %t, 2; add.u32 %w, %w, %s; st.shared.b32 [%w], %t; xor.b32 %w, %w, 128;
    mbarrier.arrive.release.cta.shared::cta.b64 %state, [%b], 1;
    W: mbarrier.test_wait.acquire.cta.shared::cta.b64 %done, [%b], %state; @!%done bra W; ld.shared.b32 %d0, [%w];"""
    report, out = run(body, [])
    report.check()
    assert out.tolist() == [t ^ 32 for t in range(64)]


def test_an_arrival_of_one_lane_covers_the_others_after_a_warp_barrier() -> None:
    body = f"{INIT} {READ.replace('ld.shared.b32 %d0, [%w]', 'st.shared.b32 [%w], %t')} {{sync}}"
    body += "mov.u32 %d0, 0; @%first mbarrier.arrive.shared::cta.b64 %state, [%b];"
    assert kinds(run(body.format(sync="bar.warp.sync -1;"), [])[0]) == set()
    assert kinds(run(body.format(sync=""), [])[0]) == {"intra_warp_race"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("@%first mbarrier.arrive.shared::cta.b64 %state, [%b], 2;", "more arrivals in a phase than"),
        ("@%first mbarrier.inval.shared::cta.b64 [%b]; @%first mbarrier.inval.shared::cta.b64 [%b];", "not exist"),
        ("@%first mbarrier.init.shared::cta.b64 [%b], 0;", "mbarrier count 0"),
        ("setmaxnreg.inc.sync.aligned.u32 240; setmaxnreg.dec.sync.aligned.u32 20;", "setmaxnreg takes 24 to 256"),
        ("setp.lt.u32 %p, %t, 32; @%p bar.sync 1, 64; @!%p bar.sync 1, 96;", "another number of threads"),
        ("bar.sync 16;", "barrier 16 does not exist"),
    ],
)
def test_what_stops_a_kernel(body: str, message: str) -> None:
    with pytest.raises(Fault, match=message):
        run(f"{INIT} {body} mov.u32 %d0, 0;", [])


def tensor_load(corner: tuple[int, ...], bytes_: int) -> str:
    """A tensor copy to the start of shared memory, which is then written to %x1, a word a turn."""
    place = ", ".join(map(str, corner))
    name = f"cp.async.bulk.tensor.{len(corner)}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
    sent = f"@%first {EXPECT.format(bytes=bytes_)} @%first {name} [%s], [%m0, {{{place}}}], [%b];"
    dump = f"""mov.u32 %r, %t; D: setp.ge.u32 %p, %r, {bytes_ // 4}; @%p bra END;
    shl.b32 %w, %r, 2; add.u32 %w, %w, %s; ld.shared.b32 %v, [%w]; mad.wide.u32 %at, %r, 4, %x1;
    st.global.b32 [%at], %v; add.u32 %r, %r, 64; bra D; END: mov.u32 %d0, 0;"""
    return f"{INIT} {sent} {wait(0)} {dump}"


def box_of(tensor: torch.Tensor, corner: tuple[int, ...], box: tuple[int, ...]) -> torch.Tensor:
    """The box at `corner` (innermost first), zero outside the tensor, dense."""
    out = torch.zeros(box[::-1], dtype=tensor.dtype)
    for place in itertools.product(*(range(n) for n in box)):
        at = [c + p for c, p in zip(corner, place, strict=True)]
        if all(0 <= i < n for i, n in zip(at, tensor.shape[::-1], strict=True)):
            out[place[::-1]] = tensor[tuple(at[::-1])]
    return out


def swizzled(dense: torch.Tensor, swizzle: int) -> torch.Tensor:
    """The bytes of shared memory: of every 8 rows of 128 bytes, 16-byte units are exchanged by the row's number."""
    units = dense.flatten().view(torch.uint8).reshape(-1, 16)
    out = torch.empty_like(units)
    for i, unit in enumerate(units):
        row = i // 8  # of 128 bytes
        out[i ^ (row % 8 & (max(swizzle, 16) // 16 - 1))] = unit
    return out.flatten()


TENSORS = [
    # shape, box and corner (innermost first), swizzle
    ((40, 64), (64, 16), (0, 8), 128),
    ((40, 64), (64, 16), (0, 33), 128),  # past the last row
    ((40, 64), (32, 8), (16, -3), 64),  # before the first
    ((40, 64), (16, 8), (56, 0), 32),  # past the end of the rows
    ((40, 64), (24, 8), (-5, 2), 0),
    ((3, 20, 64), (64, 8, 2), (0, 15, 1), 128),
    ((2, 3, 20, 64), (64, 8, 2, 1), (0, 4, 1, 1), 128),
    ((96,), (32,), (80,), 0),
]


@pytest.mark.parametrize(("shape", "box", "corner", "swizzle"), TENSORS)
@pytest.mark.parametrize("late", [True, False])
def test_where_a_tensor_copy_puts_its_bytes(
    shape: tuple[int, ...], box: tuple[int, ...], corner: tuple[int, ...], swizzle: int, late: bool
) -> None:
    tensor = torch.randn(shape).half()
    want = swizzled(box_of(tensor, corner, box), swizzle)
    got = torch.zeros(want.numel(), dtype=torch.uint8)
    body = tensor_load(corner, want.numel())
    run(body, [tensor, got], [encode(tensor, box, swizzle)], late=late)[0].check()
    assert torch.equal(got, want)


def test_a_tensor_copy_of_a_view() -> None:
    """Heads and tokens of [batch, token, head, dim] in either order; the padding between rows is never touched."""
    storage = torch.randn(2, 20, 3, 72).half()
    view = storage.transpose(1, 2)[..., :64]  # [batch, head, token, dim]
    got = torch.zeros(64 * 8 * 2, dtype=torch.uint8)
    run(tensor_load((0, 16, 2, 1), 1024), [view, got], [encode(view, (64, 8, 1, 1), 128)])[0].check()
    assert torch.equal(got, swizzled(box_of(view, (0, 16, 2, 1), (64, 8, 1, 1)), 128))


STORE = """shl.b32 %w, %t, 4; add.u32 %w, %w, %s; st.shared.v4.b32 [%w], {%t, %t, %t, %t}; FENCE bar.sync 0;
@%first cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%m0, {16, 2}], [%s];
@%first cp.async.bulk.commit_group; WAIT
@%first st.shared.b32 [%s], 9; mov.u32 %d0, 0;"""


def stored(fence: str, waiting: str, late: bool = True) -> tuple[set[str], torch.Tensor]:
    to = torch.zeros(5, 32, dtype=torch.int32)
    body = FIRST + STORE.replace("FENCE", fence).replace("WAIT", waiting)
    report, _ = run(body, [to], [encode(to, (32, 8), 128)], late=late)
    return kinds(report), to


@pytest.mark.parametrize("late", [True, False])
def test_a_tensor_store_stays_inside_the_tensor(late: bool) -> None:
    """Thread t stores unit t of the swizzled box [8, 32] whose corner is (16, 2); rows 5 and up, columns 32 and up
    are outside."""
    found, to = stored("fence.proxy.async.shared::cta;", "@%first cp.async.bulk.wait_group.read 0;", late)
    assert found == set()
    want = torch.zeros(5, 32, dtype=torch.int32)
    for row, column in itertools.product(range(3), range(16)):
        want[row + 2, column + 16] = (8 * row + column // 4) ^ row
    assert torch.equal(to, want)


def test_a_tensor_store_needs_its_fence_and_its_wait() -> None:
    assert "proxy_fence" in stored("", "@%first cp.async.bulk.wait_group.read 0;")[0]
    assert stored("fence.proxy.async;", "")[0] == {"in_flight"}
    assert stored("fence.proxy.async;", "@%first cp.async.bulk.wait_group.read 1;")[0] == {"in_flight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bulk_reductions_add(dtype: torch.dtype) -> None:
    name = {torch.float32: "f32", torch.bfloat16: "noftz.bf16"}[dtype]
    total, part = torch.randn(64).to(dtype), torch.randn(64).to(dtype)
    bits = 8 * part.element_size()
    want = (total.double() + part.double()).to(dtype)
    body = f"""{FIRST} mad.wide.u32 %at, %t, {bits // 8}, %x1; ld.global.b{bits} %v, [%at];
    mul.lo.u32 %w, %t, {bits // 8}; add.u32 %w, %w, %s; st.shared.b{bits} [%w], %v; fence.proxy.async; bar.sync 0;
    @%first cp.reduce.async.bulk.global.shared::cta.bulk_group.add.{name} [%x0], [%s], {8 * bits};
    @%first cp.async.bulk.commit_group; @%first cp.async.bulk.wait_group 0; mov.u32 %d0, 0;"""
    if bits == 16:
        body = body.replace("%v", "%h")
    run(".reg .b16 %h;" + body, [total, part])[0].check()
    assert torch.equal(total, want)


@pytest.mark.parametrize(
    ("tensor", "box", "swizzle", "message"),
    [
        (torch.zeros(4, 64), (64, 4), 128, "boxes as wide, got 128 and 256 bytes"),
        (torch.zeros(4, 66).half(), (64, 4), 0, "strides of 16 bytes"),
        (torch.zeros(4, 64).half(), (64,), 0, "expected 2 sizes from 1 to 256"),
        (torch.zeros(4, 64).half()[:, 1:], (8, 4), 0, "an address that is a multiple of 16"),
    ],
)
def test_a_map_that_the_driver_would_refuse(
    tensor: torch.Tensor, box: tuple[int, ...], swizzle: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        encode(tensor, box, swizzle)
