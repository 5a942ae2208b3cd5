"""The notebook runs from its first cell to its last, and is kept without what it printed."""

import json

import pytest

from tests.tiny import REPOSITORY

NOTEBOOK = REPOSITORY / "experiments" / "first_steps.ipynb"


def test_it_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert 8 <= len(code) <= 12
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


def test_it_runs(tmp_path, monkeypatch):
    client = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("CNN_JAX_CACHE_DIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        cell.source = cell.source.replace("epochs=4", "epochs=1")
    where = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(notebook, timeout=300, resources=where).execute()
    shown = [
        output.data
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type != "stream"
    ]
    assert sum("image/png" in data for data in shown) == 5
    (run,) = [data for data in shown if "<table>" in data.get("text/html", "")]
    assert "<caption>first_steps in runs/first_steps</caption>" in run["text/html"]
    assert any("conv 3x3, stride 2, padding 1" in data["text/plain"] for data in shown)
    assert (tmp_path / "runs" / "first_steps" / "metrics.jsonl").is_file()
