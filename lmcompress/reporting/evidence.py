"""Uncertainty of scores and their differences: per-row data in ``results.json``, and intervals from it."""

from __future__ import annotations

import base64
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import DegenerateDataWarning, binomtest, bootstrap, rankdata, ttest_1samp

Array = NDArray[Any]
_CONFIDENCE = 0.95
_RESAMPLES = 999


@dataclass(frozen=True)
class Interval:
    """A number and its 95 % interval.

    Attributes:
        value: the estimate.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the width."""
        return (self.high - self.low) / 2


def encode(values: Array) -> dict[str, Any]:
    """An array as JSON types: numbers in the smallest type that holds them, compressed, in base64.

    Args:
        values: integers, booleans or floats, of any shape; floats are kept in float32.

    Returns:
        ``dtype``, ``shape`` and ``zlib``, for :func:`decode`.

    Example:
        >>> decode(encode(np.array([3, 300]))).tolist()
        [3, 300]
    """
    array = np.asarray(values)
    if array.dtype.kind == "f":
        small = array.astype("<f4")
    else:
        ends = np.result_type(*(np.min_scalar_type(int(end)) for end in (array.min(initial=0), array.max(initial=0))))
        small = array.astype(ends.newbyteorder("<"))
    packed = base64.b64encode(zlib.compress(np.ascontiguousarray(small).tobytes(), 9)).decode("ascii")
    return {"dtype": small.dtype.str, "shape": list(small.shape), "zlib": packed}


def decode(packed: Mapping[str, Any]) -> Array:
    """The array that :func:`encode` has packed.

    Args:
        packed: its result.

    Returns:
        The values, in the type and shape they were packed in.
    """
    raw = zlib.decompress(base64.b64decode(packed["zlib"]))
    return np.frombuffer(raw, dtype=np.dtype(packed["dtype"])).reshape(packed["shape"])


@dataclass(frozen=True)
class Units:
    """The components of a metric: one number per row in each column, and the score as a function of their means.

    Attributes:
        columns: ``(units,)`` float64 each.
        combine: function from means of the columns, ``(resamples,)`` each, to the score.
        shares: whether the only column is right (1) or wrong (0).
    """

    columns: tuple[Array, ...]
    combine: Callable[..., Any]
    shares: bool = False

    def __len__(self) -> int:
        return len(self.columns[0])


def units_of(report: Mapping[str, Any], row: Mapping[str, Any], split: str) -> Units | None:
    """The components of a row's main metric.

    Args:
        report: report of a run.
        row: row of the report.
        split: split that was measured.

    Returns:
        The units: rows, or windows of a text; None if the results lack them, as those of earlier versions,
        or for a metric that is no function of means over rows, such as ``f1_macro``.
    """
    own = (row.get("evidence") or {}).get(split)
    shared = (report.get("evidence") or {}).get(split) or {}
    if own is None:
        return None
    if "nll" in own:
        return _units(_exp_ratio, decode(own["nll"]), decode(own["tokens"])) if _is_token_level(report) else None
    if "scores" in own:
        found = own["scores"].get(report["metric"])
        return None if found is None else _units(_only, decode(found), shares=report["metric"] == "exact_match")
    predictions, labels = decode(own["predictions"]), decode(shared["labels"])
    if "lengths" in shared:
        if report["metric"] == "entity_f1":
            return None
        right = (predictions == labels).astype(np.float64)
        starts = np.concatenate([[0], np.cumsum(decode(shared["lengths"]))[:-1]]).astype(np.int64)
        return _units(_ratio, np.add.reduceat(right, starts), decode(shared["lengths"]))
    return _of_metric(str(report["metric"]), predictions, labels)


def score_interval(units: Units | None) -> Interval | None:
    """The score and its 95 % interval over the choice of rows: Wilson's for shares, else a percentile bootstrap.

    Args:
        units: from :func:`units_of`.

    Returns:
        The interval; None if there is nothing to compute it from, or it is not finite.

    Reference:
        Wilson 1927, *Probable inference, the law of succession, and statistical inference*; Efron & Tibshirani 1993,
        *An introduction to the bootstrap*.
    """
    if units is None or len(units) < 2:
        return None
    if units.shares:
        right = int(units.columns[0].sum())
        found = binomtest(right, len(units)).proportion_ci(_CONFIDENCE, method="wilson")
        return Interval(right / len(units), float(found.low), float(found.high))
    return _bootstrapped(units.columns, units.combine)


