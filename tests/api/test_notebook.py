"""The notebook of examples/, executed on a small run."""

from __future__ import annotations

import sys

import nbclient
import nbformat
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpec

from tests.support.forks import ROOT
from tests.support.timeouts import PROCESS_TIMEOUT

NOTEBOOK = ROOT / "examples/notebook/run.ipynb"


class ThisInterpreter(KernelManager):
    """Starts kernels of the interpreter of the tests, whatever kernels are installed."""

    @property
    def kernel_spec(self):
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="test", language="python")


def test_the_notebook_runs_and_stores_no_output(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_FOLDER", str(tiny_run))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    client = nbclient.NotebookClient(
        notebook,
        timeout=PROCESS_TIMEOUT,
        km=ThisInterpreter(),
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    printed = "".join(
        output.get("text", "") + output.get("data", {}).get("text/plain", "")
        for cell in cells
        for output in cell.outputs
    )
    assert "general 24 samples ['ja', 'en']" in printed
    assert "layers=2, hidden_size=32, dtype=fp32" in printed
    assert "256 GPUs: fits," in printed
    assert [path.name for path in tmp_path.iterdir() if path.name == "notebook_output"] == []
