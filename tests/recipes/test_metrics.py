"""Metrics are chosen from those that fit the task."""

from __future__ import annotations

import numpy as np
import pytest

from lmcompress.data import Task, load_task
from lmcompress.errors import LmcompressError
from lmcompress.evaluation import compute_metrics
from lmcompress.recipes.metrics import PERPLEXITIES, fitting_metrics, measured_metrics, with_metrics

ROWS = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}] * 5


def test_metrics_are_replaced_in_the_order_given():
    data = with_metrics(load_task("mine", data=ROWS), ["f1", "accuracy", "f1"])
    assert data.task.metrics == measured_metrics(data.task) == ("f1", "accuracy")
    assert with_metrics(data, None) is data


def test_a_metric_that_does_not_fit_is_answered_with_those_that_do():
    message = (
        "evaluation.metrics: 'pearson' does not fit mine, a classification task.* Valid are: accuracy, f1, f1_macro"
    )
    with pytest.raises(LmcompressError, match=message):
        with_metrics(load_task("mine", data=ROWS), ["pearson"])
    texts = load_task("mine", data=[{"text": "a b c"}] * 10)
    assert measured_metrics(texts.task) == PERPLEXITIES
    with pytest.raises(LmcompressError, match="'accuracy' does not fit mine, a causal_lm task"):
        with_metrics(texts, ["accuracy"])


@pytest.mark.parametrize(
    ("kind", "names", "right"),
    [
        ("classification", ("a", "b"), [0, 1, 1, 0]),
        ("classification", ("a", "b", "c"), [0, 1, 2, 0]),
        ("regression", None, [0.5, 1.0, 2.0, 0.25]),
        ("multi_label", ("a", "b"), [[0, 1], [1, 1], [1, 0], [0, 1]]),
        ("token_classification", ("a", "b", "c"), [[0, 1], [2, 1], [1, 0], [0, 1]]),
    ],
)
def test_all_that_fit_can_be_computed_and_are_1_of_right_answers(kind, names, right):
    fitting = fitting_metrics(Task("t", kind, ("text",), "label", names))
    labels = np.array(right)
    if kind == "token_classification":
        labels = labels.reshape(-1)
    found = compute_metrics(fitting, labels, labels)
    assert found == pytest.approx({name: 0.0 if name == "mse" else 1.0 for name in fitting})
