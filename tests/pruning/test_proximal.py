"""Norms of groups, and the proximal step of the group lasso."""

from __future__ import annotations

import pytest
import torch

from lmcompress import LmcompressError
from lmcompress.pruning.proximal import group_norms, proximal_factor


def test_norms_of_groups_reach_over_tensors():
    torch.manual_seed(0)
    one, other = torch.randn(5, 3, 2), torch.randn(4, 5).t()
    expected = [torch.cat([one[i].flatten(), other[i]]).norm() for i in range(5)]
    torch.testing.assert_close(group_norms([one, other]), torch.stack(expected))
    with pytest.raises(LmcompressError, match="one first axis"):
        group_norms([torch.zeros(2, 3), torch.zeros(3)])


def test_the_proximal_step_minimises_its_objective():
    # prox(v) = argmin_w 1/2 |w - v|² + t |w|, found here by brute force on the ray through v
    norms = torch.tensor([0.0, 0.3, 0.5, 2.0, 7.0])
    factors = proximal_factor(norms, 0.5)
    candidates = torch.linspace(0, 1, 100001, dtype=torch.float64)
    for norm, factor in zip(norms, factors, strict=True):
        objective = 0.5 * (norm * (candidates - 1)) ** 2 + 0.5 * norm * candidates
        if norm > 0:
            assert float(factor) == pytest.approx(float(candidates[objective.argmin()]), abs=1e-4)
    assert (factors[norms <= 0.5] == 0).all()
    with pytest.raises(LmcompressError, match="must be >= 0, got -1"):
        proximal_factor(norms, -1.0)
