"""The notebooks run from top to bottom, and are committed without outputs."""

from pathlib import Path

import pytest

import lmcompress

nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = sorted((Path(lmcompress.__file__).parent.parent / "notebooks").glob("*.ipynb"))


def _read(path):
    return nbformat.read(path, as_version=4)


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_without_outputs(path):
    for cell in _read(path).cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None), f"clear the outputs of {path.name}"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    # a backend chosen outside would keep the notebook from showing its plots
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = _read(path)
    # a fresh folder: a notebook may write files, and must not need any
    NotebookClient(
        notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    plots = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert plots
