"""spans: answers out of logits against a search over all spans, SQuAD's metrics against their definition."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from datasets import Dataset

from lmcompress.data.windows import Windows
from lmcompress.errors import LmcompressError
from lmcompress.evaluation import answer_candidates, span_scores

CONTEXT = "a b c d e f g h"


def window(first, last, question_tokens=2):
    """Offsets of a window with the context's words from ``first`` to ``last``."""
    outside = [[-1, -1]] * question_tokens
    return np.array([*outside, *([2 * i, 2 * i + 1] for i in range(first, last + 1)), [-1, -1]])


@pytest.fixture
def two_windows():
    offsets = [window(0, 4), window(3, 7)]
    return Windows(Dataset.from_dict({}), np.zeros(2, np.int64), offsets, np.zeros(2, np.int64), [CONTEXT])


def all_spans(logits, offsets, max_tokens):
    for scores, places in zip(logits, offsets, strict=True):
        inside = [i for i, (begin, _) in enumerate(places) if begin >= 0]
        for i, j in itertools.product(inside, inside):
            if 0 <= j - i < max_tokens:
                yield float(scores[i, 0] + scores[j, 1]), CONTEXT[places[i][0] : places[j][1]]


@pytest.mark.parametrize("max_tokens", [1, 3, 30])
def test_candidates_are_the_best_of_all_spans_of_all_windows(two_windows, max_tokens):
    drawn = np.random.default_rng(max_tokens)
    logits = [drawn.normal(size=offsets.shape).astype(np.float32) for offsets in two_windows.offsets]
    expected = sorted(all_spans(logits, two_windows.offsets, max_tokens), reverse=True)[:5]
    wide = answer_candidates(logits, two_windows, n_best=50, max_tokens=max_tokens)[0]
    assert [one.text for one in wide[:5]] == [text for _, text in expected]
    np.testing.assert_allclose([one.score for one in wide[:5]], [score for score, _ in expected], rtol=1e-6)
    assert all(CONTEXT[one.start :].startswith(one.text) for one in wide)


def test_no_answer_has_the_least_score_of_all_windows_and_must_be_allowed(two_windows):
    logits = [np.zeros(offsets.shape) for offsets in two_windows.offsets]
    logits[0][0], logits[1][0] = [5.0, 5.0], [1.0, 2.0]
    assert answer_candidates(logits, two_windows)[0][0].text != ""
    best = answer_candidates(logits, two_windows, none_allowed=True)[0][0]
    assert (best.text, best.score) == ("", 3.0)
    logits[1][0] = -1.0
    assert answer_candidates(logits, two_windows, none_allowed=True)[0][0].text != ""


def _normal(text):
    """As the official script writes it."""
    text = "".join(c for c in text.lower() if c not in set("""!"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"""))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _official(predicted, truths):
    truths = [truth for truth in truths if _normal(truth)] or [""]
    exact = max(int(_normal(predicted) == _normal(truth)) for truth in truths)
    scores = []
    for truth in truths:
        said, right = _normal(predicted).split(), _normal(truth).split()
        left, same = list(right), 0
        for word in said:
            if word in left:
                left.remove(word)
                same += 1
        if not said or not right:
            scores.append(float(said == right))
        elif not same:
            scores.append(0.0)
        else:
            precision, recall = same / len(said), same / len(right)
            scores.append(2 * precision * recall / (precision + recall))
    return max(scores), exact


def test_scores_are_those_of_the_official_script():
    drawn = np.random.default_rng(0)
    words = ["the", "a", "Cat", "cat.", "dog", "U.S.", "red-", "an", "1,000", "!"]

    def text():
        return " ".join(drawn.choice(words, size=drawn.integers(0, 5)))

    predictions = [text() for _ in range(300)]
    answers = [[text() for _ in range(drawn.integers(0, 4))] for _ in range(300)]
    found = span_scores(predictions, answers)
    expected = np.array([_official(*each) for each in zip(predictions, answers, strict=True)])
    np.testing.assert_allclose(found["f1"], expected[:, 0])
    np.testing.assert_array_equal(found["exact_match"], expected[:, 1])
    assert 0 < found["exact_match"].mean() < found["f1"].mean() < 1


def test_what_does_not_agree_is_refused(two_windows):
    good = [np.zeros(offsets.shape) for offsets in two_windows.offsets]
    with pytest.raises(LmcompressError, match="each window must have logits, got 1 for 2 windows"):
        answer_candidates(good[:1], two_windows)
    with pytest.raises(LmcompressError, match=r"logits of a window must have shape \(8, 2\), got \(7, 2\)"):
        answer_candidates([good[0], good[1][:-1]], two_windows)
    with pytest.raises(LmcompressError, match="logits contain nan"):
        answer_candidates([good[0], good[1] * np.nan], two_windows)
    with pytest.raises(LmcompressError, match="each question must have a prediction and answers, got 1 and 2"):
        span_scores(["a"], [["a"], ["b"]])
