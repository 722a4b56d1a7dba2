"""Reports of a run: tables for the terminal and for cards, plots, and JSON, Markdown and HTML."""

from lmcompress.reporting.plots import write_plots
from lmcompress.reporting.report import report_html, report_markdown, write_report
from lmcompress.reporting.tables import card_rows, latency_table, plan_table, print_plan, results_table

__all__ = [
    "card_rows",
    "latency_table",
    "plan_table",
    "print_plan",
    "report_html",
    "report_markdown",
    "results_table",
    "write_plots",
    "write_report",
]
