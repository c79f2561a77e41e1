"""Run the notebooks of docs/notebooks and keep what they show: python -m tools.site.notebooks"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "notebooks"


def executed(path: Path, timeout: int = 900) -> nbformat.NotebookNode:
    """The notebook with fresh outputs, run by this interpreter. CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    # The kernel is this interpreter's, whatever kernels the user has installed.
    client = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    return clean(notebook)


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what differs from run to run: times, counts of execution, addresses, warnings on stderr."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        cell.outputs = joined([output for output in cell.outputs if output.get("name") != "stderr"])
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = None
            if "data" in output:
                plain = output.data.get("text/plain")
                output.data["text/plain"] = re.sub(r" at 0x[0-9a-f]+", "", plain) if plain else ""
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def joined(outputs: list[Any]) -> list[Any]:
    """With what was printed in a row as one output: where the kernel cuts it depends on the time."""
    kept: list[Any] = []
    for output in outputs:
        if kept and output["output_type"] == kept[-1]["output_type"] == "stream":
            kept[-1]["text"] = "".join(kept[-1]["text"]) + "".join(output["text"])
        else:
            kept.append(output)
    return kept


def main() -> None:
    for name in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        path = FOLDER / f"{name}.ipynb"
        nbformat.write(executed(path), path)
        print(path)


if __name__ == "__main__":
    main()
