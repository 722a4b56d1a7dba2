"""embeddings: metrics of similarity and retrieval against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from lmcompress.errors import LmcompressError
from lmcompress.evaluation import cosine_similarities, mean_ndcg, similarity_metrics


def test_similarity_is_the_rank_correlation_of_cosines():
    drawn = np.random.default_rng(0)
    first, second, ratings = drawn.normal(size=(20, 4)), drawn.normal(size=(20, 4)), drawn.uniform(0, 5, size=20)
    cosines = [float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b)) for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(cosine_similarities(first, second), cosines)
    found = similarity_metrics(first, second, ratings)
    assert found["spearmanr"] == pytest.approx(spearmanr(cosines, ratings)[0])
    assert similarity_metrics(3 * first, second, 2 * ratings + 1)["spearmanr"] == pytest.approx(found["spearmanr"])
    assert cosine_similarities(np.zeros((1, 4)), first[:1]).tolist() == [0.0]


def _ndcg(scores, gains, k):
    def dcg(order):
        return sum(gains.get(doc, 0.0) / math.log2(place + 2) for place, doc in enumerate(order[:k]))

    ranked = sorted(range(len(scores)), key=lambda doc: -scores[doc])
    best = sorted(range(len(scores)), key=lambda doc: -gains.get(doc, 0.0))
    return dcg(ranked) / dcg(best)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_ndcg_is_the_mean_over_queries_with_relevant_documents(k):
    drawn = np.random.default_rng(k)
    scores = drawn.normal(size=(12, 15))
    relevant = [{int(d): float(drawn.integers(1, 4)) for d in drawn.choice(15, 3)} for _ in range(12)]
    relevant[4] = {}
    expected = [_ndcg(s, g, k) for s, g in zip(scores, relevant, strict=True) if g]
    assert mean_ndcg(scores, relevant, k) == pytest.approx(np.mean(expected))


def test_documents_that_were_not_scored_come_last():
    assert mean_ndcg([[-np.inf, -5.0, -np.inf]], [{1: 1.0}]) == 1.0
    assert mean_ndcg([[-5.0, -np.inf]], [{1: 1.0}]) == pytest.approx(1 / math.log2(3))


def test_what_does_not_agree_is_refused():
    with pytest.raises(LmcompressError, match=r"must have one shape \(rows, width\), got \(2, 3\) and \(3, 3\)"):
        cosine_similarities(np.ones((2, 3)), np.ones((3, 3)))
    with pytest.raises(LmcompressError, match=r"each query must have scores of all documents, got \(1, 2\) for 2"):
        mean_ndcg([[1.0, 2.0]], [{0: 1.0}, {0: 1.0}])
    with pytest.raises(LmcompressError, match="no query has a relevant document"):
        mean_ndcg([[1.0, 2.0]], [{}])
    with pytest.raises(LmcompressError, match="scores contain nan"):
        mean_ndcg([[np.nan, 2.0]], [{0: 1.0}])
