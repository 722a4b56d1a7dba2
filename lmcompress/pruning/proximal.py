"""Group-lasso penalties that make groups of weights exactly zero: norms, the proximal step, and penalty control."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError

STEER_EVERY = 10
"""Optimizer steps between two corrections of a penalty that follows a target."""

_RATE = 0.25


def steering_factor(gap: float) -> float:
    """Multiplicative correction of a penalty whose effect should follow a target.

    A factor, so that the scale of the penalty does not matter; bounded, so that it cannot diverge between corrections.

    Args:
        gap: share that should be pruned by now and is not, of all that is to be pruned; negative if too much is.

    Returns:
        In [exp(-0.25), exp(0.25)].

    Example:
        >>> steering_factor(0.0), round(steering_factor(1.0), 3)
        (1.0, 1.284)
    """
    return math.exp(_RATE * max(-1.0, min(1.0, 5 * gap)))


def group_norms(views: Sequence[Tensor]) -> Tensor:
    """Norms of groups whose members are in several tensors.

    Args:
        views: tensors whose first axis is the group.

    Returns:
        ``(groups,)`` float32, the l2 norm of each group over all tensors.

    Raises:
        LmcompressError: If there is no tensor, or their numbers of groups differ.

    Example:
        >>> group_norms([torch.tensor([[3.0], [0.0]]), torch.tensor([4.0, 2.0])])
        tensor([5., 2.])
    """
    if not views or len({len(view) for view in views}) != 1:
        raise LmcompressError(
            f"views must be tensors with one first axis, the groups; got shapes {[tuple(v.shape) for v in views]}"
        )
    squares = [view.detach().float().square().reshape(len(view), -1).sum(1) for view in views]
    return torch.stack(squares).sum(0).sqrt()


def proximal_factor(norms: Tensor, threshold: float) -> Tensor:
    r"""The factor of a group in a proximal step of the group lasso: :math:`\max(0, 1 - t / \|w_g\|)`.

    Args:
        norms: ``(groups,)`` l2 norms.
        threshold: :math:`t = \eta \lambda \sqrt{|g|}`, >= 0.

    Returns:
        ``(groups,)`` in [0, 1]; exactly 0 if the norm is at most the threshold.

    Raises:
        LmcompressError: If the threshold is negative.

    Reference:
        Parikh & Boyd, *Proximal Algorithms*, 2014, section 6.5.1, for the penalty of Wen et al., *Learning Structured
        Sparsity in Deep Neural Networks*, 2016, https://arxiv.org/abs/1608.03665, equation 1. They take plain
        subgradient steps, which do not reach exact zeros; the factor :math:`\sqrt{|g|}` is that of Yuan & Lin 2006, so
        that large groups (heads) and small ones (neurons) are penalized equally.

    Example:
        >>> proximal_factor(torch.tensor([0.0, 1.0, 4.0]), 2.0)
        tensor([0.0000, 0.0000, 0.5000])
    """
    if not threshold >= 0:
        raise LmcompressError(f"the threshold of a proximal step must be >= 0, got {threshold}")
    safe = norms.float().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(norms > threshold, (1 - threshold / safe).clamp(min=0.0), torch.zeros_like(safe))
