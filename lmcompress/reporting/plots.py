"""Plots for pruning: importance of heads, sensitivity of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lmcompress.errors import LmcompressError


def importance_map(scores: Sequence[Sequence[float]], file: Path, *, title: str = "importance of heads") -> Path:
    """Scores of heads as a map of blocks and heads; darker is more important.

    Args:
        scores: scores of each block's heads; blocks may have different numbers, or none.
        file: path of a PNG.
        title: title of the plot.

    Returns:
        The file.

    Raises:
        LmcompressError: If there are no heads at all.
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
    """Quality against the share removed, one curve per block, heads and neurons separately.

    Args:
        rows: :meth:`~lmcompress.pruning.structured.sensitivity.SensitivityRow.as_dict` of each measurement.
        file: path of a PNG.
        quality: name of the quality.
        lower_is_better: whether lower quality values are better.

    Returns:
        The file.

    Raises:
        LmcompressError: If there is no measurement of a block.
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
        axes.set(title=part, xlabel="pruned share of the block", xlim=(0, 1.02))
        axes.grid(alpha=0.3)
    axes = figure.axes[0]
    axes.set_ylabel(quality + (" (lower is better)" if lower_is_better else ""))
    if lower_is_better and whole and max(row["quality"] for row in rows) > 20 * whole[0] > 0:
        axes.set_yscale("log")
    figure.axes[-1].legend(fontsize=7, loc="best", ncols=1 + len(blocks) // 9)
    return _save(figure, file)


_GRID: dict[str, Any] = {"edgecolors": "white", "linewidth": 1.5}


def _edges(count: int) -> Any:
    return np.arange(count + 1) - 0.5


def _head_ticks(axes: Axes, heads: int) -> None:
    axes.set_xticks(np.arange(heads) + 0.5, [str(head) for head in range(heads)])
    axes.tick_params(length=0, labelsize=8)


def _shades(count: int) -> Any:
    return colormaps["viridis"](np.linspace(0, 0.9, max(1, count)))


def _figure(width: float, height: float) -> Figure:
    # no pyplot: it has global state, and looks for a display
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    return file
