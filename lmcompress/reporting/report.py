"""A run's report: the same numbers as JSON for programs, Markdown for reading, HTML for showing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from lmcompress.reporting.plots import write_plots
from lmcompress.reporting.tables import card_rows, pruned_blocks


def report_markdown(report: Mapping[str, Any], plots: Sequence[str] = ()) -> str:
    """The report in Markdown.

    Args:
        report: of a run.
        plots: paths of pictures, relative to the report.
    """
    return _environment().get_template("report.md.j2").render(r=report, table=_escaped_rows(report), plots=plots)


def report_html(report: Mapping[str, Any], plots: Sequence[str] = ()) -> str:
    """The report as one page of HTML, without scripts; what comes from data is escaped.

    Args:
        report: of a run.
        plots: paths of pictures, relative to the report.
    """
    return _environment().get_template("report.html.j2").render(r=report, table=card_rows(report), plots=plots)


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write ``results.json``, ``metrics.json``, ``report.md``, ``report.html`` and ``plots/``.

    Args:
        report: of a run.
        folder: of the run.
    """
    plots = [file.relative_to(folder).as_posix() for file in write_plots(report, folder / "plots")]
    metrics = {row["name"]: row["metrics"] for row in report["rows"]}
    for name, text in {
        "results.json": json.dumps(report, indent=2, default=str, ensure_ascii=False) + "\n",
        "metrics.json": json.dumps(metrics, indent=2) + "\n",
        "report.md": report_markdown(report, plots),
        "report.html": report_html(report, plots),
    }.items():
        temporary = folder / f".{name}.tmp"
        temporary.write_text(text, "utf-8")
        os.replace(temporary, folder / name)


def _escaped_rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{key: cell.replace("|", "\\|") for key, cell in row.items()} for row in card_rows(report)]


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lmcompress.reporting", "templates"),
        undefined=StrictUndefined,
        autoescape=select_autoescape(["html", "html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["pruned_blocks"] = pruned_blocks
    return environment
