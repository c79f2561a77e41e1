"""The model of what each way costs: its limits, and what "auto" takes by it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from posattn.distributed.cost import LINKS, METHODS, Link, Machine, Work, cost, seen, shortest

GPU = Machine(3e14)
LONG = Work(ranks=16, batch=1, heads=32, kv_heads=8, tokens=2**20, head_dim=128, value_dim=128)
FREE = Link(0.0, float("inf"))


def test_without_links_every_way_takes_the_kernels_time() -> None:
    work, machine = replace(LONG, ranks=8), Machine(3e14, call=0.0)
    times = [cost(method, work, FREE, machine) for method in METHODS]
    flops = 3.5 * 2.0 * 2.0**40 / 2 / 8 * 32 * 256
    for found in times:
        assert found.links == 0.0
        assert found.seconds == pytest.approx(found.kernels)
        assert found.kernels == pytest.approx(flops / 3e14)


def test_a_ring_hides_its_messages_where_shards_are_long_and_cannot_where_they_are_short() -> None:
    long, short = (cost("ring", replace(LONG, tokens=t), LINKS["ethernet"], GPU) for t in (2**22, 2**13))
    assert long.hidden > 0.9
    assert short.hidden < 0.3
    assert long.seconds < 1.02 * long.kernels


def test_memory_grows_with_the_whole_sequence_for_gathering_alone() -> None:
    for method, grows in (("ring", False), ("all_gather", True), ("ulysses", False)):
        few, many = (
            cost(method, replace(LONG, ranks=p, tokens=2**16 * p, kv_heads=32), FREE, GPU).memory for p in (4, 32)
        )
        assert (many > 2.0 * few) == grows


def test_what_is_chosen() -> None:
    link = LINKS["infiniband"]
    assert shortest(LONG, link, GPU) == "ring"  # 16 ranks do not divide 8 heads, and O(T) is too much
    assert shortest(replace(LONG, ranks=8), link, GPU) == "ring"  # it hides its messages
    assert shortest(replace(LONG, ranks=8, tokens=2**13), link, GPU) == "ulysses"
    assert shortest(replace(LONG, ranks=8, tokens=2**13, mixes=True), link, GPU) != "ulysses"
    assert shortest(replace(LONG, ranks=4, kv_heads=1, tokens=2**12), link, GPU) == "all_gather"
    # With a link so slow that bytes are all that counts, the fewest of them.
    slow = Link(0.0, 1e8)
    eight = replace(LONG, ranks=8)
    assert shortest(eight, slow, GPU) == min(("ring", "ulysses"), key=lambda m: cost(m, eight, slow, GPU).seconds)
    assert shortest(eight, slow, GPU) == "ulysses"


def test_what_a_query_sees() -> None:
    assert seen(LONG) == 2**19
    assert seen(replace(LONG, causal=False)) == 2**20
    assert seen(replace(LONG, window=4096)) == 4096
    assert seen(replace(LONG, layout="contiguous")) == pytest.approx(2**20 * (1 - 1 / 32))


def test_a_window_shortens_a_ring_of_contiguous_shards() -> None:
    work = replace(LONG, layout="contiguous", window=4096)
    assert (
        cost("ring", work, LINKS["ethernet"], GPU).links
        < 0.1 * cost("ring", replace(work, layout="zigzag"), LINKS["ethernet"], GPU).links
    )


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="method: expected one of 'ring'"):
        cost("star", LONG, FREE, GPU)
    with pytest.raises(ValueError, match="method: ulysses cannot do this work: 16 ranks do not divide 8 key heads"):
        cost("ulysses", LONG, FREE, GPU)
    with pytest.raises(ValueError, match="a DAPE mixes"):
        cost("ulysses", replace(LONG, mixes=True), FREE, GPU)
