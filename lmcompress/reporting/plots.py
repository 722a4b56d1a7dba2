"""What is bought for what: quality against size and against latency, as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lmcompress.reporting.tables import metric_title, quality_of

_COLOURS = {"teacher": "tab:grey", "student": "tab:blue", "control": "tab:orange", "model": "tab:green"}


def write_plots(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """One plot for size, and one for each batch size that latency was measured at.

    Args:
        report: of a run.
        folder: made if it is not there.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = report["rows"]
    files = []
    if all(row["size_bytes"] is not None for row in rows):
        sizes = {row["name"]: row["size_bytes"] / 1e6 for row in rows}
        files.append(_plot(report, sizes, "MB on disk", folder / "quality_size.png"))
    for batch in sorted({entry["batch_size"] for row in rows for entry in row["latency"]}):
        times = {e["model"]: e["median_ms"] for row in rows for e in row["latency"] if e["batch_size"] == batch}
        files.append(_plot(report, times, f"ms at batch {batch}", folder / f"quality_latency_{batch}.png"))
    return files


def _plot(report: Mapping[str, Any], x: Mapping[str, float], label: str, file: Path) -> Path:
    # no pyplot: it has global state, and looks for a screen
    figure = Figure(figsize=(5, 3.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row in report["rows"]:
        y = quality_of(report, row)
        axes.scatter([x[row["name"]]], [y], color=_COLOURS.get(row["role"], "tab:green"), zorder=2)
        axes.annotate(row["name"], (x[row["name"]], y), xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set_xlim(left=0, right=1.3 * max(x.values()))
    axes.margins(y=0.2)
    axes.set_xlabel(label)
    axes.set_ylabel(metric_title(report) + (" (lower is better)" if report["lower_is_better"] else ""))
    axes.grid(alpha=0.3)
    figure.savefig(file)
    return file
