"""Reports of a run: tables for the terminal and for cards, and JSON, Markdown and HTML; several runs on one page."""

from lmcompress.reporting.compare import compare_runs
from lmcompress.reporting.plots import importance_map, sensitivity_curves
from lmcompress.reporting.report import report_html, report_markdown, write_report
from lmcompress.reporting.tables import (
    card_rows,
    latency_table,
    plan_table,
    print_plan,
    results_table,
    sensitivity_table,
    shape_table,
)

__all__ = [
    "card_rows",
    "compare_runs",
    "importance_map",
    "latency_table",
    "plan_table",
    "print_plan",
    "report_html",
    "report_markdown",
    "results_table",
    "sensitivity_curves",
    "sensitivity_table",
    "shape_table",
    "write_report",
]
