"""Reports of numbers that are known."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from lmcompress.reporting import card_rows, report_html, report_markdown, results_table, write_report


def _row(name, role, score, size, ms, verdict, metric="accuracy"):
    return {
        "name": name,
        "role": role,
        "folder": f"runs/{name}",
        "metrics": {"validation": {metric: score}},
        "parameters": 1000,
        "size_bytes": size,
        "weights_bytes": size,
        "equivalence": {"max_error": 0.0},
        "format": "native",
        "training": {"steps": 3, "seconds": 1.0, "resumed": False},
        "latency": [{"model": name, "batch_size": 1, "median_ms": ms, "verdict": verdict}],
    }


@pytest.fixture
def report():
    return {
        "recipe": "tiny",
        "description": "d",
        "paper": None,
        "task": "t",
        "kind": "classification",
        "metric": "accuracy",
        "lower_is_better": False,
        "split": "validation",
        "reference": "teacher",
        "created": "now",
        "seed": 0,
        "machine": {"processor": "p", "cores": 2, "threads": 2, "gpu": None},
        "versions": {"torch": "2"},
        "rows": [
            _row("teacher", "teacher", 0.8, 2_000_000, 4.0, "baseline"),
            _row("student", "student", 0.6, 500_000, 2.0, "2.00x faster"),
        ],
        "notes": ["a note"],
    }


def test_a_score_is_a_share_of_the_teachers(report):
    teacher, student = card_rows(report)
    assert (teacher["accuracy"], teacher["of teacher"], teacher["batch 1"]) == ("0.8000", "", "4.00 ms")
    assert (student["of teacher"], student["MB on disk"], student["batch 1"]) == (
        "75.0 %",
        "0.50",
        "2.00 ms, 2.00x faster",
    )


def test_a_perplexity_is_told_by_how_much_it_rises(report):
    report |= {"metric": "token_perplexity", "lower_is_better": True}
    for row, value in zip(report["rows"], (20.0, 25.0), strict=True):
        row["metrics"] = {"validation": {"token_perplexity": value}}
    assert card_rows(report)[1]["of teacher"] == "+25.0 %"


def test_a_reference_of_nothing_has_no_share(report):
    report["rows"][0]["metrics"]["validation"]["accuracy"] = 0.0
    assert card_rows(report)[1]["of teacher"] == "–"


def test_html_escapes_what_comes_from_data(report):
    report |= {"recipe": "<script>alert(1)</script>", "notes": ["<b>"]}
    page = report_html(report, ["plots/a.png"])
    assert "<script>" not in page and "&lt;script&gt;" in page and "<li>&lt;b&gt;</li>" in page


def test_markdown_is_a_table_and_has_the_notes(report):
    text = report_markdown(report)
    assert "| student | student | 0.6000 | 75.0 % | 1,000 | 0.50 | 2.00 ms, 2.00x faster |" in text
    assert "- a note" in text


def test_everything_is_written_and_plots_are_pictures(report, tmp_path):
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == report
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {"quality_size.png", "quality_latency_1.png"}
    assert (tmp_path / "plots" / "quality_size.png").read_bytes().startswith(b"\x89PNG")
    assert "plots/quality_size.png" in (tmp_path / "report.html").read_text()


def test_the_terminal_shows_all_columns_in_eighty(report):
    console = Console(file=io.StringIO(), width=80)
    console.print(results_table(report))
    shown = console.file.getvalue()
    assert all(word in shown for word in ("teacher", "75.0 %", "2.00x"))
