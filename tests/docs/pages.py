"""The pages' examples: every ```python block of a page runs, in order and in one namespace, as a reader runs them."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
SHAPE = re.compile(r"#\s*\[([\d, ]+)\]")
# What a page may need that `make test` does not install; any other missing module is a mistake of the page.
OPTIONAL = ("transformers",)


def blocks(page: Path) -> list[str]:
    """The page's examples, each with as many empty lines ahead as put its code on the page's own lines."""
    text = page.read_text()
    return ["\n" * text[: match.start(1)].count("\n") + match[1] for match in BLOCK.finditer(text)]


def missing_module(source: str) -> str | None:
    """The module of OPTIONAL that an example imports and that is not installed, or None."""
    for name in OPTIONAL:
        imports = re.search(rf"^(?:import|from) [\w.]*\b{name}\b", source, re.MULTILINE)
        if imports and importlib.util.find_spec(name) is None:
            return name
    return None


def run(page: Path) -> dict[str, Any]:
    """Run a page; its names at the end. AssertionError where a tensor is not what the page says or has a NaN.

    Examples that need a module of OPTIONAL are left out where it is missing (`missing_module` tells).
    A comment of numbers in brackets behind an assignment is the tensor's shape: `out = ...  # [1, 12, 100, 64]`.
    """
    torch.manual_seed(0)
    module = ModuleType(f"page_{page.stem}")  # a real one: torch.compile and pickle look it up by its name
    names: dict[str, Any] = vars(module)
    sys.modules[module.__name__] = module
    for source in blocks(page):
        if missing_module(source):
            continue
        exec(compile(source, str(page), "exec"), names)
        for name, shape, line in promised(source):
            assert list(names[name].shape) == shape, f"{page.name}:{line}: {name} is {list(names[name].shape)}"
        out = names.get("out")
        assert not isinstance(out, torch.Tensor) or out.isfinite().all(), f"{page.name}: out is not finite"
    return names


def promised(source: str) -> list[tuple[str, list[int], int]]:
    """Name, shape and line of each assignment whose last line says a shape."""
    lines = source.splitlines()
    found = []
    for statement in ast.parse(source).body:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
            continue
        line = statement.end_lineno or statement.lineno
        match = SHAPE.search(lines[line - 1])
        if match:
            found.append((statement.targets[0].id, [int(size) for size in match[1].split(",")], line))
    return found
