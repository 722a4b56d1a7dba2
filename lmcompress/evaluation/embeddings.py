"""Metrics of sentence embeddings and of rerankers: similarity as people rate it, and retrieval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import ndcg_score

from lmcompress.errors import LmcompressError
from lmcompress.evaluation.metrics import Array, compute_metrics

SIMILARITY_METRICS = ("spearmanr", "pearson")
"""Metrics of :func:`similarity_metrics`, the main one first."""


def cosine_similarities(first: ArrayLike, second: ArrayLike) -> Array:
    """The cosine of each pair of vectors.

    Args:
        first: ``(rows, width)``.
        second: same shape.

    Returns:
        ``(rows,)`` float64; 0 for a vector of zeros.

    Raises:
        LmcompressError: If the shapes differ.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 2:
        raise LmcompressError(f"embeddings of pairs must have one shape (rows, width), got {a.shape} and {b.shape}")
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.divide((a * b).sum(axis=1), lengths, out=np.zeros(len(a)), where=lengths > 0)


def similarity_metrics(first: ArrayLike, second: ArrayLike, ratings: ArrayLike) -> dict[str, float]:
    """How well the cosine of two embeddings agrees with ratings of similarity, as on STS-B.

    Args:
        first: ``(rows, width)``, embeddings of the first sentences.
        second: same shape, of the second ones.
        ratings: ``(rows,)``, of any scale.

    Returns:
        ``spearmanr`` (published × 100) and ``pearson``, in [-1, 1]; nan where all ratings or cosines are equal.

    Raises:
        LmcompressError: If the shapes differ.

    Reference:
        Reimers & Gurevych, *Sentence-BERT*, 2019, https://arxiv.org/abs/1908.10084, section 4.1.
    """
    return compute_metrics(SIMILARITY_METRICS, cosine_similarities(first, second), np.asarray(ratings, np.float64))


def mean_ndcg(scores: ArrayLike, relevant: Sequence[Mapping[int, float]], k: int = 10) -> float:
    r"""Normalized discounted cumulative gain at ``k``, the mean over queries.

    .. math:: \mathrm{DCG@}k = \sum_{i=1}^{k} \frac{g_i}{\log_2(i + 1)}, \quad
        \mathrm{nDCG@}k = \frac{\mathrm{DCG@}k}{\text{the greatest DCG@}k\text{ of any order}}

    Documents of equal score share the mean of their places. Gains are linear, as in BEIR and ``trec_eval``.

    Args:
        scores: ``(queries, documents)``, greater = better: cosines, or a reranker's scores; -inf for documents that
            were not scored, which come last.
        relevant: for each query the gain of its relevant documents, by number; all others have 0.
        k: number of the best documents that count.

    Returns:
        the mean over queries that have a relevant document, in [0, 1].

    Raises:
        LmcompressError: If the numbers differ, a score is nan, or no query has a relevant document.

    Reference:
        Järvelin & Kekäläinen, *Cumulated gain-based evaluation of IR techniques*, 2002.

    Example:
        >>> round(mean_ndcg([[0.9, 0.5, 0.1]], [{1: 1.0}]), 4)  # 1 / log2(3)
        0.6309
    """
    given = np.asarray(scores, dtype=np.float64)
    if given.ndim != 2 or len(given) != len(relevant):
        raise LmcompressError(f"each query must have scores of all documents, got {given.shape} for {len(relevant)}")
    if np.isnan(given).any():
        raise LmcompressError("scores contain nan; the model is broken, and no metric would show it")
    finite = given[np.isfinite(given)]
    # sklearn takes no infinity
    lowest = (finite.min() if finite.size else 0.0) - 1.0
    ranked = np.where(np.isneginf(given), lowest, given)
    gains = np.zeros_like(given)
    for row, gain in zip(gains, relevant, strict=True):
        row[list(gain)] = list(gain.values())
    asked = gains.sum(axis=1) > 0
    if not asked.any():
        raise LmcompressError("there is nothing to measure: no query has a relevant document")
    return float(ndcg_score(gains[asked], ranked[asked], k=k))
