"""Uniform quantizers: levels around 0, or over a range with an integer zero point."""

from __future__ import annotations

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
    r"""Uniform levels between ±α, the largest magnitude or a given clip.

    .. math:: w_q = s \cdot \mathrm{clip}(\mathrm{round}(w / s), -n, n), \quad s = \alpha / n, \quad n = 2^{b-1} - 1

    The gradient passes straight through, except for weights beyond a given clip. The clip is not learned; see
    :func:`pact`.

    Args:
        weight: any shape, floating.
        clip: α, >= 0, such as from :func:`percentile_clip` or :func:`mse_clip`; ``None`` uses the largest
            magnitude of this weight (min-max).
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


def asymmetric(
    weight: Tensor, limits: Tensor | None = None, *, bits: Bits, granularity: Granularity = PER_TENSOR
) -> Quantized:
    r"""Uniform levels over a range that need not be centred, with an integer zero point.

    .. math:: w_q = s \cdot (\mathrm{clip}(\mathrm{round}(w / s) + z, 0, m) - z), \quad s = \frac{h - l}{m}, \quad
        z = \mathrm{round}(-l / s), \quad m = 2^b - 1

    The range is widened to include 0, so that 0 stays 0 and matmuls need integers only. The gradient passes straight
    through, except for weights beyond a given range.

    Args:
        weight: any shape, floating.
        limits: ``(2, *granularity.scale_shape(weight.shape))``, l and h; ``None`` uses the minimum and maximum weight.
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


def affine(x: Tensor, low: Tensor, high: Tensor, grid: Grid, granularity: Granularity, *, cut: bool) -> Quantized:
    """Numbers on an unsigned grid over given ranges, widened to include 0.

    Args:
        x: any shape, floating.
        low: ``granularity.scale_shape(x.shape)`` float32.
        high: the same.
        grid: grid from 0 up.
        granularity: which numbers share a range.
        cut: whether numbers beyond the range get no gradient.

    Returns:
        Values, codes and zero points.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    # each end separately: their difference may overflow
    scales = high / grid.high - low / grid.high
    zero_points = torch.where(scales > 0, grid.nearest(-low / scales), 0.0)
    scale, zero = granularity.spread(scales, x.shape), granularity.spread(zero_points, x.shape)
    split = granularity.split(x.float())
    levels = affine_levels(split.detach(), scale, zero, grid)
    outside = None
    if cut:
        outside = (split < granularity.spread(low, x.shape)) | (split > granularity.spread(high, x.shape))
    values = straight_through(split, (levels - zero) * scale, outside)
    # a zero point that is NaN does not fit a byte; `codes` reports why
    whole = zero_points.nan_to_num(nan=0.0).to(torch.uint8)
    return Quantized(values.reshape(x.shape), scales, whole, grid, granularity, levels, x.detach())


def nearest_codes(
    weight: Tensor,
    scales: Tensor,
    *,
    grid: Grid,
    granularity: Granularity = PER_TENSOR,
    zero_points: Tensor | None = None,
) -> Tensor:
    """Codes of weights on a grid with fixed scales, for methods that round one column after another.

    Args:
        weight: any shape, floating.
        scales: ``granularity.scale_shape(weight.shape)``, >= 0.
        grid: possible codes.
        granularity: which weights share a scale.
        zero_points: same shape as ``scales``, or ``None``.

    Returns:
        ``weight``'s shape, int8 or uint8: for weights returned by :func:`~lmcompress.numerics.packing.dequantize`, the
        original codes.

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
