"""What the pages name exists: relative links and their headings, and files of this tree named in the text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("bench", "csrc", "docs", "kernels", "posattn", "tests", "tools")

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
# A path that begins with a folder of the tree, as text or comments name it.
FILE = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*\.(?:py|h|cpp|cu|json|md|c|png)\b")


def heading_anchors(page: Path) -> set[str]:
    """The fragments that a page's headings answer to, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page: Path) -> list[str]:
    """The links of a page that lead nowhere, and the files it names that do not exist."""
    text = FENCE.sub("", page.read_text())
    found = []
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        if not to.exists() or (fragment and fragment not in heading_anchors(to)):
            found.append(target)
    return found + [name for name in FILE.findall(text) if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_exist(page):
    assert broken(page) == []


def test_what_leads_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\n[here](#a-page) [there](page.md#b) [gone](gone.md) `csrc/cpu/gone.h` `csrc/cpu/simd.h`\n"
    )
    assert broken(page) == ["page.md#b", "gone.md", "csrc/cpu/gone.h"]


def test_every_page_is_reached_from_the_readme():
    seen, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page in seen:
            continue
        seen.add(page)
        targets = LINK.findall(FENCE.sub("", page.read_text()))
        ahead += [to for x in targets if x.endswith(".md") and (to := (page.parent / x).resolve()).exists()]
    assert [str(page.relative_to(ROOT)) for page in PAGES if page not in seen] == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_pages_that_sources_name_exist(folder):
    named = {}
    for source in (ROOT / folder).rglob("*"):
        if source.suffix in (".py", ".h", ".cpp", ".cu", ".json"):
            for name in re.findall(r"(?<![\w./-])docs/[\w/-]+\.md", source.read_text()):
                named[name] = source
    assert [f"{source}: {name}" for name, source in named.items() if not (ROOT / name).exists()] == []
