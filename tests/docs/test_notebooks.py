"""The notebooks hold what they show: outputs of every cell that has any, and the same kinds when they run again."""

from __future__ import annotations

import json

import pytest

from tests.docs.pages import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def kinds(cells):
    """For each code cell, what its outputs are: text on stdout, pictures."""
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    return [[sorted(output.get("data", {"text/plain": ""})) for output in cell["outputs"]] for cell in code]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_outputs_are_there(path):
    notebook = json.loads(path.read_text())
    cells = notebook["cells"]
    drawn = [cell for cell in cells if cell["cell_type"] == "code" and "plt.show()" in "".join(cell["source"])]
    assert len(drawn) >= 2
    for cell in drawn:
        assert any("image/png" in output.get("data", {}) for output in cell["outputs"])
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not any(output["output_type"] == "error" for output in cell["outputs"])
            assert ("print(" in "".join(cell["source"])) == any("text" in output for output in cell["outputs"])
    assert "/home/" not in path.read_text()
    assert "/tmp/" not in path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_again(path):
    for module in ("nbclient", "ipykernel"):
        pytest.importorskip(module, reason="`make docs` installs it (requirements-docs.txt)")
    from tools.site.notebooks import executed

    assert kinds(executed(path)["cells"]) == kinds(json.loads(path.read_text())["cells"])
