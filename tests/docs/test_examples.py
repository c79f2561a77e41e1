"""Every program of examples/ runs in its smoke form, is short, and says how it is run."""

from __future__ import annotations

import ast
import importlib.util
import runpy
import sys

import pytest

from tests.docs.pages import OPTIONAL, ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_short_and_says_how_it_is_run(path):
    source = path.read_text()
    assert len(source.splitlines()) < 80
    about = ast.get_docstring(ast.parse(source))
    assert about is not None
    assert f"python examples/{path.name}" in about


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_smoke_form_runs(path, tmp_path, monkeypatch, capsys):
    """As a program, but in this process, which has torch already."""
    for module in OPTIONAL:
        if f"from {module}" in path.read_text() and importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--smoke"])
    runpy.run_path(str(path), run_name="__main__")
    said = capsys.readouterr().out
    assert said.strip()
    assert "nan" not in said
