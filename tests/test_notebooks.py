"""Every notebook runs from top to bottom; its own assertions hold."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

# Its programs run for longer than they compile, so the flags that tests use for cheap compilation would cost more.
LONG_RUNNING = ("05_language_models",)
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    environment = {**os.environ, **({"XLA_FLAGS": ""} if path.stem in LONG_RUNNING else {})}
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}})
    client.execute(env=environment)
    errors = [o for cell in notebook.cells for o in cell.get("outputs", []) if o["output_type"] == "error"]
    drawn = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert not errors
    assert drawn, "a notebook shows at least one picture"
