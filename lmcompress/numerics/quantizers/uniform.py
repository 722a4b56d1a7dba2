"""Evenly spaced levels over a range: the greatest magnitude, a percentile, or the range of the least squared error."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError
from lmcompress.numerics._straight_through import straight_through
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
    unsigned_grid,
)
from lmcompress.numerics.quantizers.base import (
    WITH_ZERO,
    Quantized,
    affine_levels,
    check_finite,
    check_state,
    clipped,
    nearest_levels,
)


def symmetric(
    weight: Tensor, clip: Tensor | None = None, *, bits: Bits, granularity: Granularity = PER_TENSOR
) -> Quantized:
    r"""Levels spaced evenly between ±α, which is the greatest magnitude now, or given.

    .. math:: w_q = s \cdot \mathrm{clip}(\mathrm{round}(w / s), -n, n), \quad s = \alpha / n, \quad n = 2^{b-1} - 1

    The gradient goes straight through, but for weights beyond a given clip. A clip is not learned: :func:`pact` learns.

    Args:
        weight: any shape, floating.
        clip: α, >= 0, such as :func:`percentile_clip` or :func:`mse_clip` gave it; ``None`` takes the greatest
            magnitude of this very weight (min-max).
        bits: 2, 3, 4, 8 or ``"ternary"``.
        granularity: which weights share a scale.

    Returns:
        Values and codes.

    Raises:
        LmcompressError: If bits are not supported, the clip has another shape, or the group size does not divide the
            rows.

    Reference:
        Zafrir, Boudoukh, Izsak & Wasserblat, *Q8BERT*, 2019, https://arxiv.org/abs/1910.06188, section 2.

    Example:
        >>> symmetric(torch.tensor([[0.25, -1.4, 3.5]]), bits=4).values
        tensor([[ 0.0000, -1.5000,  3.5000]])
    """
    check_bits(bits, WITH_ZERO)
    if clip is None:
        alpha, pass_outside = max_abs(weight, granularity), True
    else:
        alpha, pass_outside = check_state(clip, weight, granularity, "the clip").detach().float(), False
    return clipped(weight, alpha, symmetric_grid(bits), granularity, inside="rounding", pass_outside=pass_outside)


def percentile_clip(
    weight: Tensor, *, bits: Bits | None = None, granularity: Granularity = PER_TENSOR, percentile: float = 99.9
) -> Tensor:
    """The least of the weights' magnitudes that ``percentile`` % of them do not exceed: a clip for :func:`symmetric`.

    Args:
        weight: any shape, floating.
        bits: without effect, here so that all states are made alike.
        granularity: which weights share a clip.
        percentile: above 0, at most 100, which is the greatest magnitude.

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
    """The clip with the least squared error: for :func:`symmetric`.

    Looks at shares of the greatest magnitude from 1 down to 1/64, each 16 % below the last, until errors rise, then at
    four on either side of the best, 4 % apart.

    Args:
        weight: any shape, floating.
        bits: 2, 3, 4, 8 or ``"ternary"``; a clip belongs to its bits.
        granularity: which weights share a clip.

    Returns:
        ``granularity.scale_shape(weight.shape)`` float32, never worse than the greatest magnitude.

    Raises:
        LmcompressError: If bits are not supported, weights are NaN or infinite, or the group size does not divide the
            rows.

    Reference:
        Sung, Shin & Hwang, *Resiliency of Deep Neural Networks under Quantization*, 2015,
        https://arxiv.org/abs/1511.06488 (L2-error minimisation).
    """
    check_bits(bits, WITH_ZERO)
    check_finite(weight)
    greatest = max_abs(weight, granularity)
    grid, split = symmetric_grid(bits), granularity.split(weight.detach().float())

    def error(share: Tensor) -> Tensor:
        scale = granularity.spread(greatest * share / grid.high, weight.shape)
        difference = nearest_levels(split, scale, grid).mul_(scale).sub_(split).square_()
        return difference.mean(dim=granularity.axes(split.dim())).reshape(greatest.shape)

    return greatest * search_shares(error, torch.ones_like(greatest)) if weight.numel() else greatest


