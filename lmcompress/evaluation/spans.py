"""Answers as spans of a context: from the logits of windows to texts, and SQuAD's two metrics."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmcompress.data.windows import Windows
from lmcompress.errors import LmcompressError
from lmcompress.evaluation.metrics import Array, Ragged

SPAN_METRICS = ("f1", "exact_match")
"""Metrics of question answering, SQuAD's main one first."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Candidate:
    """A possible answer.

    Attributes:
        text: as it stands in the context; empty for "no answer".
        score: sum of the logits of its first and last token.
        start: its first character in the context; 0 for "no answer".
    """

    text: str
    score: float
    start: int


def answer_candidates(
    logits: Ragged, windows: Windows, *, n_best: int = 20, max_tokens: int = 30, none_allowed: bool = False
) -> list[list[Candidate]]:
    """The best spans for each question over all of its windows.

    A span begins and ends in the context, among the ``n_best`` largest logits of each side in its window, and has at
    most ``max_tokens`` tokens. The score of "no answer" is the least over the windows: one that sees an answer has it.

    Args:
        logits: for each window ``(length, 2)``, start and end, without padding.
        windows: the windows, in the order of the logits.
        n_best: spans kept for each question, and positions considered on each side.
        max_tokens: longest span.
        none_allowed: whether "no answer" is a candidate, as in SQuAD 2.0.

    Returns:
        for each question at most ``n_best`` candidates, best first, and at least one.

    Raises:
        LmcompressError: If logits and windows do not agree, or a logit is nan.

    Reference:
        Devlin et al. 2019, *BERT*, https://arxiv.org/abs/1810.04805, sections 4.2 and 4.3.
    """
    if len(logits) != len(windows.offsets):
        raise LmcompressError(f"each window must have logits, got {len(logits)} for {len(windows.offsets)} windows")
    found: list[list[Candidate]] = [[] for _ in windows.contexts]
    nothing = np.full(len(windows.contexts), np.inf)
    each = zip(logits, windows.offsets, windows.questions, windows.no_answer, strict=True)
    for scores, offsets, question, no_answer in each:
        if scores.shape != offsets.shape:
            raise LmcompressError(f"logits of a window must have shape {offsets.shape}, got {scores.shape}")
        if np.isnan(scores).any():
            raise LmcompressError("logits contain nan; the model is broken, and no metric would show it")
        found[question] += _spans_of(scores, offsets, windows.contexts[question], n_best, max_tokens)
        nothing[question] = min(nothing[question], scores[no_answer].sum())
    chosen = []
    for candidates, none in zip(found, nothing, strict=True):
        if none_allowed or not candidates:
            candidates = [*candidates, Candidate("", float(none), 0)]
        chosen.append(sorted(candidates, key=lambda one: -one.score)[:n_best])
    return chosen


def span_scores(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, NDArray[np.float64]]:
    """Exact match and F1 of each question, as the official script of SQuAD 2.0 computes them.

    Both compare lower-cased words without articles and punctuation, with the true answer that fits best. F1 is the
    harmonic mean of precision and recall of words. The script of SQuAD 1.1 differs only where an answer is nothing but
    articles and punctuation. Both scripts print percentages, these are shares.

    Args:
        predictions: a text for each question; empty for "no answer".
        answers: the true answers of each question; none if it has no answer.

    Returns:
        ``f1`` and ``exact_match``, ``(questions,)`` float64 in [0, 1]; their means are the metrics.

    Raises:
        LmcompressError: If there are no questions, or the numbers differ.

    Reference:
        Rajpurkar et al. 2016, *SQuAD: 100,000+ Questions for Machine Comprehension of Text*,
        https://arxiv.org/abs/1606.05250, section 6.1; Rajpurkar, Jia & Liang 2018, https://arxiv.org/abs/1806.03822.

    Example:
        >>> span_scores(["the red cat"], [["Red cat!", "it"]])
        {'f1': array([1.]), 'exact_match': array([1.])}
    """
    if not predictions or len(predictions) != len(answers):
        raise LmcompressError(
            f"each question must have a prediction and answers, got {len(predictions)} and {len(answers)}"
        )
    f1, exact = [], []
    for predicted, truths in zip(predictions, answers, strict=True):
        said = _words(predicted)
        right = [words for truth in truths if (words := _words(truth))] or [[]]
        exact.append(float(said in right))
        f1.append(max(_f1(said, words) for words in right))
    return {"f1": np.asarray(f1), "exact_match": np.asarray(exact)}


def _spans_of(scores: Array, offsets: Array, context: str, n_best: int, max_tokens: int) -> list[Candidate]:
    inside = np.flatnonzero(offsets[:, 0] >= 0)
    starts, ends = (inside[np.argsort(-scores[inside, side], kind="stable")[:n_best]] for side in (0, 1))
    sums = scores[starts, 0][:, None] + scores[ends, 1][None]
    lengths = ends[None] - starts[:, None] + 1
    sums = np.where((lengths >= 1) & (lengths <= max_tokens), sums, -np.inf)
    best = np.argsort(-sums, axis=None, kind="stable")[:n_best]
    candidates = []
    for first, last in zip(*np.unravel_index(best, sums.shape), strict=True):
        if np.isfinite(sums[first, last]):
            begin, end = int(offsets[starts[first], 0]), int(offsets[ends[last], 1])
            candidates.append(Candidate(context[begin:end], float(sums[first, last]), begin))
    return candidates


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(said: list[str], right: list[str]) -> float:
    if not said or not right:
        return float(said == right)
    common = sum((Counter(said) & Counter(right)).values())
    return 2 * common / (len(said) + len(right))
