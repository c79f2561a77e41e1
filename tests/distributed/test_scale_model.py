"""The scale model's page: its tables are those that the tool writes, and what they rest on."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("matplotlib")

from posattn.distributed.cost import LINKS
from tools.scale_model import machines, pages


def test_the_page_has_the_tables_of_the_model() -> None:
    text = (pages.DOCS / "scale.md").read_text()
    for table in (pages._times(), pages._balance()):
        assert table in text
    for picture in ("scale-winners.svg", "scale-time.svg"):
        assert (pages.DOCS / picture).stat().st_size > 1000
        assert picture in text
    for net in pages.NETS:  # the links that the page names
        assert f"{LINKS[net].bandwidth / 1e9:.0f} GB/s and {LINKS[net].latency * 1e6:.0f} µs" in text


def test_a_gpu_is_as_fast_as_its_cycles_say() -> None:
    # 132 multiprocessors, 776 cycles for 64 x 64 logits of 4 x 128 operations each, at 0.8 of it.
    assert machines.machine("H100").rate == pytest.approx(132 * 1.755e9 / 776 * 64 * 64 * 4 * 128 * 0.8)
    slow, fast = machines.machine("H100", "table"), machines.machine("H100")
    assert slow.backward_rate is not None
    assert fast.backward_rate is not None
    assert slow.backward_rate / fast.backward_rate == pytest.approx(1680 / 2040)


def test_who_wins() -> None:
    assert pages.winner(replace(pages.WHOLE, ranks=64, tokens=2**20), "infiniband") == "ring"
    assert pages.winner(replace(pages.WHOLE, ranks=8, tokens=2**17), "ethernet") == "ulysses"
    assert pages.winner(replace(pages.WHOLE, ranks=8, tokens=2**26), "nvlink") is None
