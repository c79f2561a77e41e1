"""docs/guide/decode.md and docs/guide/modules.md name what there is (tests/docs runs their examples)."""

from __future__ import annotations

from pathlib import Path

import posattn

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide"


def test_the_pages_name_every_module() -> None:
    text = "".join(path.read_text() for path in (GUIDE / "decode.md", GUIDE / "modules.md"))
    assert [name for name in [*posattn.nn.__all__, "patch_sdpa", "weights"] if f"{name}" not in text] == []
