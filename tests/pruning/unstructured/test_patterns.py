"""Masks: exact numbers, ties, and what does not divide."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lmcompress import LmcompressError
from lmcompress.pruning.unstructured.patterns import (
    Blocks,
    NOfM,
    Unstructured,
    block_scores,
    expand_blocks,
    keep_in_rows,
    keep_largest,
    keep_n_of_m,
    masks_of,
)


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=4),
    st.integers(0, 100),
    st.integers(1, 4),
    st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_exactly_as_many_stay_and_none_that_goes_is_greater(shapes, percent, values, seed):
    # few different values: ties everywhere
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randint(-values, values + 1, shape, generator=generator).float() for shape in shapes]
    total = sum(one.numel() for one in scores)
    keep = total * percent // 100
    masks = keep_largest(scores, keep)
    assert sum(int(mask.sum()) for mask in masks) == keep
    flat = torch.cat([one.reshape(-1) for one in scores])
    kept = torch.cat([mask.reshape(-1) for mask in masks])
    # an independent implementation: a stable sort
    order = torch.argsort(flat, descending=True, stable=True)[:keep]
    expected = torch.zeros(total, dtype=torch.bool)
    expected[order] = True
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("keep, stays", [(0, False), (6, True), (9, True)])
def test_all_or_nothing_may_stay(keep, stays):
    (mask,) = keep_largest([torch.randn(2, 3)], keep)
    assert (mask == stays).all()


def test_equal_scores_go_from_the_end():
    (mask,) = keep_largest([torch.ones(2, 4)], 3)
    assert mask.reshape(-1).tolist() == [True] * 3 + [False] * 5
    assert keep_n_of_m(torch.zeros(2, 8), 1, 4).tolist() == [[True, False, False, False] * 2] * 2


@pytest.mark.parametrize("choose", [lambda s: keep_largest([s], 2), lambda s: keep_in_rows(s, 1)])
def test_scores_that_are_nan_are_refused(choose):
    with pytest.raises(LmcompressError, match="must be numbers, got NaN"):
        choose(torch.tensor([[1.0, float("nan")], [2.0, 0.0]]))


def test_infinite_scores_are_ranked():
    (mask,) = keep_largest([torch.tensor([float("inf"), 1.0, -float("inf")])], 2)
    assert mask.tolist() == [True, True, False]


@pytest.mark.parametrize("n, m", [(1, 2), (2, 4), (4, 4), (3, 8)])
def test_of_every_m_neighbours_the_n_greatest_stay(n, m):
    scores = torch.randn(5, 16)
    mask = keep_n_of_m(scores, n, m)
    groups, kept = scores.reshape(-1, m), mask.reshape(-1, m)
    assert (kept.sum(1) == n).all()
    for values, stays in zip(groups, kept, strict=True):
        if n < m:
            assert values[stays].min() >= values[~stays].max()


def test_groups_that_do_not_divide_and_more_than_there_are_are_refused():
    with pytest.raises(LmcompressError, match=r"m must divide the inputs of a matrix, got 4 for \(3, 6\)"):
        keep_n_of_m(torch.randn(3, 6), 2, 4)
    with pytest.raises(LmcompressError, match="n must be at most m, got 5:4"):
        keep_n_of_m(torch.randn(3, 8), 5, 4)
    with pytest.raises(ValidationError, match="n must be at most m, got 3:2"):
        NOfM(n=3, m=2)
    with pytest.raises(LmcompressError, match="blocks must divide a matrix, got 2 × 3 for 4 × 4"):
        block_scores(torch.randn(4, 4), 2, 3)
    with pytest.raises(LmcompressError, match="0 to 3 of 3 weights of a row can be kept, got 4"):
        keep_in_rows(torch.randn(2, 3), 4)
    with pytest.raises(LmcompressError, match="at least 0, got -1"):
        keep_largest([torch.randn(2)], -1)
    with pytest.raises(LmcompressError, match=r"sparsity must be in \[0, 1\], got 1.5"):
        masks_of([torch.randn(2, 2)], 1.5, Unstructured())


def test_blocks_go_and_stay_whole():
    scores = torch.rand(8, 12)
    (mask,) = masks_of([scores], 0.5, Blocks(rows=2, columns=3))
    blocks = mask.reshape(4, 2, 4, 3).permute(0, 2, 1, 3).reshape(16, 6)
    assert set(blocks.sum(1).tolist()) == {0, 6} and int(mask.sum()) == 48
    sums = block_scores(scores, 2, 3)
    assert sums[mask[::2, ::3]].min() >= sums[~mask[::2, ::3]].max()
    assert torch.equal(expand_blocks(mask[::2, ::3], 2, 3), mask)


def test_n_of_m_goes_from_all_to_n_along_the_way():
    scores = torch.rand(2, 8)
    kept = [int(masks_of([scores], share, NOfM(n=2, m=4))[0].sum()) for share in (0.0, 0.5, 1.0)]
    assert kept == [16, 12, 8]


def test_matrices_compared_with_one_another_lose_what_is_least_in_all():
    small, large = torch.rand(4, 4), torch.rand(4, 4) + 2
    masks = masks_of([small, large], 0.5, Unstructured())
    assert not masks[0].any() and masks[1].all()
