"""The plots of the page: quality against cost, and losses by term."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from lmcompress.reporting.labels import Box, place
from lmcompress.reporting.svg import COLOURS, Drawing, style

_LONGEST_NAME = 22
_MARKERS = {"teacher": "s", "student": "o", "control": "D", "pruned": "^", "quantized": "h"}
_DASHES: Mapping[str, Any] = {"kd": (0, (6, 2)), "hidden": (0, (1.5, 1.5)), "other": (0, (4, 1.5, 1, 1.5))}


@dataclass(frozen=True)
class Point:
    """A model in a plot.

    Attributes:
        name: label of the point.
        kind: key of its marker and colour.
        x: its cost, with the ends of its interval.
        y: its quality, with the ends of its interval.
        strong: whether its name is bold.
    """

    name: str
    kind: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]
    strong: bool = False


def pareto(points: Sequence[Point], *, lower_is_better: bool = False) -> list[Point]:
    """The Pareto frontier: points that no other one beats in both, without controls.

    Args:
        points: any points.
        lower_is_better: whether quality is better the lower it is; cost always is.

    Returns:
        They, by rising cost.
    """
    sign = -1 if lower_is_better else 1
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x[0], -sign * p.y[0])):
        if point.kind != "control" and (not best or sign * point.y[0] > sign * best[-1].y[0]):
            best.append(point)
    return best


def tradeoff(
    points: Sequence[Point],
    *,
    label: str,
    quality: str,
    size: tuple[int, int],
    title: str,
    log: bool = False,
    lower_is_better: bool = False,
    band: str | None = None,
    limits: tuple[float, float] = (0.0, 100.0),
    least_span: float = 6.0,
) -> str:
    """Quality against cost: intervals of both, the frontier, and the reference's interval as a band.

    Args:
        points: at least one.
        label: label of the cost axis; it starts at 0 unless ``log``.
        quality: label of the other axis.
        size: size in px.
        title: title of the figure, unique on a page.
        log: whether cost is on a log scale, as its label then states.
        lower_is_better: whether lower quality values are better.
        band: name of the point whose quality interval is shaded.
        limits: bounds of quality.
        least_span: minimum span of the quality axis, so that noise does not fill the plot.

    Returns:
        SVG.
    """
    with style(f"{title} {size}"):
        drawing = Drawing(size)
        width, height = size
        axes = drawing.figure.add_axes((44 / width, 40 / height, 1 - 54 / width, 1 - 74 / height))
        _quality_axis(axes, points, limits, least_span)
        _cost_axis(axes, points, log)
        axes.grid(True, zorder=0)
        axes.set_xlabel(label + (" (log scale)" if log else ""), labelpad=6)
        drawing.text(2, height - 15, quality, ha="left")
        reference = next((p for p in points if p.name == band and p.y[1] < p.y[2]), None)
        if reference:
            axes.axhspan(*reference.y[1:], color=COLOURS["teacher"], alpha=0.13, zorder=0.5, linewidth=0)
            drawing.text(width - 10, height - 15, f"▒ {reference.name[:24]}’s 95 % interval", ha="right")
        best = pareto(points, lower_is_better=lower_is_better)
        line: dict[str, Any] = {
            "color": COLOURS["muted"],
            "linewidth": 1.2,
            "drawstyle": "steps-post",
            "dashes": (4, 3),
            "zorder": 2,
        }
        axes.plot([p.x[0] for p in best], [p.y[0] for p in best], **line)
        for point in sorted(points, key=lambda p: p.kind != "control"):
            _mark(axes, point)
        _name(drawing, axes, points, best)
        return drawing.svg(title)


def losses(
    log: Sequence[Mapping[str, float]],
    *,
    size: tuple[int, int],
    title: str,
    steps: int,
    limits: tuple[float, float],
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Every weighted term of the loss on a log scale; curves are labelled at their ends.

    Args:
        log: entries with ``step``, ``loss`` and the terms, ``loss_…``; at least one.
        size: size in px.
        title: title of the figure, unique on a page.
        steps: number of training steps.
        limits: limits of the loss axis, positive.
        marks: steps with a label.

    Returns:
        SVG.
    """
    with style(title):
        drawing = Drawing(size)
        width, height = size
        axes = drawing.figure.add_axes((40 / width, 38 / height, 1 - 142 / width, 1 - 52 / height))
        bottom, top = limits
        terms = sorted({key for entry in log for key in entry if key.startswith("loss_")})
        groups: dict[str, list[str]] = {}
        for term in terms:
            groups.setdefault(re.sub(r"_\d+$", "", term[5:]), []).append(term)
        ends = [_curves(axes, log, name, members, bottom) for name, members in groups.items()]
        if len(terms) != 1:
            values = np.maximum([entry["loss"] for entry in log], bottom)
            axes.plot([entry["step"] for entry in log], values, color=COLOURS["muted"], linewidth=1.1, zorder=2)
            ends.append((float(values[-1]), "sum" if terms else "loss", "muted"))
        axes.set_yscale("log")
        axes.set_ylim(bottom, top)
        axes.set_xlim(0, max(steps, log[-1]["step"]))
        decades = [a * 10.0**b for b, a in product(range(-6, 6), (1, 3))]
        axes.yaxis.set_major_locator(FixedLocator([v for v in decades if bottom <= v <= top]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        axes.grid(True, axis="y", zorder=0)
        axes.set_xlabel("steps", labelpad=5)
        drawing.text(2, height - 8, "loss (log scale)", ha="left")
        for step, words in marks:
            axes.axvline(step, color=COLOURS["muted"], linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
            drawing.text(axes.transData.transform((step, top))[0] + 4, height - 22, words, size=10.5, ha="left")
        _name_ends(drawing, axes, ends, log[-1]["step"])
        return drawing.svg(title)


def _quality_axis(axes: Axes, points: Sequence[Point], limits: tuple[float, float], least_span: float) -> None:
    # an honest axis: never narrower than the minimum span, and never cutting an interval
    low, high = min(p.y[1] for p in points), max(p.y[2] for p in points)
    spare = max(0.0, least_span - (high - low)) / 2 + 0.12 * (high - low)
    axes.set_ylim(max(limits[0], low - spare), min(limits[1], high + spare))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}".replace("-", "−")))


def _cost_axis(axes: Axes, points: Sequence[Point], log: bool) -> None:
    least, most = min(p.x[1] for p in points), max(p.x[2] for p in points)
    if log:
        axes.set_xscale("log")
        axes.set_xlim(least / 1.45, most * 1.5)
        ticks = [a * 10.0**b for b, a in product(range(-4, 6), (1, 2, 5))]
        axes.xaxis.set_major_locator(FixedLocator([t for t in ticks if least / 1.45 <= t <= most * 1.5]))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(0, 1.12 * most)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def _mark(axes: Axes, point: Point) -> None:
    colour, hollow = COLOURS[point.kind], point.kind == "control"
    # markers at the end of an axis are drawn whole
    bar: dict[str, Any] = {"color": colour, "linewidth": 1.6, "zorder": 3, "clip_on": False}
    axes.plot([point.x[0]] * 2, point.y[1:], **bar)
    axes.plot(point.x[1:], [point.y[0]] * 2, **bar)
    face: dict[str, Any] = {
        "color": COLOURS["card"] if hollow else colour,
        "markeredgecolor": colour,
        "markeredgewidth": 1.8,
    }
    size = 11 if hollow else 8.5
    axes.plot(
        point.x[:1],
        point.y[:1],
        marker=_MARKERS[point.kind],
        markersize=size,
        linestyle="none",
        zorder=4,
        clip_on=False,
        **face,
    )


def _name(drawing: Drawing, axes: Axes, points: Sequence[Point], best: Sequence[Point]) -> None:
    names = _short_names([point.name for point in points])
    at = {names[p.name]: tuple(axes.transData.transform((p.x[0], p.y[0]))) for p in points}
    taken: list[tuple[Box, float]] = []
    for point in points:
        (x, y), (left, low), (right, high) = (
            axes.transData.transform(ends) for ends in zip(point.x, point.y, strict=True)
        )
        taken += [((x - 7, y - 7, x + 7, y + 7), 6), ((x - 2, low, x + 2, high), 2), ((left, y - 2, right, y + 2), 2)]
    for point, after in pairwise(best):
        (x, y), (next_x, next_y) = at[names[point.name]], at[names[after.name]]
        taken.append(((x, y - 1.5, next_x, y + 1.5), 1.2))
        taken.append(((next_x - 1, min(y, next_y), next_x + 1, max(y, next_y)), 1.2))
    strong = {names[p.name] for p in points if p.strong}
    area = (axes.get_window_extent().x0 + 1, axes.get_window_extent().y0 + 1, drawing.width - 2, drawing.height - 24)
    for label in place(at, taken, area):
        if label.leader:
            drawing.line(*label.leader)
        weight = "bold" if label.name in strong else "normal"
        where: dict[str, Any] = {"ha": "center", "va": "center_baseline", "fontweight": weight}
        drawing.text(*label.centre, label.name, colour="ink", size=11.5, **where)


def _short_names(names: Sequence[str]) -> dict[str, str]:
    """Names that fit a plot: long ones are abbreviated in the middle, as long as they stay distinct."""
    short = {name: name if len(name) <= _LONGEST_NAME else f"{name[:10]}…{name[-10:]}" for name in names}
    return {name: words if list(short.values()).count(words) == 1 else name for name, words in short.items()}


def _curves(
    axes: Axes, log: Sequence[Mapping[str, float]], name: str, members: Sequence[str], bottom: float
) -> tuple[float, str, str]:
    """Draw the terms of one kind; returns their ends, labels and colour."""
    family = name if name in ("label", "kd") else "hidden" if name.startswith("hidden") else "other"
    last = []
    for term in members:
        entries = [entry for entry in log if term in entry]
        values = np.maximum([entry[term] for entry in entries], bottom)
        line = {"color": COLOURS[f"t-{family}"], "linestyle": _DASHES.get(family, "-")}
        thick = 1.8 if len(members) == 1 else 1.3
        axes.plot([entry["step"] for entry in entries], values, linewidth=thick, zorder=3, **line)
        last.append(float(values[-1]))
    words = {"label": "labels", "kd": "teacher’s logits", "hidden_mse": "hidden states"}.get(
        name, name.replace("_", " ")
    )
    times = f" ×{len(members)}" if len(members) > 1 else ""
    return float(np.exp(np.mean(np.log(last)))), words[:17] + times, f"t-{family}"


def _name_ends(drawing: Drawing, axes: Axes, ends: Sequence[tuple[float, str, str]], last_step: float) -> None:
    ends = sorted(ends)
    wanted = [float(axes.transData.transform((0, value))[1]) for value, _, _ in ends]
    places = list(wanted)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + 13)
    # labels above the plot move down, pushing those below
    places[-1] = min(places[-1], drawing.height - 20)
    for i in range(len(places) - 2, -1, -1):
        places[i] = min(places[i], places[i + 1] - 13)
    right = float(axes.transData.transform((last_step, 1))[0])
    for (_, words, colour), y, at in zip(ends, wanted, places, strict=True):
        drawing.line((right + 2, y), (drawing.width - 101, at))
        drawing.text(drawing.width - 98, at, words, colour=colour, size=10.5, ha="left", va="center_baseline")
