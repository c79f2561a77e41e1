"""mkdocs hooks: pages made of what lies elsewhere, so that the repository and the site have one copy.

docs/notebooks/NAME.ipynb becomes notebooks/NAME.md with the outputs that the notebook holds; CONTRIBUTING.md and
CHANGELOG.md become pages; examples/*.py become one page. Links between them are turned to where the site has them.
"""

from __future__ import annotations

import ast
import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from posixpath import relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that have no Markdown file of their own."""
    for source, target in PAGES.items():
        text = LINK.sub(lambda m: f"]({m[1].removeprefix('docs/')}{m[2] or ''})", (ROOT / source).read_text())
        files.append(File.generated(config, target, content=text))
    for notebook in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        files.remove(files.src_uris[f"notebooks/{notebook.name}"])
        text, pictures = notebook_page(json.loads(notebook.read_text()), notebook.stem)
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=text))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=picture))
    files.append(File.generated(config, "examples.md", content=examples_page()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that leave docs/, or that name a notebook, to the page made of it."""
    here = PurePosixPath(page.file.src_uri).parent

    def turned(match: re.Match[str]) -> str:
        path = relpath(f"docs/{here}/{match[1]}", ".")
        fragment = match[2] or ""
        if path in PAGES:
            target = PAGES[path]
        elif path.endswith(".ipynb"):
            target = path.removeprefix("docs/").removesuffix(".ipynb") + ".md"
        elif path.startswith("examples/") or path == "examples":
            target, fragment = "examples.md", f"#{anchor(path)}" if path.endswith(".py") else ""
        else:
            return match[0]
        return f"]({relpath(target, str(here))}{fragment})"

    return LINK.sub(turned, markdown)


def notebook_page(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
                continue
            data = output["data"]
            if "image/png" in data:
                picture = f"{name}-{len(pictures) + 1}.png"
                pictures[picture] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![{cell['metadata'].get('caption', 'What the cell draws')}]({picture})")
            elif "text/plain" in data:
                parts.append(f"```text\n{''.join(data['text/plain'])}\n```")
    parts.append(f"*The notebook itself: `docs/notebooks/{name}.ipynb`.*")
    return "\n\n".join(parts) + "\n", pictures


def examples_page() -> str:
    """Every example: what it is, how it is run, its source."""
    parts = [
        "# Examples",
        "Whole programs of under 80 lines, in `examples/` of the repository. Each runs on a CPU in minutes, and with "
        "`--smoke` in seconds, which is how the tests run them.",
    ]
    for path in example_files():
        source = path.read_text()
        about = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0]
        parts += [f"## `examples/{path.name}` {{ #{anchor(f'examples/{path.name}')} }}", about]
        parts.append(f"```python\n{source.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def example_files() -> Iterator[Path]:
    yield from sorted((ROOT / "examples").glob("*.py"))


def anchor(path: str) -> str:
    return PurePosixPath(path).stem.replace("_", "-")
