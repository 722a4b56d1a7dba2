"""Placement of the labels of points in a plot, without overlaps with each other, markers or lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in px."""

_DISTANCES = (12, 20, 32, 46, 62, 80)
_ANGLES = (0, 180, 90, 270, 45, 135, 315, 225, 22, 158, 202, 338, 67, 113, 247, 293)
_CHARACTER, _HEIGHT = 6.3, 14.0


@dataclass(frozen=True)
class Label:
    """The placement of a label.

    Attributes:
        name: label of the point.
        centre: centre of the text, px.
        leader: ends of the line to its point, if the text is far from it.
    """

    name: str
    centre: tuple[float, float]
    leader: tuple[tuple[float, float], tuple[float, float]] | None


def place(points: Mapping[str, tuple[float, float]], taken: Sequence[tuple[Box, float]], area: Box) -> list[Label]:
    """Choose a place for each label: of 96 candidates around its point the one with the least overlap.

    Greedy, the most crowded points first. A place nearer to another point than to its own has a penalty, so that
    labels are unambiguous.

    Args:
        points: name to px.
        taken: boxes of drawn elements, and the penalty of overlapping each.
        area: area that labels must stay in.

    Returns:
        A label for each point.
    """

    def crowd(name: str) -> int:
        x, y = points[name]
        return -sum(abs(x - a) < 80 and abs(y - b) < 30 for a, b in points.values())

    boxes, labels = list(taken), []
    for name in sorted(points, key=crowd):
        width = _CHARACTER * len(name) + 4
        options = [_option(points, name, width, d, angle, boxes, area) for d in _DISTANCES for angle in _ANGLES]
        _, box, distance = min(options, key=lambda option: option[0])
        boxes.append((box, 12))
        x, y = points[name]
        near = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
        centre = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        labels.append(Label(name, centre, ((x, y), near) if distance > 20 else None))
    return labels


def _option(
    points: Mapping[str, tuple[float, float]],
    name: str,
    width: float,
    distance: float,
    angle: float,
    boxes: Sequence[tuple[Box, float]],
    area: Box,
) -> tuple[float, Box, float]:
    """Cost and box of one place."""
    x, y = points[name]
    dx, dy = distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))
    left = x + dx - width / 2 + _sign(dx) * width / 2
    bottom = y + dy - _HEIGHT / 2 + _sign(dy) * _HEIGHT / 2 * (abs(dy) > 6)
    box = (left, bottom, left + width, bottom + _HEIGHT)
    cost = distance / 12 + (0.2 if angle % 90 else 0)
    cost += sum(weight * _overlap(box, other) for other, weight in boxes)
    own = _gap(box, (x, y)) + 6
    cost += sum(6 for other, at in points.items() if other != name and _gap(box, at) < own)
    if box[0] < area[0] or box[1] < area[1] or box[2] > area[2] or box[3] > area[3]:
        cost += 1e4
    return cost, box, distance


def _sign(value: float) -> int:
    return 0 if abs(value) < 1e-6 else 1 if value > 0 else -1


def _gap(box: Box, at: tuple[float, float]) -> float:
    return math.hypot(max(box[0] - at[0], 0, at[0] - box[2]), max(box[1] - at[1], 0, at[1] - box[3]))


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1])) / 10
