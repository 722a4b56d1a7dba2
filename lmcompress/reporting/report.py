"""A run's report: the same numbers as JSON, Markdown and HTML."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from lmcompress.reporting.models import collect, pick
from lmcompress.reporting.page import run_view
from lmcompress.reporting.sections import tradeoffs
from lmcompress.reporting.svg import standalone
from lmcompress.reporting.tables import card_rows, pruned_blocks
from lmcompress.reporting.wording import tied


def report_markdown(report: Mapping[str, Any], plots: Sequence[str] = ()) -> str:
    """The report in Markdown.

    Args:
        report: report of a run.
        plots: paths of plots, relative to the report.
    """
    return _environment().get_template("report.md.j2").render(r=report, table=_escaped_rows(report), plots=plots)


def report_html(report: Mapping[str, Any], folder: Path | None = None) -> str:
    """The report as one self-contained page of HTML with style, figures and a short script.

    Data are escaped. Everything is shown without the script, which changes the theme, copies text, and opens the folds
    for printing.

    Args:
        report: report of a run; those of earlier versions are shown without the missing fields.
        folder: folder of the run, with its recipe and the logs of its stages.
    """
    return render("run.html.j2", v=run_view(report, folder))


def render(template: str, **values: Any) -> str:
    """A page.

    Args:
        template: name of a file in ``templates``.
        **values: values of the template.
    """
    environment = _environment()
    assert environment.loader is not None
    css = environment.loader.get_source(environment, "page.css")[0]
    return tied(environment.get_template(template).render(css=Markup(css), **values).lstrip())


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write ``results.json``, ``metrics.json``, ``report.md``, ``report.html`` and ``plots/``.

    Args:
        report: report of a run.
        folder: folder of the run.
    """
    plots = write_plots(report, folder)
    metrics = {row["name"]: row["metrics"] for row in report["rows"]}
    for name, text in {
        "results.json": json.dumps(report, indent=2, default=str, ensure_ascii=False) + "\n",
        "metrics.json": json.dumps(metrics, indent=2) + "\n",
        "report.md": report_markdown(report, plots),
        "report.html": report_html(report, folder),
    }.items():
        temporary = folder / f".{name}.tmp"
        temporary.write_text(text, "utf-8")
        os.replace(temporary, folder / name)


def write_plots(report: Mapping[str, Any], folder: Path) -> list[str]:
    """Quality against size and against the latency at each batch size, as SVG in ``plots/``.

    Args:
        report: report of a run.
        folder: folder of the run.

    Returns:
        The files, relative to ``folder``; none for a single model.
    """
    models = collect(report)
    files = []
    for plot in tradeoffs(report, models, pick(report, models)):
        file = folder / "plots" / (plot["title"].lower().replace(",", "").replace(" ", "_") + ".svg")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(standalone(str(plot["svgs"][0])), "utf-8")
        files.append(file.relative_to(folder).as_posix())
    return files


def _escaped_rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{key: cell.replace("|", "\\|") for key, cell in row.items()} for row in card_rows(report)]


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lmcompress.reporting", "templates"),
        undefined=StrictUndefined,
        autoescape=select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["pruned_blocks"] = pruned_blocks
    return environment
