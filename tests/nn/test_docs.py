"""The examples of docs/guide/decode.md and docs/guide/modules.md run, top to bottom, and name what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import posattn

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide"


@pytest.mark.parametrize(("page", "count"), [("decode", 7), ("modules", 7)])
def test_the_examples_run(page: str, count: int) -> None:
    path = GUIDE / f"{page}.md"
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= count
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(path), "exec"), names)
        for result in ("out", "y"):
            found = names.pop(result, None)
            assert found is None or (isinstance(found, torch.Tensor) and found.isfinite().all())


def test_the_pages_name_every_module() -> None:
    text = "".join(path.read_text() for path in (GUIDE / "decode.md", GUIDE / "modules.md"))
    assert [name for name in [*posattn.nn.__all__, "patch_sdpa", "weights"] if f"{name}" not in text] == []
