import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcompress.errors import LmcompressError
from lmcompress.evaluation import (
    GLUE_METRICS,
    METRICS,
    compute_metrics,
    glue_metrics,
    glue_score,
    predictions_from_logits,
)

binary_pairs = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40)


def confusion(pairs):
    return tuple(sum(pair == cell for pair in pairs) for cell in [(1, 1), (1, 0), (0, 1), (0, 0)])


@given(binary_pairs)
def test_mrpc_is_the_confusion_matrix_by_hand(pairs):
    true_positive, false_positive, false_negative, true_negative = confusion(pairs)
    expected_f1 = 2 * true_positive / ((2 * true_positive + false_positive + false_negative) or 1)
    metrics = glue_metrics("mrpc", *map(list, zip(*pairs, strict=True)))
    assert list(metrics) == ["accuracy", "f1"]
    assert metrics["accuracy"] == pytest.approx((true_positive + true_negative) / len(pairs))
    assert metrics["f1"] == pytest.approx(expected_f1)


@given(binary_pairs)
def test_cola_is_matthews_formula_and_0_for_one_class(pairs):
    tp, fp, fn, tn = confusion(pairs)
    denominator = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    expected = (tp * tn - fp * fn) / denominator if denominator else 0.0
    metrics = glue_metrics("cola", *map(list, zip(*pairs, strict=True)))
    assert metrics == {"matthews_correlation": pytest.approx(expected)}


def test_stsb_is_the_covariance_formula_on_scores_and_on_ranks():
    generator = np.random.default_rng(0)
    predictions = generator.permutation(50).astype(np.float32)
    references = predictions + generator.permutation(50).astype(np.float32) * 0.5 + 0.01 * np.arange(50)

    def correlation(a, b):
        a, b = a - a.mean(), b - b.mean()
        return (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())

    def ranks(values):
        # no ties here: the rank is the place in the sorted order
        return np.argsort(np.argsort(values)).astype(np.float64)

    metrics = glue_metrics("stsb", predictions, references)
    assert list(metrics) == ["pearson", "spearmanr"]
    assert metrics["pearson"] == pytest.approx(correlation(predictions.astype(np.float64), references), abs=1e-5)
    assert metrics["spearmanr"] == pytest.approx(correlation(ranks(predictions), ranks(references)), abs=1e-6)


def test_spearman_gives_ties_their_mean_rank():
    # ranks 1.5 1.5 3 and 1 2 3: covariance 1.5, variances 1.5 and 2
    assert compute_metrics(["spearmanr"], np.array([1.0, 1, 2]), np.array([1.0, 2, 3]))["spearmanr"] == pytest.approx(
        1.5 / math.sqrt(1.5 * 2)
    )


@pytest.mark.parametrize("name", ["pearson", "spearmanr"])
@pytest.mark.parametrize("predictions", [[2.0, 2.0, 2.0], [1.0]], ids=["constant", "one-row"])
def test_a_correlation_that_does_not_exist_is_nan_without_a_warning(name, predictions):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(compute_metrics([name], predictions, [1.0, 2.0, 3.0][: len(predictions)])[name])


def test_f1_without_any_positive_is_0():
    assert glue_metrics("qqp", [0, 0], [0, 0]) == {"accuracy": 1.0, "f1": 0.0}


