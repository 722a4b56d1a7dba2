"""Weight quantizers whose scale is computed from the weights: LAQ, TWN, TBT and binary."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError
from lmcompress.numerics.grids import (
    BINARY_GRID,
    PER_TENSOR,
    Bits,
    Granularity,
    Grid,
    check_bits,
    max_abs,
    mean_abs,
    symmetric_grid,
)
from lmcompress.numerics.quantizers.base import TERNARY, WITH_ZERO, Quantized, from_levels, nearest_levels


def laq(
    weight: Tensor,
    state: None = None,
    *,
    bits: Bits,
    granularity: Granularity = PER_TENSOR,
    curvature: Tensor | None = None,
    iterations: int = 10,
) -> Quantized:
    r"""Loss-aware quantization: scale and codes of least (weighted) squared error, by alternating minimization.

    .. math:: \min_{\alpha, b} \sum_i d_i (w_i - \alpha b_i)^2: \quad
        b = Q(w / \alpha), \quad \alpha = \frac{\sum_i d_i b_i w_i}{\sum_i d_i b_i^2}

    from :math:`b = \mathrm{sign}(w)`, until α changes by less than a thousandth. At 1 bit the first step is enough.
    From 3 bits on, where ten iterations from there do not converge, they start at the best of eight between mean and
    largest magnitude. The gradient passes straight through.

    Args:
        weight: any shape, floating.
        state: unused.
        bits: 1, 2, 3, 4, 8 or ``"ternary"``.
        granularity: which weights share a scale.
        curvature: d, ``weight``'s shape, >= 0, such as the square root of Adam's second moments; ``None`` is 1
            everywhere, as in the public code.
        iterations: maximum number of alternations of scale and codes.

    Returns:
        Values and codes.

    Raises:
        LmcompressError: If bits are not supported, the curvature has another shape or is negative, or the group size
            does not divide the rows.

    Note:
        The public code (BinaryBERT's) divides by Σ d\|b\|. Where codes are only -1, 0 and 1 that is the same; with more
        levels it is not a least-squares solution, and α shrinks with every iteration.

    Reference:
        Hou & Kwok, *Loss-aware Weight Quantization of Deep Networks*, ICLR 2018, https://arxiv.org/abs/1802.08635,
        section 3; 1 bit: Hou, Yao & Kwok, *Loss-aware Binarization of Deep Networks*, ICLR 2017,
        https://arxiv.org/abs/1611.01600.

    Example:
        >>> laq(torch.tensor([[2.0, -4.0, 0.5]]), bits=2).values
        tensor([[ 3., -3.,  0.]])
    """
    check_bits(bits, (1, *WITH_ZERO))
    grid = BINARY_GRID if bits == 1 else symmetric_grid(bits)
    split = granularity.split(weight.float())
    w, d = split.detach(), None if curvature is None else _curvature(curvature, weight, granularity)
    axes = granularity.axes(w.dim())

    def total(x: Tensor) -> Tensor:
        return (x if d is None else d * x).sum(dim=axes, keepdim=True)

    # for rows of zeros, or empty ones, the mean is NaN; their scale is 0
    alpha = (total(w.abs()) / total(torch.ones_like(w))).nan_to_num(nan=0.0)
    if grid.levels > 3:
        alpha = _best_start(w, alpha, granularity.spread(max_abs(weight, granularity), weight.shape), grid, total)
    for _ in range(0 if bits == 1 else iterations):
        b = nearest_levels(w, alpha / grid.high, grid)
        square = total(b.square())
        better = torch.where(square > 0, total(b * w) / square * grid.high, alpha)
        converged = bool(((better - alpha).abs() <= 1e-3 * alpha).all())
        alpha = better
        if converged:
            break
    return from_levels(weight, split, nearest_levels(w, alpha / grid.high, grid), alpha / grid.high, grid, granularity)


def twn(
    weight: Tensor, state: None = None, *, bits: Bits = "ternary", granularity: Granularity = PER_TENSOR
) -> Quantized:
    r"""Ternary weight networks: a threshold at 0.7 times the mean magnitude, and the mean of the magnitudes above it.

    .. math:: \Delta = 0.7\, \mathrm{mean}|w|, \quad \alpha = \mathrm{mean}\{|w_i| : |w_i| > \Delta\}, \quad
        w_q \in \{-\alpha, 0, \alpha\}

    The gradient passes straight through.

    Args:
        weight: any shape, floating.
        state: unused.
        bits: ``"ternary"``, or 2, which is the same.
        granularity: which weights share threshold and scale.

    Returns:
        Values and codes.

    Raises:
        LmcompressError: If bits are not supported, or the group size does not divide the rows.

    Reference:
        Li, Zhang & Liu, *Ternary Weight Networks*, 2016, https://arxiv.org/abs/1605.04711, section 2.

    Example:
        >>> twn(torch.tensor([[2.0, -4.0, 0.0]])).values
        tensor([[ 3., -3.,  0.]])
    """
    check_bits(bits, TERNARY)
    split = granularity.split(weight.float())
    w = split.detach()
    threshold = granularity.spread(0.7 * mean_abs(w.reshape(weight.shape), granularity), weight.shape)
    # NaN satisfies neither condition; it must not turn into a 0
    levels = torch.where(w.isnan(), w, (w > threshold).float() - (w < -threshold).float())
    axes = granularity.axes(w.dim())
    count = levels.abs().sum(dim=axes, keepdim=True)
    scale = (levels * w).sum(dim=axes, keepdim=True) / count.clamp(min=1)
    return from_levels(weight, split, levels, scale, symmetric_grid("ternary"), granularity)


def tbt(
    weight: Tensor, state: None = None, *, bits: Bits = "ternary", granularity: Granularity = PER_TENSOR
) -> Quantized:
    r"""Ternary with a scale of 4/3 of the mean magnitude, without learned state.

    .. math:: w_q = \alpha \cdot \mathrm{round}(\mathrm{clip}(w / \alpha, -1, 1)), \quad
        \alpha = \tfrac{4}{3}\, \mathrm{mean}|w|

    so thresholds are at 2/3 of the mean: those of least squared error for uniformly distributed weights. The
    gradient passes straight through.

    Args:
        weight: any shape, floating.
        state: unused.
        bits: ``"ternary"``, or 2, which is the same.
        granularity: which weights share a scale; the paper's is :class:`PerRow`.

    Returns:
        Values and codes.

    Raises:
        LmcompressError: If bits are not supported, or the group size does not divide the rows.

    Reference:
        Liu, Oguz, Pappu, Shi & Krishnamoorthi, *Binary and Ternary Natural Language Generation*, ACL 2023,
        https://arxiv.org/abs/2306.01841, and the authors' code,
        https://github.com/facebookresearch/Ternary_Binary_Transformer.

    Example:
        >>> tbt(torch.tensor([[1.5, -0.625, 0.125]])).values  # mean magnitude 3/4
        tensor([[ 1., -1.,  0.]])
    """
    check_bits(bits, TERNARY)
    grid = symmetric_grid("ternary")
    split = granularity.split(weight.float())
    scale = granularity.spread(mean_abs(weight, granularity) * (4 / 3), weight.shape)
    return from_levels(weight, split, nearest_levels(split.detach(), scale, grid), scale, grid, granularity)


def binary(weight: Tensor, state: None = None, *, bits: Bits = 1, granularity: Granularity = PER_TENSOR) -> Quantized:
    r"""The sign times the mean magnitude, the scale of least squared error. The gradient passes straight through.

    Args:
        weight: any shape, floating; 0 counts as positive.
        state: unused.
        bits: 1.
        granularity: which weights share a scale.

    Returns:
        Values and codes.

    Raises:
        LmcompressError: If bits are not supported, or the group size does not divide the rows.

    Reference:
        Rastegari, Ordonez, Redmon & Farhadi, *XNOR-Net*, ECCV 2016, https://arxiv.org/abs/1603.05279, section 3.1.

    Example:
        >>> binary(torch.tensor([[1.0, -3.0]])).values
        tensor([[ 2., -2.]])
    """
    check_bits(bits, (1,))
    split = granularity.split(weight.float())
    scale = granularity.spread(mean_abs(weight, granularity), weight.shape)
    return from_levels(
        weight, split, nearest_levels(split.detach(), scale, BINARY_GRID), scale, BINARY_GRID, granularity
    )


def _best_start(w: Tensor, low: Tensor, high: Tensor, grid: Grid, total: Callable[[Tensor], Tensor]) -> Tensor:
    """The clip of least error among eight, logarithmically spaced from ``low`` to ``high``."""
    best, least = low, torch.full_like(low, torch.inf)
    for step in range(8):
        alpha = low ** (1 - step / 7) * high ** (step / 7)
        now = total((nearest_levels(w, alpha / grid.high, grid) * (alpha / grid.high) - w).square())
        best, least = torch.where(now < least, alpha, best), torch.minimum(now, least)
    return best


def _curvature(curvature: Tensor, weight: Tensor, granularity: Granularity) -> Tensor:
    if curvature.shape != weight.shape:
        raise LmcompressError(
            f"the curvature must have the weight's shape {tuple(weight.shape)}, got {tuple(curvature.shape)}"
        )
    if not bool((curvature >= 0).all()):
        raise LmcompressError(
            f"the curvature must be >= 0 everywhere, got one of {float(curvature.min())}; take the square root of "
            "Adam's second moments"
        )
    return granularity.split(curvature.detach().float())
