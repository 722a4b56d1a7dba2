"""The notebooks run from top to bottom, and are committed with the outputs that they give."""

import importlib.util
import re

import pytest
from doc_pages import ROOT

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "tools" / "notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _read(path):
    return nbformat.read(path, as_version=4)


def _code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_with_the_outputs_of_one_run(path):
    cells = _code(_read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), f"run: tools/notebooks.py {path}"
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_names_no_machine_and_no_user(path):
    text = re.sub(r'"image/png": "[^"]*"', "", path.read_text("utf-8"))
    assert re.findall(r"(?:/home|/root|/tmp|/Users|/work|site-packages)\b[^\s\"]*|C:\\\\Users", text) == []
    assert "Traceback" not in text and '"name": "stderr"' not in text


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_gives_the_outputs_that_are_committed(path, tool):
    committed = _read(path)
    again = tool.executed(committed)
    for number, (old, new) in enumerate(zip(_code(committed), _code(again), strict=True), 1):
        assert tool.stable(new) == tool.stable(old), f"{path.name}, cell {number}"


def test_numbers_and_widths_are_masked_and_words_are_not(tool):
    assert tool.masked("a 1,234.5 b\n━━━━  1e-3 %") == tool.masked("a 2 b ━━ -7 %") == "a # b - # %"
    assert tool.masked("better") != tool.masked("worse")


def test_unstable_cells_are_compared_by_kind_only(tool):
    def cell(text, *tags):
        output = nbformat.v4.new_output("stream", text=text)
        return nbformat.v4.new_code_cell("x", outputs=[output], metadata={"tags": list(tags)})

    assert tool.stable(cell("a", tool.UNSTABLE)) == tool.stable(cell("b", tool.UNSTABLE))
    assert tool.stable(cell("a")) != tool.stable(cell("b"))
    assert tool.stable(cell("a")) != tool.stable(nbformat.v4.new_code_cell("x"))
