"""Reports of a run: tables for the terminal and for cards, plots, and JSON, Markdown and HTML."""

from lmcompress.reporting.plots import frontier, importance_map, kept_map, sensitivity_curves, write_plots
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
    "frontier",
    "importance_map",
    "kept_map",
    "latency_table",
    "plan_table",
    "print_plan",
    "report_html",
    "report_markdown",
    "results_table",
    "sensitivity_curves",
    "sensitivity_table",
    "shape_table",
    "write_plots",
    "write_report",
]
