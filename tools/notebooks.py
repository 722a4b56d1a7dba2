"""Run notebooks and keep their outputs, as they are committed.

    python tools/notebooks.py                              # all of them
    python tools/notebooks.py notebooks/which_heads.ipynb

Each runs in an empty folder of its own. What is kept has no times, no paths and no counts but those of the cells.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"

UNSTABLE = "unstable"
"""A cell with this tag has outputs whose text may differ from machine to machine; their kinds are compared only."""

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_NUMBER = re.compile(r"[-+]?\d[\d,.]*(?:e[-+]?\d+)?")
_RULES = re.compile(r"[━─═]+|-{4,}")


def executed(notebook: NotebookNode, timeout: int = 500) -> NotebookNode:
    """A notebook with the outputs that it gives here.

    Args:
        notebook: is not changed.
        timeout: seconds for each cell.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    # a backend chosen outside would keep the notebook from showing its plots; tables are drawn for one width
    os.environ.pop("MPLBACKEND", None)
    os.environ["COLUMNS"] = "120"
    notebook = nbformat.from_dict(notebook)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        client = NotebookClient(
            notebook, timeout=timeout, kernel_name="python3", resources=resources, coalesce_streams=True
        )
        client.execute()
    return cleaned(notebook)


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """A notebook, changed in place, without what one machine or one minute added to it: logs, times, colours."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "text" in output:
                    output.text = _COLOURS.sub("", output.text).replace("\r\n", "\n")
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def stable(cell: NotebookNode) -> list[Any]:
    """What can be compared of a cell's outputs: their kinds and, but for unstable cells, their text without numbers."""
    found: list[Any] = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        text = output.get("text", data.get("text/plain", ""))
        kinds = (output["output_type"], *sorted(data))
        if UNSTABLE in cell.metadata.get("tags", []) or "image/png" in data:
            found.append(kinds)
        else:
            found.append((*kinds, masked(text)))
    return found


def masked(text: str) -> str:
    """Text without its numbers, the lengths of its lines and its white space."""
    return " ".join(_RULES.sub("-", _NUMBER.sub("#", text)).split())


def main(paths: list[str]) -> None:
    """Run the notebooks and write them back.

    Args:
        paths: of notebooks; none for all.
    """
    for path in map(Path, paths or sorted(map(str, NOTEBOOKS.glob("*.ipynb")))):
        start = time.monotonic()
        nbformat.write(executed(nbformat.read(path, as_version=4)), path)
        print(f"{path.name}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
