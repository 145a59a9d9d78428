"""The notebook runs from its first cell to the report, and its certificate holds."""

import json
import re
from pathlib import Path

import pytest

from tests.test_qlora import shares

nbformat = pytest.importorskip("nbformat")
NOTEBOOK = Path(__file__).parent.parent / "examples/notebook.ipynb"


def test_ends_in_the_report(tmp_path, monkeypatch):
    client = pytest.importorskip("nbclient")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GRASP_CACHE", str(tmp_path / "cache"))
    notebook = nbformat.read(NOTEBOOK, 4)
    client.NotebookClient(notebook, resources={"metadata": {"path": tmp_path}}).execute()
    said = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", ()))
    certificate = json.loads((tmp_path / "runs/notebook/grasp.json").read_text())
    assert certificate["holds"] and "holds: True" in said
    run = tmp_path / "runs/notebook"
    found = shares(run, run / "checkpoint-40/grasp_guard.safetensors")
    assert len(found) == len(certificate["modules"]) == 56 and max(found) <= 1e-6
    drift = {m[1]: float(m[2]) for m in re.finditer(r"(\w+) +learned .* by (\S+)", said)}
    assert drift["grasp"] < 0.1 < 0.5 < drift["plain"] and drift["random"] > 0.5
    shown = notebook.cells[-1].outputs[-1]["data"]["text/html"]
    page = tmp_path / re.search(r'src="([^"]+)"', shown)[1]
    assert "GRASP" in page.read_text() and page.name == "report.html"


def test_holds_no_output():
    for cell in nbformat.read(NOTEBOOK, 4).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
