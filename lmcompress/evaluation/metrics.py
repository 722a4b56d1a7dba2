"""Metrics of classifiers and regressors by name, offline; for GLUE with the names and values of ``evaluate``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import ConstantInputWarning, pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from lmcompress.errors import LmcompressError, nearest

Array: TypeAlias = NDArray[Any]
Ragged: TypeAlias = Array | Sequence[Array]
"""``(rows, ...)``, or for token classification one array per row, of the row's own length."""

IGNORED_LABEL = -100

GLUE_METRICS: dict[str, tuple[str, ...]] = {
    "cola": ("matthews_correlation",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearmanr"),
    "mnli": ("accuracy",),
    "mnli_matched": ("accuracy",),
    "mnli_mismatched": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
    "hans": ("accuracy",),
}
"""The metrics of each task, named as in ``evaluate``'s ``glue``."""


def glue_metrics(task: str, predictions: ArrayLike, references: ArrayLike) -> dict[str, float]:
    """The result of ``evaluate.load("glue", task).compute(...)``, without the Hub.

    Args:
        task: one of :data:`GLUE_METRICS`.
        predictions: ``(rows,)`` classes, or scores for ``stsb``.
        references: ``(rows,)``, the true values.

    Returns:
        the task's metrics by name; see :func:`compute_metrics` for what is nan.

    Raises:
        LmcompressError: If the task is unknown, or its labels are hidden, as in GLUE's test splits.

    Example:
        >>> glue_metrics("mrpc", [0, 1, 1, 1], [0, 1, 0, 1])
        {'accuracy': 0.75, 'f1': 0.8}
    """
    if task not in GLUE_METRICS:
        raise LmcompressError(f"unknown GLUE task {task!r}{nearest(task, GLUE_METRICS)}")
    # the types that evaluate passes to its script; float32 determines ties of scores
    dtype = np.float32 if task == "stsb" else np.int64
    given, right = np.asarray(predictions), np.asarray(references)
    if task != "stsb":
        if given.ndim != 1 or given.dtype.kind not in "iub":
            raise LmcompressError(
                f"predictions for {task!r} must be (rows,) classes, got {given.dtype} {given.shape}; "
                "for logits see predictions_from_logits"
            )
        if (right < 0).any():
            raise LmcompressError(
                f"references for {task!r} must be >= 0, got {right.min()}; GLUE hides its test labels"
            )
    return compute_metrics(GLUE_METRICS[task], given.astype(dtype), right.astype(dtype))


def glue_score(metrics: Mapping[str, float]) -> float:
    """The single score of a task: the mean of its metrics, as on the GLUE leaderboard.

    Args:
        metrics: all metrics of one task, by name.

    Returns:
        their mean; nan if one of them is nan.

    Raises:
        LmcompressError: If there are no metrics.

    Example:
        >>> glue_score({"accuracy": 0.75, "f1": 0.25})
        0.5
    """
    if not metrics:
        raise LmcompressError("metrics must hold at least one metric, got none")
    return float(np.mean(list(metrics.values())))


def compute_metrics(names: Iterable[str], predictions: Ragged, labels: Ragged) -> dict[str, float]:
    """The named metrics of predictions.

    Predictions whose integer label is -100 are ignored. Of ragged rows all remaining tokens count equally.

    Args:
        names: names in :data:`METRICS`: ``accuracy`` (for multi-label rows: the share that is right in every label),
            ``f1`` (of class 1 of 0 and 1), ``f1_macro`` (mean over the classes that occur in predictions or
            labels), ``f1_micro`` (multi-label: over all decisions), ``matthews_correlation``, ``pearson``,
            ``spearmanr``, ``mse``.
        predictions: ``(rows,)`` classes or scores, ``(rows, labels)`` zeros and ones for multi-label, or one array
            per row for token classification; see :func:`predictions_from_logits`.
        labels: same shape. A ``(rows, length)`` array that contains -100 is treated as tokens.

    Returns:
        name to value. ``pearson`` and ``spearmanr`` are nan if predictions or labels are constant or fewer than two,
        ``f1`` is 0 if neither has a 1, ``matthews_correlation`` is 0 if either has only one class.

    Raises:
        LmcompressError: If a name is unknown, nothing is left to measure, the shapes differ, or a metric does not fit.

    Example:
        >>> compute_metrics(["accuracy", "f1_macro"], np.array([0, 1, 1, 0]), np.array([0, 1, 0, -100]))
        {'accuracy': 0.6666666666666666, 'f1_macro': 0.6666666666666666}
    """
    chosen = list(names)
    for name in chosen:
        if name not in METRICS:
            raise LmcompressError(f"unknown metric {name!r}{nearest(name, METRICS)}")
    given, right = _pair(predictions, labels)
    return {name: METRICS[name](given, right) for name in chosen}


def predictions_from_logits(logits: Ragged, kind: str) -> Ragged:
    """A model's predictions, from its logits.

    Args:
        logits: ``(rows, classes)``; ``(rows, 1)`` or ``(rows,)`` for regression; for token classification
            ``(rows, length, classes)`` or one ``(length, classes)`` per row.
        kind: kind of task: ``classification`` and ``token_classification`` (the class with the largest logit),
            ``multi_label`` (1 where the logit is > 0, that is, where the probability is above a half),
            ``regression`` (the logit itself).

    Returns:
        ``(rows,)`` classes or scores; ``(rows, classes)`` zeros and ones for multi-label; per-token classes in the
        shape of the logits without its last axis.

    Raises:
        LmcompressError: If the kind is unknown, the shape is not the kind's, or a logit is nan.

    Example:
        >>> predictions_from_logits(np.array([[0.1, 2.0], [1.0, -1.0]]), "classification")
        array([1, 0])
    """
    if kind not in _DECISIONS:
        raise LmcompressError(f"unknown kind of task {kind!r}{nearest(kind, _DECISIONS)}")
    decide, axes = _DECISIONS[kind]
    if not isinstance(logits, np.ndarray):
        if kind != "token_classification":
            raise LmcompressError(
                f"logits of {kind} must be one array, got a list; ragged rows are of token_classification"
            )
        return [decide(_checked(row, (2,), kind)) for row in logits]
    return decide(_checked(logits, axes, kind))


def _checked(logits: Array, axes: tuple[int, ...], kind: str) -> Array:
    if logits.ndim not in axes or (kind == "regression" and logits.ndim == 2 and logits.shape[1] != 1):
        raise LmcompressError(f"logits of shape {logits.shape} are not those of {kind}")
    if np.isnan(logits).any():
        raise LmcompressError("logits contain nan; the model is broken, and no metric would show it")
    return logits


_DECISIONS: dict[str, tuple[Callable[[Array], Array], tuple[int, ...]]] = {
    "classification": (lambda logits: logits.argmax(axis=-1), (2,)),
    "multi_label": (lambda logits: (logits > 0).astype(np.int64), (2,)),
    "regression": (lambda logits: logits.reshape(-1), (1, 2)),
    "token_classification": (lambda logits: logits.argmax(axis=-1), (2, 3)),
}


def _pair(predictions: Ragged, labels: Ragged) -> tuple[Array, Array]:
    """Both as plain arrays, without the entries whose label is -100."""
    given_rows, right_rows = _rows(predictions), _rows(labels)
    if len(given_rows) != len(right_rows):
        raise LmcompressError(f"each row must have labels, got {len(given_rows)} and {len(right_rows)} rows")
    for a, b in zip(given_rows, right_rows, strict=True):
        if a.shape != b.shape:
            raise LmcompressError(f"predictions and labels must have one shape, got {a.shape} and {b.shape}")
    if not given_rows:
        raise LmcompressError("there is nothing to measure: no rows")
    given, right = (rows[0] if len(rows) == 1 else np.concatenate(rows) for rows in (given_rows, right_rows))
    if right.dtype.kind in "iu":
        ignored = right == IGNORED_LABEL
        if ignored.any():
            given, right = given[~ignored], right[~ignored]
    if right.size == 0:
        raise LmcompressError("there is nothing to measure: no rows, or every label is -100")
    return given, right


def _rows(values: Ragged) -> list[Array]:
    if isinstance(values, np.ndarray):
        return [values]
    if all(np.ndim(row) == 0 for row in values):
        return [np.asarray(values)]
    return [np.asarray(row) for row in values]


def _accuracy(predictions: Array, labels: Array) -> float:
    right = predictions == labels
    return float((right if right.ndim == 1 else right.reshape(len(right), -1).all(axis=1)).mean())


def _f1(predictions: Array, labels: Array) -> float:
    classes = np.union1d(predictions, labels)
    if labels.ndim != 1 or not np.isin(classes, (0, 1)).all():
        raise LmcompressError(
            f"f1 is of (rows,) classes 0 and 1, got shape {labels.shape} with {classes[:5].tolist()}; "
            "f1_macro and f1_micro are of more"
        )
    return _sklearn_f1(predictions, labels, "binary")


def _sklearn_f1(predictions: Array, labels: Array, average: str) -> float:
    with warnings.catch_warnings():
        # sklearn mistakes many classes in few rows for a regression; transformers has multi-label labels as floats
        warnings.filterwarnings("ignore", message="The number of unique classes")
        return float(
            f1_score(labels.astype(np.int64), predictions.astype(np.int64), average=average, zero_division=0.0)
        )


def _matthews(predictions: Array, labels: Array) -> float:
    with warnings.catch_warnings():
        # the result, 0, is right; the warning is about the shape of an unused confusion matrix
        warnings.filterwarnings("ignore", message="A single label was found|The number of unique classes")
        return float(matthews_corrcoef(labels, predictions))


def _correlation(function: Callable[[Array, Array], Any], predictions: Array, labels: Array) -> float:
    if predictions.ndim != 1:
        raise LmcompressError(f"a correlation is of (rows,) scores, got shape {predictions.shape}")
    if len(predictions) < 2:
        return float("nan")
    with warnings.catch_warnings():
        # the result, nan, is clear; scipy warns of constant and of almost constant input separately
        warnings.simplefilter("ignore", ConstantInputWarning)
        return float(function(predictions, labels)[0])


def _mse(predictions: Array, labels: Array) -> float:
    # float64: in float32 the mean of many squares loses digits, in integers a difference can wrap around
    return float(np.square(predictions.astype(np.float64) - labels.astype(np.float64)).mean())


METRICS: dict[str, Callable[[Array, Array], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "f1_macro": partial(_sklearn_f1, average="macro"),
    "f1_micro": partial(_sklearn_f1, average="micro"),
    "matthews_correlation": _matthews,
    "mse": _mse,
    "pearson": partial(_correlation, pearsonr),
    "spearmanr": partial(_correlation, spearmanr),
}
"""Name to ``f(predictions, labels)`` of plain arrays; used by :func:`compute_metrics`."""