def difference(own: Units | None, other: Units | None, *, relative: bool = False) -> Interval | None:
    """The difference of two scores on the same rows, with a paired 95 % interval.

    For shares this is the adjusted Wald interval of paired proportions, which adds one row to either side, so that it
    has a width even where the two models never disagree.

    Args:
        own: units of the model.
        other: units of the model it is compared with, on the same rows.
        relative: whether to use ``own / other - 1`` instead of ``own - other``.

    Returns:
        The interval; None if one of the two is unknown, or the rows differ.

    Reference:
        Bonett & Price 2012, *Adjusted Wald confidence interval for a difference of binomial proportions based on paired
        data*.
    """
    if own is None or other is None or len(own) != len(other) or len(own) < 2:
        return None
    if own.shares and other.shares and not relative:
        apart = own.columns[0] - other.columns[0]
        found = ttest_1samp([*apart, 1.0, -1.0], 0.0).confidence_interval(_CONFIDENCE)
        return Interval(float(apart.mean()), float(found.low), float(found.high))
    cut = len(own.columns)

    def statistic(*means: Any) -> Any:
        mine, theirs = own.combine(*means[:cut]), other.combine(*means[cut:])
        return mine / theirs - 1 if relative else mine - theirs

    return _bootstrapped((*own.columns, *other.columns), statistic)


def _bootstrapped(columns: tuple[Array, ...], combine: Callable[..., Any]) -> Interval | None:
    def statistic(*drawn: Any, axis: int = -1) -> Any:
        with np.errstate(all="ignore"):
            return combine(*(column.mean(axis=axis) for column in drawn))

    value = float(statistic(*columns))
    if not np.isfinite(value):
        return None
    # resampling one number again and again has no spread
    if all(np.ptp(column) == 0 for column in columns):
        return Interval(value, value, value)
    with warnings.catch_warnings():
        # a resample without a score makes the ends nan, which is no interval
        warnings.simplefilter("ignore", DegenerateDataWarning)
        ends = bootstrap(
            columns,
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=_RESAMPLES,
            batch=max(1, 2_000_000 // len(columns[0])),
            method="percentile",
            random_state=np.random.default_rng(0),
        ).confidence_interval
    found = Interval(value, float(ends.low), float(ends.high))
    return found if np.isfinite([found.low, found.high]).all() else None


def _of_metric(metric: str, predictions: Array, labels: Array) -> Units | None:
    if metric == "accuracy":
        right = predictions == labels
        return _units(_only, right if right.ndim == 1 else right.all(axis=1), shares=True)
    p, y = predictions.astype(np.float64), labels.astype(np.float64)
    if metric == "mse":
        return _units(_only, (p - y) ** 2)
    if metric == "f1" or metric == "f1_micro" and p.ndim == 2:
        hits, said = (p * y, p + y) if p.ndim == 1 else ((p * y).sum(axis=1), (p + y).sum(axis=1))
        return _units(_f1, hits, said)
    if metric == "spearmanr":
        p, y = rankdata(p), rankdata(y)
    # Matthews' correlation of two classes is the correlation of zeros and ones
    if metric in ("pearson", "spearmanr") or metric == "matthews_correlation" and max(p.max(), y.max()) <= 1:
        p, y = p - p.mean(), y - y.mean()
        return _units(_correlation, p, y, p * p, y * y, p * y)
    return None


def _units(combine: Callable[..., Any], *columns: Array, shares: bool = False) -> Units:
    return Units(tuple(np.asarray(column, dtype=np.float64) for column in columns), combine, shares)


def _is_token_level(report: Mapping[str, Any]) -> bool:
    return report["metric"] in ("token_perplexity", "perplexity")


def _only(mean: Any) -> Any:
    return mean


def _ratio(top: Any, bottom: Any) -> Any:
    return top / bottom


def _exp_ratio(nll: Any, tokens: Any) -> Any:
    return np.exp(nll / tokens)


def _f1(hits: Any, said: Any) -> Any:
    return 2 * hits / said


def _correlation(p: Any, y: Any, pp: Any, yy: Any, py: Any) -> Any:
    return (py - p * y) / np.sqrt((pp - p * p) * (yy - y * y))
