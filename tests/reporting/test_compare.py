"""Several runs on one page, and runs that cannot be compared."""

from __future__ import annotations

import json

import numpy as np
import pytest
from reports import full_report, plain_report

from lmcompress.errors import LmcompressError
from lmcompress.reporting import compare_runs, write_report
from lmcompress.reporting.evidence import encode


@pytest.fixture
def runs(tmp_path):
    """Two runs of one teacher, the second with a student of its own."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    write_report(full_report(), folders[0])
    other = full_report()
    other["rows"] = other["rows"][:2]
    other["rows"][1]["size_bytes"] = 250_000
    write_report(other, folders[1])
    return folders


def _change(folder, **changes):
    file = folder / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_models_of_all_runs_are_in_one_table(runs, tmp_path):
    page = compare_runs(runs, tmp_path / "pages" / "compare.html")
    assert page == tmp_path / "pages" / "compare.html"
    text = page.read_text()
    # the teacher is the same in both, the students are not
    assert text.count('<span class="name">teacher</span>') == 1 and "<small>first, second</small>" in text
    assert '<span class="name">student</span>' in text and '<span class="name">second/student</span>' in text
    assert "<em>second/student</em> is the smallest within a point of the teacher" in text.replace("\u00a0", " ")
    assert "Latency was not measured together." in text and "Models are no longer where their run left them" in text
    assert "lmcompress compare" in text


def test_runs_can_be_named(runs, tmp_path):
    text = compare_runs(runs, tmp_path / "c.html", ["uniform", "learned <b>"], time_again=False).read_text()
    assert "uniform, learned &lt;b&gt;" in text and "It was not requested" in text


def test_without_evidence_runs_are_compared_without_intervals(runs, tmp_path):
    for folder in runs:
        write_report(plain_report(), folder)
    text = compare_runs(runs, tmp_path / "c.html").read_text()
    assert "No intervals." in text and text.count('<span class="name">student</span>') == 1


@pytest.mark.parametrize("key", ["task", "kind", "split", "metric"])
def test_runs_of_another_task_split_or_metric_are_refused(runs, tmp_path, key):
    report = json.loads((runs[1] / "results.json").read_text())
    changed = {"task": "u", "kind": "regression", "split": "test", "metric": "f1"}[key]
    for row in report["rows"]:
        row["metrics"] = {"validation": {"accuracy": 0.5, "f1": 0.5}, "test": {"accuracy": 0.5, "f1": 0.5}}
    _change(runs[1], rows=report["rows"], **{key: changed})
    message = f"runs must have one {key} to be compared: first has {report[key]!r}, second has {changed!r}"
    with pytest.raises(LmcompressError, match=message):
        compare_runs(runs, tmp_path / "c.html")


def test_runs_on_other_rows_are_refused(runs, tmp_path):
    _change(runs[1], evidence={"validation": {"labels": encode(np.zeros(400, dtype=int))}})
    with pytest.raises(LmcompressError, match=r"same rows of validation .* first \(400\) and second \(400\) differ"):
        compare_runs(runs, tmp_path / "c.html")


def test_what_is_no_run_is_refused(runs, tmp_path):
    output = tmp_path / "c.html"
    with pytest.raises(LmcompressError, match="nowhere is no run: it has no results.json"):
        compare_runs([runs[0], tmp_path / "nowhere"], output)
    (runs[1] / "results.json").unlink()
    (runs[1] / "recipe.yaml").write_text("name: x\n")
    with pytest.raises(LmcompressError, match="second is an unfinished run: .* lmcompress run .* goes on with it"):
        compare_runs(runs, output)
    for text in ("{", "[]", '{"rows": []}'):
        (runs[1] / "results.json").write_text(text)
        with pytest.raises(LmcompressError, match="results.json is not what a run has written"):
            compare_runs(runs, output)
    with pytest.raises(LmcompressError, match="at least two runs to compare, got 1"):
        compare_runs(runs[:1], output)
    with pytest.raises(LmcompressError, match="must be different folders"):
        compare_runs([runs[0], runs[0]], output)
    with pytest.raises(LmcompressError, match="a name for each run, got 1 names and 2 runs"):
        compare_runs(runs, output, ["one"])
    assert not output.exists()
