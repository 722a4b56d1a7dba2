"""Zeros whose error others make good, against least squares and by brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given as cases
from hypothesis import settings
from hypothesis import strategies as st

from lmcompress import LmcompressError
from lmcompress.activations.hessian import output_error
from lmcompress.pruning.unstructured.compensation import choosing, compensate, given
from lmcompress.pruning.unstructured.patterns import Blocks, NOfM, Unstructured, masks_of


def correlated(columns, count=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    return torch.randn(count, columns, generator=generator) @ mixing


@cases(st.integers(1, 5), st.integers(2, 24), st.floats(0, 1), st.integers(0, 10**6), st.sampled_from([1, 3, 8, 128]))
@settings(max_examples=40, deadline=None)
def test_a_mask_with_compensation_is_never_worse_than_without(rows, columns, share, seed, block):
    x = correlated(columns, seed=seed)
    hessian = x.T @ x
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1))
    mask = masks_of([weight.abs()], share, Unstructured())[0]
    values, kept = compensate(weight, hessian, given(mask), block_size=block)
    assert torch.equal(kept, mask) and (values[~mask] == 0).all()
    after, before = output_error(weight, values, hessian), output_error(weight, weight * mask, hessian)
    # up to the rounding of what is stored in float32
    assert (after <= before * (1 + 1e-5) + 1e-6 * output_error(weight, torch.zeros_like(weight), hessian)).all()


@pytest.mark.parametrize("block", [1, 4, 128])
def test_with_the_first_columns_gone_the_rest_is_their_least_squares_fit(block):
    # what is removed comes first, so that all that stays may still move
    x, weight = correlated(10).double(), torch.randn(3, 10, dtype=torch.float64)
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[:, :4] = False
    values, _ = compensate(weight, x.T @ x, given(mask), damping=1e-9, block_size=block)
    expected = torch.linalg.lstsq(x[:, 4:], x @ weight.T).solution.T
    torch.testing.assert_close(values[:, 4:].double(), expected, rtol=1e-4, atol=1e-5)


def test_scores_are_what_removing_one_weight_costs():
    # optimal brain surgeon: the least increase of the error with this weight at 0 and those after it free
    x, weight = correlated(5).double(), torch.randn(1, 5, dtype=torch.float64)
    seen = []

    def look(scores, first):
        seen.append(scores)
        return torch.ones_like(scores, dtype=torch.bool)

    compensate(weight, x.T @ x, look, damping=1e-12)
    for index in range(5):
        free = list(range(index + 1, 5))
        target = weight[0, index] * x[:, index]
        fit = torch.linalg.lstsq(x[:, free], target[:, None]).solution if free else torch.zeros(0, 1).double()
        error = (target - (x[:, free] @ fit)[:, 0]).square().sum()
        assert float(seen[0][0, index]) == pytest.approx(float(error), rel=1e-4)


def test_one_of_two_chosen_by_cost_is_the_best_of_all_choices_where_inputs_are_alone():
    x = correlated(2, seed=3)
    hessian, weight = x.T @ x, torch.tensor([[1.0, 1.0], [0.2, -2.0], [3.0, 0.1]])
    choice, size = choosing(1.0, NOfM(n=1, m=2))
    values, mask = compensate(weight, hessian, choice, block_size=size, damping=1e-9)
    for row in range(3):
        errors = []
        for gone in range(2):
            other = 1 - gone
            fit = weight[row, other] + weight[row, gone] * hessian[gone, other] / hessian[other, other]
            candidate = torch.zeros(2)
            candidate[other] = fit
            errors.append(float(output_error(weight[row : row + 1], candidate[None], hessian)))
        # the second column cannot hand its error back to the first, so it is never worse than twice the best
        found = float(output_error(weight[row : row + 1], values[row : row + 1], hessian))
        assert found >= min(errors) * (1 - 1e-4)
        assert int(mask[row].sum()) == 1


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 0.5, 0.9])
def test_shares_are_exact_over_all_blocks(share):
    x, weight = correlated(300, count=900), torch.randn(7, 300)
    choice, size = choosing(share, Unstructured())
    values, mask = compensate(weight, x.T @ x, choice, block_size=size)
    assert int((~mask).sum()) == round(share * weight.numel()) == int((values == 0).sum())
    magnitude = masks_of([weight.abs()], share, Unstructured())[0]
    errors = [float(output_error(weight, v, x.T @ x).sum()) for v in (values, weight * magnitude)]
    # a greedy choice promises nothing where nearly all goes
    assert errors[0] < errors[1] or share in (0.0, 0.9)


def test_blocks_and_what_is_gone_already():
    x, weight = correlated(24), torch.randn(8, 24)
    choice, size = choosing(0.5, Blocks(rows=2, columns=3))
    _, mask = compensate(weight, x.T @ x, choice, block_size=size)
    whole = mask.reshape(4, 2, 8, 3).permute(0, 2, 1, 3).reshape(-1, 6)
    assert set(whole.sum(1).tolist()) == {0, 6} and size % 3 == 0
    gone = torch.rand(8, 24) < 0.2
    choice, size = choosing(0.5, Unstructured(), ~gone)
    values, mask = compensate(weight * ~gone, x.T @ x, choice, block_size=size)
    assert int(mask.sum()) == 96 and not mask[gone].any() and (values[gone] == 0).all()


def test_half_precision_and_dead_inputs_are_no_trouble():
    x, weight = correlated(6), torch.randn(4, 6)
    x[:, 2] = 0
    choice, size = choosing(0.5, Unstructured())
    values, mask = compensate(weight.bfloat16(), x.T @ x, choice, block_size=size)
    assert values.dtype == torch.float32 and values.isfinite().all() and int(mask.sum()) == 12
    assert not mask[:, 2].all(), "weights that nothing reaches cost least"


def test_bad_input_is_named():
    weight = torch.randn(2, 3)
    for hessian, message in (
        (torch.eye(2), r"must have shape \(in, in\) for a weight \(out, in\), got \(2, 2\) for \(2, 3\)"),
        (torch.full((3, 3), float("nan")), "must be finite"),
        (torch.zeros(3, 3), "inputs that are not all 0"),
    ):
        with pytest.raises(LmcompressError, match=message):
            compensate(weight, hessian, given(torch.ones(2, 3, dtype=torch.bool)))
    for option in ({"damping": 0.0}, {"block_size": 0}):
        with pytest.raises(LmcompressError, match=f"{next(iter(option)).split('_')[0]}.* must be"):
            compensate(weight, torch.eye(3), given(torch.ones(2, 3, dtype=torch.bool)), **option)
    assert list(itertools.chain.from_iterable(compensate(torch.zeros(0, 3), torch.eye(3), given(weight > 9)))) == []
