"""Reports of numbers that are known."""

from __future__ import annotations

import io
import json
from xml.etree import ElementTree

import pytest
from reports import plain_report
from reports import pruning as pruned
from rich.console import Console

from lmcompress.errors import LmcompressError
from lmcompress.reporting import (
    card_rows,
    importance_map,
    report_markdown,
    results_table,
    sensitivity_curves,
    sensitivity_table,
    shape_table,
    write_report,
)


@pytest.fixture
def report():
    return plain_report()


def test_a_score_is_a_share_of_the_teachers(report):
    teacher, student = card_rows(report)
    assert (teacher["accuracy"], teacher["of teacher"], teacher["batch 1"]) == ("0.8000", "", "4.00 ms")
    assert (student["of teacher"], student["MB on disk"], student["batch 1"]) == (
        "75.0 %",
        "0.50",
        "2.00 ms, 2.00x faster",
    )


@pytest.mark.parametrize(
    ("metric", "teacher", "student", "kept"),
    [
        ("token_perplexity", 20.0, 25.0, "80.0 %"),
        ("token_perplexity", 25.0, 20.0, "125.0 %"),
        ("token_perplexity", 20.0, 20.0, "100.0 %"),
        ("token_perplexity", 20.0, float("inf"), "0.0 %"),
        ("mse", 0.5, 0.0, "–"),
        ("mse", 0.0, 0.5, "–"),
        ("accuracy", 0.8, 0.9, "112.5 %"),
        ("accuracy", 0.8, 0.0, "0.0 %"),
    ],
)
def test_more_than_the_teachers_quality_is_more_than_100_per_cent_for_every_metric(
    report, metric, teacher, student, kept
):
    report |= {"metric": metric, "lower_is_better": metric != "accuracy"}
    for row, value in zip(report["rows"], (teacher, student), strict=True):
        row["metrics"] = {"validation": {metric: value}}
    assert card_rows(report)[1]["of teacher"] == kept


def test_a_reference_of_nothing_has_no_share(report):
    report["rows"][0]["metrics"]["validation"]["accuracy"] = 0.0
    assert card_rows(report)[1]["of teacher"] == "–"


def test_markdown_is_a_table_and_has_the_notes(report):
    text = report_markdown(report)
    assert "| student | student | 0.6000 | 75.0 % | 1,000 | 0.50 | 2.00 ms, 2.00x faster |" in text
    assert "- a note" in text


def test_everything_is_written_and_plots_are_pictures(report, tmp_path):
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == report
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {"quality_and_size.svg", "quality_and_latency_1_row.svg"}
    picture = ElementTree.parse(tmp_path / "plots" / "quality_and_size.svg").getroot()
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    assert "![plots/quality_and_size.svg](plots/quality_and_size.svg)" in (tmp_path / "report.md").read_text()


def test_the_terminal_shows_all_columns_in_eighty(report):
    console = Console(file=io.StringIO(), width=80)
    console.print(results_table(report))
    shown = console.file.getvalue()
    assert all(word in shown for word in ("teacher", "75.0 %", "2.00x"))


@pytest.fixture
def pruning():
    return pruned()


def test_a_report_says_which_heads_stay(report, pruning):
    report["rows"][1] |= {"pruning": pruning, "blocks": pruning["after"]["blocks"]}
    report["rows"][1]["vocabulary"] = {
        "rows_before": 4000,
        "rows_after": 3000,
        "bytes_saved": 512_000,
        "texts": 20,
        "texts_changed": 0,
    }
    text = report_markdown(report)
    assert "| student | 0 | 2 | 4 | 0, 3 | 40 | 64 |" in text
    assert "| student | 1 | 0 | 4 | – | 8 | 64 |" in text and "| student | 2 | 0 | 4 | – | 0 | 64 |" in text
    assert "60.0 % of parameters pruned (59.0 % requested)" in text and "3000 tokens, 4000 before" in text


def test_blocks_of_models_stand_beside_one_another_by_their_first_number(pruning):
    rows = [{"name": "dense", **pruning["before"]}, {"name": "pruned", **pruning["after"]}]
    console = Console(file=io.StringIO(), width=80)
    console.print(shape_table(rows))
    lines = console.file.getvalue().splitlines()
    assert any("4 + 64" in line and "0 + 8" in line for line in lines)
    assert any("4 + 64" in line and "–" in line for line in lines)


def _measured(part, block, share, quality):
    return {"part": part, "block": block, "share": share, "removed": 1, "units": 4, "quality": quality}


def test_a_sensitivity_table_has_a_row_for_each_block_and_part():
    rows = [_measured("none", -1, 0.0, 0.9)]
    rows += [_measured(part, b, s, 0.9 - s / 3) for part in ("heads", "neurons") for b in range(2) for s in (0.5, 1.0)]
    found = {"rows": rows, "metric": "accuracy", "lower_is_better": False, "model": "m", "task": "t", "split": "v"}
    console = Console(file=io.StringIO(), width=100)
    console.print(sensitivity_table(found | {"criterion": "l1"}))
    shown = console.file.getvalue()
    assert "50% pruned" in shown and shown.count("0.7333") == 4 and "the whole model: 0.9000" in shown


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_curves_and_maps_are_pictures(tmp_path, lower_is_better):
    rows = [_measured("none", -1, 0.0, 20.0), _measured("heads", 0, 0.5, 900.0), _measured("heads", 1, 0.5, 21.0)]
    files = [
        sensitivity_curves(rows, tmp_path / "a" / "s.png", lower_is_better=lower_is_better),
        importance_map([[0.1, 0.2], [], [0.3]], tmp_path / "i.png"),
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(LmcompressError, match="at least one head, got none"):
        importance_map([[], []], tmp_path / "i.png")
    with pytest.raises(LmcompressError, match="measurements of heads or neurons, got none"):
        sensitivity_curves([_measured("none", -1, 0.0, 1.0)], tmp_path / "s.png")