@pytest.mark.parametrize("task", ["sst2", "mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "wnli", "hans"])
def test_the_other_tasks_are_accuracy(task):
    assert glue_metrics(task, [0, 1, 1, 0], [0, 1, 0, 0]) == {"accuracy": 0.75}


@pytest.mark.parametrize("task", GLUE_METRICS)
def test_right_answers_have_score_1(task):
    assert glue_score(glue_metrics(task, [0, 1, 1, 0], [0, 1, 1, 0])) == pytest.approx(1.0)


def test_glue_score_is_the_mean_and_nan_says_so():
    assert glue_score({"pearson": 0.5, "spearmanr": 0.7}) == pytest.approx(0.6)
    assert math.isnan(glue_score({"pearson": math.nan, "spearmanr": 0.7}))


def test_micro_f1_counts_all_decisions_of_multi_label_rows():
    labels = np.array([[1.0, 0, 1], [0, 1, 0], [0, 0, 0]])
    predictions = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0]])
    metrics = compute_metrics(["f1_micro", "accuracy"], predictions, labels)
    assert metrics["f1_micro"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert metrics["accuracy"] == pytest.approx(2 / 3)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_macro_f1_is_the_mean_over_classes_and_micro_f1_of_one_label_is_accuracy(pairs):
    predictions, labels = (np.array(column) for column in zip(*pairs, strict=True))
    scores = []
    for label in np.union1d(predictions, labels):
        hits = ((predictions == label) & (labels == label)).sum()
        scores.append(2 * hits / ((predictions == label).sum() + (labels == label).sum()))
    metrics = compute_metrics(["f1_macro", "f1_micro", "accuracy"], predictions, labels)
    assert metrics["f1_macro"] == pytest.approx(np.mean(scores))
    assert metrics["f1_micro"] == pytest.approx(metrics["accuracy"])


def test_many_classes_in_few_rows_do_not_warn():
    many = np.arange(40)
    assert compute_metrics(["f1_macro", "matthews_correlation"], many, many) == pytest.approx(
        {"f1_macro": 1.0, "matthews_correlation": 1.0}
    )


def test_mse_is_the_mean_of_squares():
    assert compute_metrics(["mse"], np.array([1, 2], np.uint8), np.array([2, 4], np.uint8)) == {"mse": 2.5}


def test_tokens_labelled_minus_100_count_nowhere():
    predictions = [np.array([0, 1, 2]), np.array([1])]
    labels = [np.array([0, -100, 2]), np.array([0])]
    ragged = compute_metrics(["accuracy", "f1_macro"], predictions, labels)
    flat = compute_metrics(["accuracy", "f1_macro"], np.array([0, 2, 1]), np.array([0, 2, 0]))
    assert ragged == flat
    assert ragged["accuracy"] == pytest.approx(2 / 3)
    padded = compute_metrics(["accuracy"], np.array([[0, 1, 2], [1, 9, 9]]), np.array([[0, -100, 2], [0, -100, -100]]))
    assert padded["accuracy"] == ragged["accuracy"]


@pytest.mark.parametrize(
    ("kind", "logits", "expected"),
    [
        ("classification", np.array([[0.0, 2, 1], [3, 2, 1]]), np.array([1, 0])),
        ("multi_label", np.array([[0.1, -0.1], [0.0, 5]]), np.array([[1, 0], [0, 1]])),
        ("regression", np.array([[0.5], [2.0]]), np.array([0.5, 2.0])),
        ("regression", np.array([0.5, 2.0]), np.array([0.5, 2.0])),
        ("token_classification", np.array([[[0.0, 1], [1, 0]]]), np.array([[1, 0]])),
    ],
)
def test_predictions_from_logits(kind, logits, expected):
    np.testing.assert_array_equal(predictions_from_logits(logits, kind), expected)


def test_ragged_logits_give_ragged_predictions():
    rows = predictions_from_logits([np.array([[0.0, 1], [1, 0]]), np.array([[0.0, 1]])], "token_classification")
    assert [row.tolist() for row in rows] == [[1, 0], [1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: glue_metrics("sst-2", [0], [0]), "unknown GLUE task 'sst-2'; did you mean 'sst2'"),
        (lambda: glue_metrics("sst2", [0, 1], [-1, -1]), "must be >= 0, got -1; GLUE hides"),
        (lambda: glue_metrics("sst2", [[0.1, 0.2]], [1]), r"'sst2' must be \(rows,\) classes, got float64 \(1, 2\)"),
        (lambda: glue_score({}), "at least one metric"),
        (lambda: compute_metrics(["acuracy"], [0], [0]), "unknown metric 'acuracy'; did you mean 'accuracy'"),
        (lambda: compute_metrics(["accuracy"], np.zeros(2), np.zeros(3)), r"one shape, got \(2,\) and \(3,\)"),
        (lambda: compute_metrics(["accuracy"], [np.zeros(2)], [np.zeros(2), np.zeros(1)]), "got 1 and 2 rows"),
        (lambda: compute_metrics(["accuracy"], np.array([1]), np.array([-100])), "every label is -100"),
        (lambda: compute_metrics(["accuracy"], [], []), "nothing to measure"),
        (lambda: compute_metrics(["f1"], [0, 2], [0, 1]), r"classes 0 and 1, got shape \(2,\) with \[0, 1, 2\]"),
        (lambda: compute_metrics(["pearson"], np.zeros((2, 2)), np.zeros((2, 2))), r"scores, got shape \(2, 2\)"),
        (lambda: predictions_from_logits(np.zeros((2, 2)), "single_label"), "did you mean 'multi_label'"),
        (
            lambda: predictions_from_logits(np.zeros((2, 2)), "regression"),
            r"shape \(2, 2\) are not those of regression",
        ),
        (lambda: predictions_from_logits(np.zeros(2), "classification"), r"shape \(2,\) are not"),
        (lambda: predictions_from_logits([np.zeros((2, 2))], "regression"), "one array, got a list"),
        (lambda: predictions_from_logits(np.array([[np.nan, 0]]), "classification"), "contain nan"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(LmcompressError, match=message):
        call()


def test_every_metric_of_a_task_exists():
    assert {name for names in GLUE_METRICS.values() for name in names} <= set(METRICS)
