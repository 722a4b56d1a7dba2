"""Plots: what is on the frontier, where labels go, how far an axis spans."""

from __future__ import annotations

import itertools
import re

import pytest

from lmcompress.reporting.figures import Point, losses, pareto, tradeoff
from lmcompress.reporting.labels import place
from lmcompress.reporting.svg import standalone


def _point(name, x, y, kind="student"):
    return Point(name, kind, (x, 0.9 * x, 1.1 * x), (y, y - 1, y + 1))


def test_the_frontier_is_what_no_other_model_beats_in_both():
    points = [
        _point("a", 1, 80),
        _point("b", 2, 79),
        _point("c", 3, 90),
        _point("d", 1, 70),
        _point("e", 0.5, 95, "control"),
    ]
    assert [point.name for point in pareto(points)] == ["a", "c"]
    assert [point.name for point in pareto(points, lower_is_better=True)] == ["d"]


def _boxes(labels):
    halves = [(label.centre, 3.15 * len(label.name)) for label in labels]
    return [(x - half, y - 7, x + half, y + 7) for (x, y), half in halves]


def test_labels_of_crowded_points_do_not_overlap_and_stay_inside():
    points = {f"model-{i}": (150 + 9 * (i % 3), 150 + 7 * (i // 3)) for i in range(9)}
    taken = [((x - 7, y - 7, x + 7, y + 7), 6.0) for x, y in points.values()]
    labels = place(points, taken, (38, 40, 354, 296))
    boxes = _boxes(labels)
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    assert all(box[0] >= 38 and box[2] <= 354 and box[1] >= 40 and box[3] <= 296 for box in boxes)
    assert any(label.leader for label in labels)


def _ticks(svg):
    return [float(text) for text in re.findall(r"<text[^>]*>([\d.]+)</text>", svg)]


@pytest.mark.parametrize("log", [False, True])
def test_a_plot_names_its_points_and_takes_the_pages_colours(log):
    points = [_point("teacher", 10, 90, "teacher"), _point("a & b", 3, 89.5), _point("$x_1$", 2, 80, "quantized")]
    svg = tradeoff(points, label="MB", quality="accuracy, %", size=(356, 320), title="<t>", log=log, band="teacher")
    assert all(f">{name}</text>" in svg for name in ("teacher", "a &amp; b", "$x_1$"))
    assert "var(--student)" in svg and "#07" not in svg and "<title>&lt;t&gt;</title>" in svg
    assert ("log scale" in svg) is log and "teacher’s 95 % interval" in svg
    alone = standalone(svg)
    assert "var(--" not in alone and "#0067b1" in alone


def test_the_middle_of_a_long_name_is_left_out_where_names_still_differ():
    names = ["a-student-with-a-name-of-some-length", "b" * 40, "b" * 41, "short"]
    points = [_point(name, index + 1, 80) for index, name in enumerate(names)]
    svg = tradeoff(points, label="MB", quality="q", size=(356, 320), title="t")
    assert ">a-student-…ome-length</text>" in svg and f">{'b' * 40}</text>" in svg and f">{'b' * 41}</text>" in svg


def test_noise_does_not_fill_the_axis_of_quality():
    close = [Point(n, "student", (x, x, x), (y, y, y)) for n, x, y in (("a", 300, 90.0), ("b", 400, 90.1))]
    svg = tradeoff(close, label="MB", quality="q", size=(356, 320), title="t")
    ticks = [tick for tick in _ticks(svg) if 50 < tick < 101]
    assert max(ticks) - min(ticks) >= 4


def test_terms_of_a_loss_are_named_at_their_ends():
    log = [
        {
            "step": s,
            "loss": 4.0 / s,
            "loss_label": 1.0 / s,
            "loss_kd": 0.0,
            "loss_hidden_mse_0": 1 / s,
            "loss_hidden_mse_1": 2 / s,
        }
        for s in (1, 2)
    ]
    svg = losses(log, size=(356, 240), title="t", steps=2, limits=(0.01, 10), marks=[(1, "pruned to target")])
    for words in ("labels", "teacher’s logits", "hidden states ×2", "sum", "pruned to target"):
        assert f">{words}</text>" in svg
