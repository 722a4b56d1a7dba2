"""Intervals, against values from elsewhere and against what they must be."""

from __future__ import annotations

import numpy as np
import pytest
from reports import full_report, language_model, plain_report
from sklearn.metrics import f1_score, matthews_corrcoef

from lmcompress.reporting.evidence import decode, difference, encode, score_interval, units_of


@pytest.mark.parametrize(
    "values",
    [
        np.array([0, 1, 1]),
        np.array([-3, 70_000]),
        np.array([True, False]),
        np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
        np.array([], dtype=np.int64),
    ],
)
def test_arrays_come_back_as_they_were(values):
    again = decode(encode(values))
    assert again.shape == values.shape and (again == values).all()


def test_few_classes_take_little_room():
    assert len(encode(np.arange(40_000) % 3)["zlib"]) < 2_000


def _units(metric, predictions, labels):
    shared = {"validation": {"labels": encode(np.asarray(labels))}}
    own = {"validation": {"predictions": encode(np.asarray(predictions))}}
    return units_of({"metric": metric, "evidence": shared}, {"evidence": own}, "validation")


def test_the_interval_of_a_share_is_wilsons():
    found = score_interval(_units("accuracy", [1] * 9 + [0], [1] * 10))
    # Brown, Cai & DasGupta 2001, formula (4), by hand
    assert (found.value, found.low, found.high) == pytest.approx((0.9, 0.5958, 0.9821), abs=1e-4)


def test_a_paired_difference_counts_only_rows_where_the_two_disagree():
    labels = np.ones(1000, dtype=int)
    one, other = (np.arange(1000) < 900).astype(int), (np.arange(1000) < 880).astype(int)
    found = difference(_units("accuracy", one, labels), _units("accuracy", other, labels))
    apart = score_interval(_units("accuracy", one, labels))
    assert found.value == pytest.approx(0.02)
    assert found.low > 0 and found.half < apart.half / 1.5
    # Bonett & Price 2012: 21 and 1 of 1002
    p, q, n = 21 / 1002, 1 / 1002, 1002
    half = 1.96 * np.sqrt((p + q - (p - q) ** 2) / n)
    assert (found.low, found.high) == pytest.approx((p - q - half, p - q + half), abs=2e-5)


def test_models_that_never_disagree_still_have_an_interval():
    units = _units("accuracy", [1, 1, 0, 1], [1, 1, 1, 1])
    found = difference(units, units)
    assert found.value == 0 and found.low < 0 < found.high


@pytest.mark.parametrize(
    ("metric", "reference"), [("f1", f1_score), ("matthews_correlation", matthews_corrcoef), ("pearson", None)]
)
def test_scores_that_are_no_shares_are_bootstrapped(metric, reference):
    drawn = np.random.default_rng(0)
    labels = drawn.integers(0, 2, 500)
    said = np.where(drawn.random(500) < 0.8, labels, 1 - labels)
    expected = np.corrcoef(said, labels)[0, 1] if reference is None else reference(labels, said)
    found = score_interval(_units(metric, said, labels))
    assert found.value == pytest.approx(expected)
    assert found.low < expected < found.high and 0.02 < found.half < 0.1


def test_a_score_without_such_units_has_no_interval():
    assert score_interval(_units("f1_macro", [0, 1, 2], [0, 1, 1])) is None
    assert units_of(plain_report(), plain_report()["rows"][0], "validation") is None
    assert score_interval(_units("accuracy", [1], [1])) is None


def test_constant_predictions_have_no_correlation():
    assert score_interval(_units("pearson", np.ones(5), np.arange(5.0))) is None


def test_tokens_of_a_row_stay_together():
    lengths = np.array([3, 1, 2] * 20)
    labels = np.zeros(lengths.sum(), dtype=int)
    said = np.repeat(np.arange(60) % 3 == 0, lengths).astype(int)
    shared = {"validation": {"labels": encode(labels), "lengths": encode(lengths)}}
    row = {"evidence": {"validation": {"predictions": encode(said)}}}
    units = units_of({"metric": "accuracy", "evidence": shared}, row, "validation")
    assert len(units) == 60 and score_interval(units).value == pytest.approx((said == 0).mean())


def test_perplexities_are_compared_window_by_window():
    report = language_model()
    teacher, student = (units_of(report, row, "validation") for row in report["rows"])
    scores = [row["metrics"]["validation"]["token_perplexity"] for row in report["rows"]]
    assert score_interval(student).value == pytest.approx(scores[1], rel=1e-5)
    rise = difference(student, teacher, relative=True)
    assert rise.value == pytest.approx(scores[1] / scores[0] - 1, rel=1e-4)
    # the windows are hard or easy for both: their spread does not count
    assert rise.half < 0.1 * score_interval(student).half / scores[1]


def test_other_rows_are_not_paired():
    report = full_report()
    units = units_of(report, report["rows"][0], "validation")
    assert difference(units, _units("accuracy", [1, 0], [1, 1])) is None and difference(units, None) is None
