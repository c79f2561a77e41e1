"""The README's examples run, and its table knows every encoding."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

import posattn

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
        assert names["out"].shape == (1, 12, 2048, 64)
        assert torch.isfinite(names["out"]).all()
    names["out"].sum().backward()


def test_every_encoding_is_in_the_table() -> None:
    text = README.read_text()
    assert [name for name in posattn.encodings.__all__ if f"`{name}`" not in text] == []


def test_links_lead_somewhere() -> None:
    prose = re.sub(r"```.*?```", "", README.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", prose)
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []
