"""The examples of docs/encodings.md run, top to bottom, and the page names every encoding."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import posattn.encodings as encodings

PAGE = (Path(__file__).parents[2] / "docs" / "encodings.md").read_text()


def test_the_examples_run():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/encodings.md", "exec"), names)
        if "out" in names:
            out = names.pop("out")
            assert isinstance(out, torch.Tensor)
            assert out.shape == (1, 12, 100, 64)
            assert out.isfinite().all()


def test_the_page_names_every_encoding():
    for name in [*encodings.__all__, "SinusoidalEmbedding", "LearnedEmbedding"]:
        assert re.search(rf"\b{name}\b", PAGE), name
    for scaling in encodings.Scaling.__subclasses__():
        assert f"`{scaling.__name__}(" in PAGE, scaling
