"""Plots of a run, and of what pruning looks at: quality against size and time, heads and widths, sensitivity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from lmcompress.errors import LmcompressError
from lmcompress.reporting.tables import metric_title, pruned_blocks, quality_of

_COLOURS = {
    "teacher": "tab:grey",
    "student": "tab:blue",
    "control": "tab:orange",
    "pruned": "tab:red",
    "quantized": "tab:purple",
    "shared": "tab:brown",
    "compact": "tab:cyan",
    "model": "tab:green",
}
_GONE = "0.85"


def write_plots(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Quality against size and against the latency at each batch size; and what is left of each model that was pruned.

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
    for row in rows:
        if row.get("pruning"):
            files.append(kept_map(row["pruning"], folder / f"kept_{row['name']}.png", title=row["name"]))
    if sum(bool(row.get("pruning")) for row in rows) > 1:
        files.append(frontier(report, folder / "frontier.png"))
    return files


def kept_map(pruning: Mapping[str, Any], file: Path, *, title: str = "") -> Path:
    """What pruning has left of each block: which heads, and how much of the feed-forward network.

    Args:
        pruning: :meth:`~lmcompress.pruning.structured.report.PruningReport.to_dict`: ``before``, ``after`` and
            ``kept_heads``.
        file: a PNG.
        title: above it.

    Returns:
        The file.
    """
    before, blocks = pruning["before"]["blocks"], pruned_blocks(pruning)
    heads = max((block["heads"] for block in before), default=0)
    kept = np.zeros((len(before), max(1, heads)))
    for index, names in enumerate(pruning["kept_heads"]):
        # heads that were not there before stay blank
        kept[index, before[index]["heads"] :] = np.nan
        kept[index, names] = 1
    figure = _figure(2 + 0.32 * max(1, heads) + 3, 1.3 + 0.32 * len(before))
    ratio = [max(2.0, 0.32 * heads), 3.0]
    left_axes, right_axes = figure.subplots(1, 2, sharey=True, width_ratios=ratio)
    left_axes.pcolormesh(np.arange(kept.shape[1] + 1), _edges(len(before)), kept, cmap=_two(), vmin=0, vmax=1, **_GRID)
    left_axes.set_yticks(range(len(before)), [f"block {block['number']}" for block in blocks])
    left_axes.set(xlabel="head", title="heads that stay")
    _head_ticks(left_axes, heads)
    rows = np.arange(len(blocks))
    shares = [block["ffn"] / max(1, block["ffn_before"]) for block in blocks]
    right_axes.barh(rows, [1.0] * len(rows), color=_GONE, height=0.7)
    right_axes.barh(rows, shares, color="tab:blue", height=0.7, alpha=0.5)
    for row, block in zip(rows, blocks, strict=True):
        right_axes.text(0.02, row, f"{block['ffn']:,} of {block['ffn_before']:,}", va="center", fontsize=7)
    right_axes.set(xlabel="share of the neurons", title="FFN width", xlim=(0, 1), ylim=(len(before) - 0.5, -0.5))
    if title:
        figure.suptitle(f"{title}: {pruning['removed']:.0%} of {pruning['unit']} gone", fontsize=10)
    return _save(figure, file)


def importance_map(scores: Sequence[Sequence[float]], file: Path, *, title: str = "importance of heads") -> Path:
    """Scores of heads as a map of blocks and heads; darker is more important.

    Args:
        scores: of each block, of each of its heads; blocks may have different numbers, or none.
        file: a PNG.
        title: above it.

    Returns:
        The file.

    Raises:
        LmcompressError: no heads at all.
    """
    heads = max((len(block) for block in scores), default=0)
    if not heads:
        raise LmcompressError("scores must be of at least one head, got none; the model has no attention left")
    values = np.full((len(scores), heads), np.nan)
    for index, block in enumerate(scores):
        values[index, : len(block)] = block
    figure = _figure(2.4 + 0.42 * heads, 1.5 + 0.36 * len(scores))
    axes = figure.subplots()
    drawn = axes.pcolormesh(np.arange(heads + 1), _edges(len(scores)), values, cmap="Blues", vmin=0, **_GRID)
    axes.set(xlabel="head", title=title, ylim=(len(scores) - 0.5, -0.5))
    axes.set_yticks(range(len(scores)), [f"block {index}" for index in range(len(scores))])
    _head_ticks(axes, heads)
    figure.colorbar(drawn, ax=axes, label="score", fraction=0.08)
    return _save(figure, file)


def sensitivity_curves(
    rows: Sequence[Mapping[str, Any]], file: Path, *, quality: str = "quality", lower_is_better: bool = False
) -> Path:
    """Quality against the share removed, one curve for each block, heads and neurons apart.

    Args:
        rows: :meth:`~lmcompress.pruning.structured.sensitivity.SensitivityRow.as_dict` of each measurement.
        file: a PNG.
        quality: what the numbers are called.
        lower_is_better: of that number.

    Returns:
        The file.

    Raises:
        LmcompressError: there is no measurement of a block.
    """
    parts = [part for part in ("heads", "neurons") if any(row["part"] == part for row in rows)]
    if not parts:
        raise LmcompressError("rows must have measurements of heads or neurons, got none")
    whole = [row["quality"] for row in rows if row["part"] == "none"]
    blocks = sorted({row["block"] for row in rows if row["part"] != "none"})
    figure = _figure(4.2 * len(parts) + 0.9, 3.6)
    shades = _shades(len(blocks))
    for axes, part in zip(np.atleast_1d(figure.subplots(1, len(parts), sharey=True)), parts, strict=True):
        for index, block in enumerate(blocks):
            own = sorted((r["share"], r["quality"]) for r in rows if r["part"] == part and r["block"] == block)
            points = [*((0.0, value) for value in whole[:1]), *own]
            # a colour for the depth, and the number at the end of the curve
            axes.plot(*zip(*points, strict=True), marker=".", color=shades[index], label=f"block {block}")
        if whole:
            axes.axhline(whole[0], color="0.5", linewidth=0.8, linestyle=":")
        axes.set(title=part, xlabel="share of the block that is gone", xlim=(0, 1.02))
        axes.grid(alpha=0.3)
    axes = figure.axes[0]
    axes.set_ylabel(quality + (" (lower is better)" if lower_is_better else ""))
    if lower_is_better and whole and max(row["quality"] for row in rows) > 20 * whole[0] > 0:
        axes.set_yscale("log")
    figure.axes[-1].legend(fontsize=7, loc="best", ncols=1 + len(blocks) // 9)
    return _save(figure, file)


def frontier(report: Mapping[str, Any], file: Path) -> Path:
    """Quality against size and against latency, with a line through the models that no other one beats in both.

    Args:
        report: of a run with several models.
        file: a PNG.

    Returns:
        The file.
    """
    rows, names = report["rows"], [row["name"] for row in report["rows"]]
    scales: list[tuple[str, list[float]]] = []
    if all(row["size_bytes"] is not None for row in rows):
        scales.append(("MB on disk", [row["size_bytes"] / 1e6 for row in rows]))
    scales.append(("parameters, millions", [row["parameters"] / 1e6 for row in rows]))
    for batch in sorted({entry["batch_size"] for row in rows for entry in row["latency"]}):
        found = {e["model"]: e["median_ms"] for row in rows for e in row["latency"] if e["batch_size"] == batch}
        scales.append((f"ms at batch {batch}", [found[name] for name in names]))
    if len(scales) > 2:
        # bytes say what parameters do
        scales = [scale for scale in scales if not scale[0].startswith("parameters")]
    figure = _figure(4.2 * len(scales) + 0.6, 3.6)
    values = [quality_of(report, row) for row in rows]
    worst = -1 if report["lower_is_better"] else 1
    for axes, (label, x) in zip(np.atleast_1d(figure.subplots(1, len(scales), sharey=True)), scales, strict=True):
        order = sorted(range(len(rows)), key=lambda i: (x[i], -worst * values[i]))
        best: list[int] = []
        for index in order:
            if not best or worst * values[index] > worst * values[best[-1]]:
                best.append(index)
        axes.plot([x[i] for i in best], [values[i] for i in best], color="0.7", zorder=1, drawstyle="default")
        for index, row in enumerate(rows):
            axes.scatter([x[index]], [values[index]], color=_COLOURS.get(row["role"], "tab:green"), zorder=2)
            axes.annotate(row["name"], (x[index], values[index]), xytext=(5, 5), textcoords="offset points", fontsize=7)
        axes.set(xlabel=label, xlim=(0, 1.25 * max(x)))
        axes.margins(y=0.2)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(metric_title(report) + (" (lower is better)" if report["lower_is_better"] else ""))
    return _save(figure, file)


_GRID: dict[str, Any] = {"edgecolors": "white", "linewidth": 1.5}


def _edges(count: int) -> Any:
    return np.arange(count + 1) - 0.5


def _head_ticks(axes: Axes, heads: int) -> None:
    axes.set_xticks(np.arange(heads) + 0.5, [str(head) for head in range(heads)])
    axes.tick_params(length=0, labelsize=8)


def _two() -> Any:
    return ListedColormap([_GONE, "tab:blue"])


def _shades(count: int) -> Any:
    return colormaps["viridis"](np.linspace(0, 0.9, max(1, count)))


def _figure(width: float, height: float) -> Figure:
    # no pyplot: it has global state, and looks for a screen
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    return file


def _plot(report: Mapping[str, Any], x: Mapping[str, float], label: str, file: Path) -> Path:
    figure = _figure(5, 3.5)
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
    return _save(figure, file)
