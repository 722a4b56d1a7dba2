"""Criteria: their definitions by other means, their ranges, and what they refuse."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lmcompress.errors import LmcompressError
from lmcompress.pruning.structured import criteria


@pytest.mark.parametrize("norm, order", [(criteria.l1_norm, 1), (criteria.l2_norm, 2)], ids=["l1", "l2"])
def test_norms_are_those_of_numpy(norm, order):
    group = torch.randn(5, 7)
    np.testing.assert_allclose(norm(group), np.linalg.norm(group.numpy(), ord=order, axis=1), rtol=1e-5)


def test_taylor_takes_the_absolute_value_of_each_example():
    gradient = torch.tensor([[1.0, 2.0], [-1.0, 2.0]])
    assert criteria.taylor_gates(gradient).mean(0).tolist() == [1.0, 2.0]


def test_fisher_is_the_saliency_of_optimal_brain_damage_for_a_quadratic_loss():
    # E = h (m - 1)^2 / 2 per example with random pulls: deleting m = 1 costs h / 2
    pulls = torch.randn(100_000, 1) * 3
    torch.testing.assert_close(criteria.fisher(pulls).mean(0), torch.tensor([9 / 2]), rtol=0.02, atol=0)


def test_movement_is_positive_where_a_gradient_step_makes_weights_larger():
    weight = torch.tensor([[1.0, -2.0]], requires_grad=True)
    (weight * torch.tensor([[-1.0, 1.0]])).sum().backward()
    assert criteria.movement((weight * weight.grad).sum(-1)).item() > 0
    stepped = weight.detach() - 0.1 * weight.grad
    assert stepped.norm() > weight.norm()


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_apoz_counts_what_is_within_epsilon(epsilon):
    activations = torch.relu(torch.randn(50, 6))
    expected = [(np.abs(column) <= epsilon).mean() for column in activations.numpy().T]
    np.testing.assert_allclose(criteria.apoz(activations, epsilon=epsilon), expected, rtol=1e-6)


def test_activation_entropy_is_that_of_a_histogram():
    pooled = torch.randn(300, 4)
    expected = [stats.entropy(np.histogram(column, bins=20)[0]) for column in pooled.numpy().astype(np.float64).T]
    np.testing.assert_allclose(criteria.activation_entropy(pooled, bins=20), expected, rtol=1e-5)


def test_activation_entropy_does_not_see_scale_and_offset():
    pooled = torch.randn(64, 3, dtype=torch.float64)
    torch.testing.assert_close(criteria.activation_entropy(pooled * 8 + 3), criteria.activation_entropy(pooled))


def test_activation_entropy_refuses_one_example():
    with pytest.raises(LmcompressError, match=r"at least 2 bins and 2 examples, got 100 and 1"):
        criteria.activation_entropy(torch.randn(1, 3))


@pytest.mark.parametrize("causal", [False, True])
def test_even_attention_has_entropy_one_and_focused_attention_zero(causal):
    mask = torch.tensor([[True, True, True, False]])
    allowed = (torch.ones(4, 4).tril() if causal else torch.ones(4, 4)) * mask.float()
    even = allowed / allowed.sum(-1, keepdim=True)
    focused = torch.zeros(4, 4)
    focused[:, 0] = 1
    summed = criteria.attention_entropy(torch.stack([even, focused])[None], mask, causal=causal)
    queries = 2 if causal else 3
    torch.testing.assert_close(summed, torch.tensor([[queries, 0, queries]], dtype=torch.float64))


def test_wanda_is_the_greatest_change_that_a_weight_can_stand_for():
    weight, inputs = torch.randn(3, 4), torch.randn(10, 4)
    scores = criteria.wanda(weight, inputs.norm(dim=0))
    for i in range(4):
        # what input i adds to the output, as a norm over tokens
        torch.testing.assert_close(scores[:, i], (inputs[:, i, None] * weight[:, i]).norm(dim=0))


def test_block_influence_is_zero_for_a_block_that_only_scales():
    x = torch.randn(5, 8)
    torch.testing.assert_close(criteria.block_influence(x, 3 * x), torch.zeros(5), atol=1e-7, rtol=0)
    torch.testing.assert_close(criteria.block_influence(x, -x), torch.full((5,), 2.0))


def test_block_influence_tells_near_blocks_apart():
    x = torch.randn(4, 64)
    noise = torch.randn(4, 64)
    little, less = (criteria.block_influence(x, x + size * noise) for size in (1e-4, 1e-5))
    assert (little > less).all() and (less > 0).all()


def test_random_scores_are_the_same_for_a_seed():
    one, two = (criteria.random_scores(9, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two) and len(one.unique()) == 9


def test_normalized_by_layer_has_norm_one_and_zeros_stay():
    assert math.isclose(float(criteria.normalize_by_layer(torch.rand(7)).norm()), 1, rel_tol=1e-6)
    assert not criteria.normalize_by_layer(torch.zeros(3)).any()