def asymmetric(
    weight: Tensor, limits: Tensor | None = None, *, bits: Bits, granularity: Granularity = PER_TENSOR
) -> Quantized:
    r"""Levels spaced evenly over a range that need not be centred, with a whole zero point.

    .. math:: w_q = s \cdot (\mathrm{clip}(\mathrm{round}(w / s) + z, 0, m) - z), \quad s = \frac{h - l}{m}, \quad
        z = \mathrm{round}(-l / s), \quad m = 2^b - 1

    The range is widened to hold 0, so that 0 stays 0 and matmuls need integers only. The gradient goes straight
    through, but for weights beyond a given range.

    Args:
        weight: any shape, floating.
        limits: ``(2, *granularity.scale_shape(weight.shape))``, l and h; ``None`` takes the least and greatest weight.
        bits: 2, 3, 4, 8 or ``"ternary"`` (three levels).
        granularity: which weights share a scale.

    Returns:
        Values, codes and zero points.

    Raises:
        LmcompressError: If bits are not supported, limits have another shape, or the group size does not divide the
            rows.

    Reference:
        Jacob et al., *Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference*,
        CVPR 2018, https://arxiv.org/abs/1712.05877, equation 1, section 3.

    Example:
        >>> asymmetric(torch.tensor([[-1.0, 0.1, 2.0]]), bits=2).values
        tensor([[-1.,  0.,  2.]])
    """
    check_bits(bits, WITH_ZERO)
    if limits is None:
        low, high = extremes(weight, granularity)
        return affine(weight, low, high, unsigned_grid(bits), granularity, cut=False)
    expected = (2, *granularity.scale_shape(weight.shape))
    if tuple(limits.shape) != expected:
        raise LmcompressError(
            f"limits of weights of shape {tuple(weight.shape)} must have shape {expected}, got {tuple(limits.shape)}"
        )
    low, high = limits.detach().float()
    return affine(weight, low, high, unsigned_grid(bits), granularity, cut=True)


def percentile_limits(
    weight: Tensor, *, bits: Bits | None = None, granularity: Granularity = PER_TENSOR, percentile: float = 99.9
) -> Tensor:
    """A range for :func:`asymmetric`: of ``100 - percentile`` % of the weights one half lies below, one half above.

    Args:
        weight: any shape, floating.
        bits: without effect, here so that all states are made alike.
        granularity: which weights share a range.
        percentile: above 0, at most 100, which is least and greatest.

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
    """The range for :func:`asymmetric` with the least squared error, among those that shrink both ends alike.

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
    limits = torch.stack(extremes(weight, granularity))

    def error(share: Tensor) -> Tensor:
        quantized = asymmetric(weight.detach(), limits * share, bits=bits, granularity=granularity)
        return reduced(
            quantized.values - weight.detach().float(), granularity, lambda split, axes: split.square().mean(dim=axes)
        )

    return limits * search_shares(error, torch.ones_like(limits[0]))


def nearest_codes(
    weight: Tensor,
    scales: Tensor,
    *,
    grid: Grid,
    granularity: Granularity = PER_TENSOR,
    zero_points: Tensor | None = None,
) -> Tensor:
    """Codes of weights on a grid whose scales are fixed, for methods that round one column after another.

    Args:
        weight: any shape, floating.
        scales: ``granularity.scale_shape(weight.shape)``, >= 0.
        grid: what codes may be.
        granularity: which weights share a scale.
        zero_points: of ``scales``'s shape, or ``None``.

    Returns:
        ``weight``'s shape, int8 or uint8: of weights that :func:`~lmcompress.numerics.packing.dequantize` gave, the
        codes that it was given.

    Raises:
        LmcompressError: If scales have another shape, weights are NaN or infinite, or the group size does not divide
            the rows.

    Example:
        >>> nearest_codes(torch.tensor([[0.9, -0.2]]), torch.tensor([[0.5]]), grid=Grid(low=-3, levels=4, stride=2))
        tensor([[ 1, -1]], dtype=torch.int8)
    """
    check_finite(weight)
    scale = granularity.spread(check_state(scales, weight, granularity, "scales").float(), weight.shape)
    split = granularity.split(weight.detach().float())
    if zero_points is None:
        levels = nearest_levels(split, scale, grid)
    else:
        zero = granularity.spread(check_state(zero_points, weight, granularity, "zero points").float(), weight.shape)
        levels = affine_levels(split, scale, zero, grid)
    return levels.to(grid.dtype).reshape(weight.shape)


