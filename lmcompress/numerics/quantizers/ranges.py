"""Ranges of uniform quantizers: percentiles, and least squared error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError
from lmcompress.numerics.grids import (
    PER_TENSOR,
    Bits,
    Granularity,
    Grid,
    check_bits,
    extremes,
    max_abs,
    reduced,
    symmetric_grid,
)
from lmcompress.numerics.quantizers.base import WITH_ZERO, check_finite
from lmcompress.numerics.quantizers.uniform import asymmetric

# numbers searched at once: these, their codes and the errors stay in a core's cache
_BLOCK = 1 << 19


def percentile_clip(
    weight: Tensor, *, bits: Bits | None = None, granularity: Granularity = PER_TENSOR, percentile: float = 99.9
) -> Tensor:
    """The ``percentile`` of the weights' magnitudes: a clip for :func:`symmetric`.

    Args:
        weight: any shape, floating.
        bits: unused, for a signature shared by all initial states.
        granularity: which weights share a clip.
        percentile: above 0, at most 100, which is the largest magnitude.

    Returns:
        ``granularity.scale_shape(weight.shape)`` float32.

    Raises:
        LmcompressError: If the percentile is out of range, weights are NaN or infinite, or the group size does not
            divide the rows.

    Reference:
        McKinstry et al., *Discovering Low-Precision Networks Close to Full-Precision Networks*, 2018,
        https://arxiv.org/abs/1809.04191.

    Example:
        >>> percentile_clip(torch.tensor([[1.0, -2.0, 3.0, 100.0]]), percentile=75)
        tensor([[3.]])
    """
    check_percentile(percentile)
    check_finite(weight)
    return _per_scale(weight, granularity, lambda rows: _rank(rows.abs(), percentile))


def mse_clip(weight: Tensor, *, bits: Bits, granularity: Granularity = PER_TENSOR) -> Tensor:
    """The clip of least squared error, for :func:`symmetric`.

    Tries shares of the largest magnitude from 1 down to 1/64, each 16 % below the last, until errors rise, then
    three on either side of the best, 4 % apart.

    Args:
        weight: any shape, floating.
        bits: 2, 3, 4, 8 or ``"ternary"``; a clip belongs to its bits.
        granularity: which weights share a clip.

    Returns:
        ``granularity.scale_shape(weight.shape)`` float32, never worse than the largest magnitude.

    Raises:
        LmcompressError: If bits are not supported, weights are NaN or infinite, or the group size does not divide the
            rows.

    Reference:
        Sung, Shin & Hwang, *Resiliency of Deep Neural Networks under Quantization*, 2015,
        https://arxiv.org/abs/1511.06488 (L2-error minimisation).
    """
    check_bits(bits, WITH_ZERO)
    check_finite(weight)
    grid = symmetric_grid(bits)
    if not weight.numel():
        return max_abs(weight, granularity)
    return torch.cat([_mse_clip(rows, grid, granularity) for rows in _blocks(weight, granularity)])


def percentile_limits(
    weight: Tensor, *, bits: Bits | None = None, granularity: Granularity = PER_TENSOR, percentile: float = 99.9
) -> Tensor:
    """A range for :func:`asymmetric` that excludes ``100 - percentile`` % of the weights, half below and half above.

    Args:
        weight: any shape, floating.
        bits: unused, for a signature shared by all initial states.
        granularity: which weights share a range.
        percentile: above 0, at most 100, which is minimum and maximum.

    Returns:
        ``(2, *granularity.scale_shape(weight.shape))`` float32.

    Raises:
        LmcompressError: If the percentile is out of range, weights are NaN or infinite, or the group size does not
            divide the rows.
    """
    check_percentile(percentile)
    check_finite(weight)
    each = 50 + percentile / 2
    low = _per_scale(weight, granularity, lambda rows: -_rank(-rows, each))
    return torch.stack([low, _per_scale(weight, granularity, lambda rows: _rank(rows, each))])


def mse_limits(weight: Tensor, *, bits: Bits, granularity: Granularity = PER_TENSOR) -> Tensor:
    """The range of least squared error for :func:`asymmetric`, among those that shrink both ends proportionally.

    Args:
        weight: any shape, floating.
        bits: 2, 3, 4, 8 or ``"ternary"``.
        granularity: which weights share a range.

    Returns:
        ``(2, *granularity.scale_shape(weight.shape))`` float32.

    Raises:
        LmcompressError: If bits are not supported, weights are NaN or infinite, or the group size does not divide the
            rows.
    """
    check_bits(bits, WITH_ZERO)
    check_finite(weight)
    if not weight.numel():
        return torch.stack(extremes(weight, granularity))
    return torch.cat([_mse_limits(rows, bits, granularity) for rows in _blocks(weight, granularity)], dim=1)


def search_shares(error: Callable[[Tensor], Tensor], ones: Tensor) -> Tensor:
    """For each scale the share of its range, in [1/64, 1], of least error.

    Args:
        error: ``shares -> errors``, tensors of the shape of ``ones``.
        ones: ones in the desired shape.

    Returns:
        The shares; 1 if no other is better.
    """
    best, least = ones, error(ones)
    for power in range(1, 25):
        now = error(ones * 2 ** (-power / 4))
        best, least = torch.where(now < least, ones * 2 ** (-power / 4), best), torch.minimum(now, least)
        # clipping errors grow as ranges shrink, and already exceed the whole error of the best
        if bool((now > 2 * least).all()):
            break
    coarse = best
    # a fourth step on either side would be a neighbour that was tried above
    for step in (-3, -2, -1, 1, 2, 3):
        shares = (coarse * 2 ** (step / 16)).clamp(max=1.0)
        if step > 0 and bool((shares == coarse).all()):
            break
        now = error(shares)
        best, least = torch.where(now < least, shares, best), torch.minimum(now, least)
    return best


def check_percentile(percentile: float) -> float:
    """A percentile, checked.

    Args:
        percentile: in per cent.

    Raises:
        LmcompressError: If it is not above 0 and at most 100.
    """
    if not 0 < percentile <= 100:
        raise LmcompressError(
            f"percentile must be above 0 and at most 100, got {percentile}; it is in per cent, so 99.9, not 0.999"
        )
    return percentile


def _blocks(weight: Tensor, granularity: Granularity) -> Sequence[Tensor]:
    """Blocks of rows that fit the cache, for a search that reads its weights some twenty times."""
    weight = weight.detach()
    if weight.dim() < 2 or granularity.scale_shape(weight.shape)[0] != len(weight):
        return [weight.float()]
    rows = max(1, _BLOCK * len(weight) // weight.numel())
    # a transposed view becomes contiguous block by block
    return [part.float().contiguous() for part in weight.split(rows)]


def _mse_clip(weight: Tensor, grid: Grid, granularity: Granularity) -> Tensor:
    greatest, split = max_abs(weight, granularity), granularity.split(weight)
    work = torch.empty_like(split)

    def error(share: Tensor) -> Tensor:
        scale = granularity.spread(greatest * share / grid.high, weight.shape)
        # the codes of nearest_levels, in memory that is used again
        torch.div(split, torch.where(scale > 0, scale, torch.inf), out=work)
        work.round_().clamp_(grid.low, grid.high).mul_(scale).sub_(split).square_()
        return work.mean(dim=granularity.axes(split.dim())).reshape(greatest.shape)

    return greatest * search_shares(error, torch.ones_like(greatest))


def _mse_limits(weight: Tensor, bits: Bits, granularity: Granularity) -> Tensor:
    limits = torch.stack(extremes(weight, granularity))

    def error(share: Tensor) -> Tensor:
        quantized = asymmetric(weight, limits * share, bits=bits, granularity=granularity)
        return reduced(quantized.values - weight, granularity, lambda split, axes: split.square().mean(dim=axes))

    return limits * search_shares(error, torch.ones_like(limits[0]))


def _per_scale(weight: Tensor, granularity: Granularity, f: Callable[[Tensor], Tensor]) -> Tensor:
    """A statistic ``(rows, numbers) -> (rows,)`` of the numbers that share a scale; 0 for empty groups."""
    shape = granularity.scale_shape(weight.shape)
    if weight.numel() == 0:
        return torch.zeros(shape, dtype=torch.float32, device=weight.device)
    return f(weight.detach().float().reshape(math.prod(shape), -1)).reshape(shape)


def _rank(rows: Tensor, percentile: float) -> Tensor:
    """The smallest number of each row that ``percentile`` % of it do not exceed."""
    # kthvalue and not quantile, which refuses more than 16 million numbers
    count = rows.shape[-1]
    # 99.9 / 100 * 1000 is slightly more than 999
    place = math.ceil(percentile * count / 100 - 1e-6)
    return rows.kthvalue(min(max(place, 1), count), dim=-1).values
