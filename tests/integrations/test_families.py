"""Every family of the installed transformers is right with posattn, as docs/guide/transformers-families.md has it."""

from __future__ import annotations

import re

import pytest
import transformers
from transformers import CONFIG_MAPPING

from tools.transformers_families.__main__ import PAGE, page
from tools.transformers_families.run import families, findings
from tools.transformers_families.sweep import TOLERANCE, Finding, look_at

HANDFUL = ["llama", "bert", "gemma3_text", "doge", "big_bird", "bloom", "clip", "whisper", "falcon", "mamba"]


def listed() -> dict[str, str]:
    """What the page says of each family."""
    found = {}
    for part in PAGE.read_text().split("\n## ")[1:]:
        heading = part.partition(":")[0]
        for family in re.findall(r"`([^`]+)`", part.strip().splitlines()[-1]):
            found[family] = heading[0].lower() + heading[1:]
    return found


def test_the_page_names_each_family_of_this_version():
    assert set(listed()) == set(families())
    assert f"transformers {transformers.__version__}" in PAGE.read_text()


@pytest.mark.parametrize("family", HANDFUL)
def test_a_handful_is_as_the_page_says(family):
    finding = look_at(family, CONFIG_MAPPING[family])
    assert finding.way == listed()[family], finding
    assert finding.error is None or finding.error < TOLERANCE


@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=pytest.mark.sweep if part else pytest.mark.slow) for part in range(4)]
)
def test_every_family_is_as_the_page_says(part):
    found = findings(families()[part::4], jobs=1)
    wrong = [f for f in found if f.way == "fails" or (f.error is not None and not f.error < TOLERANCE)]
    assert wrong == []
    # What a tiny config can be made of depends on optional packages and on time, so the unmade may be fewer or more.
    said = listed()
    moved = [f for f in found if f.way != said[f.family] and "not made" not in (f.way, said[f.family])]
    assert moved == []
    assert sum(f.way != "not made" for f in found) >= 90


def test_the_page_is_written_from_findings():
    text = page([Finding("a", "fused", 1e-7), Finding("b", "fused", 2e-7), Finding("c", "not made", None, "x")])
    assert "## Fused: 2\n" in text
    assert "`a`, `b`" in text
    assert "2e-07" in text
    assert "## Not made: 1\n" in text