def affine(x: Tensor, low: Tensor, high: Tensor, grid: Grid, granularity: Granularity, *, cut: bool) -> Quantized:
    """Numbers on an unsigned grid over given ranges, widened to hold 0.

    Args:
        x: any shape, floating.
        low: ``granularity.scale_shape(x.shape)`` float32.
        high: the same.
        grid: from 0 up.
        granularity: which numbers share a range.
        cut: whether numbers beyond the range get no gradient.

    Returns:
        Values, codes and zero points.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    # each end by itself: their difference may overflow
    scales = high / grid.high - low / grid.high
    zero_points = torch.where(scales > 0, grid.nearest(-low / scales), 0.0)
    scale, zero = granularity.spread(scales, x.shape), granularity.spread(zero_points, x.shape)
    split = granularity.split(x.float())
    levels = affine_levels(split.detach(), scale, zero, grid)
    outside = None
    if cut:
        outside = (split < granularity.spread(low, x.shape)) | (split > granularity.spread(high, x.shape))
    values = straight_through(split, (levels - zero) * scale, outside)
    # a zero point that is NaN is no byte; `codes` says why
    whole = zero_points.nan_to_num(nan=0.0).to(torch.uint8)
    return Quantized(values.reshape(x.shape), scales, whole, grid, granularity, levels, x.detach())


def search_shares(error: Callable[[Tensor], Tensor], ones: Tensor) -> Tensor:
    """For each scale the share of its range, in [1/64, 1], whose error is least.

    Args:
        error: ``shares -> errors``, tensors of the shape of ``ones``.
        ones: of the shape wanted.

    Returns:
        The shares; 1 where no other is better.
    """
    best, least = ones, error(ones)
    for power in range(1, 25):
        now = error(ones * 2 ** (-power / 4))
        best, least = torch.where(now < least, ones * 2 ** (-power / 4), best), torch.minimum(now, least)
        # what is cut grows as ranges shrink, and is by now more than the whole error of the best
        if bool((now > 2 * least).all()):
            break
    coarse = best
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        shares = (coarse * 2 ** (step / 16)).clamp(max=1.0)
        now = error(shares)
        best, least = torch.where(now < least, shares, best), torch.minimum(now, least)
    return best


def check_percentile(percentile: float) -> float:
    """A percentile as it came.

    Args:
        percentile: in per cent.

    Raises:
        LmcompressError: If it is not above 0 and at most 100.
    """
    if not 0 < percentile <= 100:
        raise LmcompressError(
            f"percentile must be above 0 and at most 100, got {percentile}; it counts per cent, so 99.9, not 0.999"
        )
    return percentile


def _per_scale(weight: Tensor, granularity: Granularity, f: Callable[[Tensor], Tensor]) -> Tensor:
    """A statistic ``(rows, numbers) -> (rows,)`` of the numbers that share a scale; 0 where there are none."""
    shape = granularity.scale_shape(weight.shape)
    if weight.numel() == 0:
        return torch.zeros(shape, dtype=torch.float32, device=weight.device)
    return f(weight.detach().float().reshape(math.prod(shape), -1)).reshape(shape)


def _rank(rows: Tensor, percentile: float) -> Tensor:
    """The least number of each row that ``percentile`` % of it do not exceed."""
    # kthvalue and not quantile, which refuses more than 16 million numbers
    count = rows.shape[-1]
    # 99.9 / 100 * 1000 is a little more than 999
    place = math.ceil(percentile * count / 100 - 1e-6)
    return rows.kthvalue(min(max(place, 1), count), dim=-1).values
