"""The examples of every page run and give what the page says; pages name everything that there is."""

from __future__ import annotations

import re

import pytest

from posattn import encodings
from tests.docs.pages import PAGES, ROOT, blocks, missing_module, promised, run

WITH_EXAMPLES = [page for page in PAGES if blocks(page) and page.parent.name not in ("design", "lab")]


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page)
    missing = [name for name in map(missing_module, blocks(page)) if name]
    if missing:
        pytest.skip(f"all ran but {len(missing)} that need {missing[0]}, which is not installed")


def test_most_pages_have_examples():
    guides = sorted((ROOT / "docs" / "guide").glob("*.md"))
    assert [page.name for page in guides if page not in WITH_EXAMPLES] == ["index.md", "transformers-families.md"]


def test_what_a_page_promises_is_checked(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Text.\n\n```python\nimport torch\n\nx = torch.ones(2, 3)  # [2, 3]\n```\n")
    assert run(page)["x"].shape == (2, 3)
    assert promised(blocks(page)[0]) == [("x", [2, 3], 6)]
    page.write_text(page.read_text().replace("[2, 3]", "[3, 2]"))
    with pytest.raises(AssertionError, match=r"page.md:6: x is \[2, 3\]"):
        run(page)
    page.write_text(page.read_text() + "\n```python\nout = x / 0 * 0\n```\n")
    page.write_text(page.read_text().replace("[3, 2]", "[2, 3]"))
    with pytest.raises(AssertionError, match="not finite"):
        run(page)


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    notebooks = {f"notebooks/{path.stem}.md" for path in (ROOT / "docs" / "notebooks").glob("*.ipynb")}
    made = {"contributing.md", "changelog.md", "examples.md"}  # tools/site/hooks.py
    assert pages == listed - notebooks - made
    assert notebooks | made <= listed


def test_the_page_of_encodings_names_every_one():
    text = (ROOT / "docs" / "encodings.md").read_text()
    for name in [*encodings.__all__, "SinusoidalEmbedding", "LearnedEmbedding"]:
        assert re.search(rf"\b{name}\b", text), name
    for scaling in encodings.Scaling.__subclasses__():
        assert f"`{scaling.__name__}(" in text, scaling
