"""Calibrated ranges of activations: minimum and maximum, percentiles, least squared error.

Observers are values: :meth:`~MinMax.updated` returns a new one, and the order and size of batches do not matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError
from lmcompress.numerics.activations import BITS, ActivationBits, check_range, refuse_unless, static
from lmcompress.numerics.grids import check_bits
from lmcompress.numerics.quantizers.ranges import check_percentile, search_shares


@dataclass(frozen=True)
class MinMax:
    """Minimum and maximum observed.

    Attributes:
        low: infinity before the first batch.
        high: minus infinity before the first batch.
        count: number of observed values.

    Example:
        >>> MinMax().updated(torch.tensor([1.0, -2.0])).updated(torch.tensor([3.0])).range()
        (-2.0, 3.0)
    """

    low: float = math.inf
    high: float = -math.inf
    count: int = 0

    def updated(self, x: Tensor, mask: Tensor | None = None) -> MinMax:
        """A new observer that has also observed ``x``.

        Args:
            x: activations, any floating dtype.
            mask: over ``x``'s leading axes, true for values to include, such as tokens that are not padding.

        Returns:
            The observer.

        Raises:
            LmcompressError: If activations are NaN or infinite, or the mask has other axes.
        """
        x = _counted(x, mask)
        if not x.numel():
            return self
        low, high = (float(end) for end in torch.aminmax(x))
        return MinMax(min(self.low, low), max(self.high, high), self.count + x.numel())

    def range(self) -> tuple[float, float]:
        """Minimum and maximum.

        Returns:
            Both, as floats.

        Raises:
            LmcompressError: If calibration observed nothing, or only zeros.
        """
        if not self.count:
            raise LmcompressError(_NO_DATA)
        check_range(self.low, self.high)
        return self.low, self.high


@dataclass(frozen=True, eq=False)
class Histogram:
    """A histogram of observed values, for percentiles and least squared error.

    Bins are ``2 * reach / bins`` wide, from ``-reach`` to ``reach``, a power of 2 that doubles when a value is beyond:
    then two bins become one, exactly, so that neither order nor size of batches matters.

    Attributes:
        bins: number of bins, even.
        exponent: the reach is 2 to this power; ``None`` before the first value that is not 0.
        counts: ``(bins,)`` int64.
        extremes: minimum and maximum.

    Raises:
        LmcompressError: If the number of bins is not even, or below 2.

    Example:
        >>> low, high = Histogram().updated(torch.arange(-50.0, 51.0)).percentile_range(90)
        >>> round(low), round(high)
        (-45, 45)
    """

    bins: int = 8192
    exponent: int | None = None
    counts: Tensor | None = None
    extremes: MinMax = MinMax()

    def __post_init__(self) -> None:
        if self.bins < 2 or self.bins % 2:
            raise LmcompressError(f"the number of bins must be even and at least 2, got {self.bins}")

    def updated(self, x: Tensor, mask: Tensor | None = None) -> Histogram:
        """A new observer that has also observed ``x``.

        Args:
            x: activations, any floating dtype.
            mask: over ``x``'s leading axes, true for values to include, such as tokens that are not padding.

        Returns:
            The observer.

        Raises:
            LmcompressError: If activations are NaN or infinite, or the mask has other axes.
        """
        x = _counted(x, mask)
        seen = self.extremes.updated(x)
        if seen.count == self.extremes.count:
            return self
        greatest = max(abs(seen.low), abs(seen.high))
        # frexp gives 2^e > maximum, so the maximum has a bin; zeros alone wait in the smallest possible reach
        exponent = math.frexp(greatest)[1] if greatest > 0 else -126
        exponent = max(exponent, -126 if self.exponent is None else self.exponent)
        counts = torch.zeros(self.bins, dtype=torch.int64, device=x.device)
        if self.counts is not None and self.exponent is not None:
            counts = _merged(self.counts.to(x.device), exponent - self.exponent)
        # a power of 2 divides exactly, and in float64 no value lies beyond its bin
        place = (x.double() * (self.bins / 2 / 2.0**exponent)).floor().long() + self.bins // 2
        return Histogram(self.bins, exponent, counts + torch.bincount(place, minlength=self.bins), seen)

    def percentile_range(self, percentile: float = 99.9) -> tuple[float, float]:
        """The range that contains ``percentile`` % of the values, with as many below as above, to within a bin.

        Args:
            percentile: above 0, at most 100, which is minimum and maximum.

        Returns:
            Minimum and maximum, as floats, within the observed values.

        Raises:
            LmcompressError: If the percentile is out of range, or nothing or only zeros were observed.
        """
        check_percentile(percentile)
        counts, edges = self._bins()
        share = counts.double().cumsum(0) / counts.sum()
        tail = (1 - percentile / 100) / 2
        first = int((share > tail + 1e-12).nonzero()[0])
        last = int((share >= 1 - tail - 1e-12).nonzero()[0])
        low = max(float(edges[first]), self.extremes.low)
        high = min(float(edges[last + 1]), self.extremes.high)
        check_range(low, high)
        return low, high

    def mse_range(self, *, bits: ActivationBits = 8, symmetric: bool = True) -> tuple[float, float]:
        """The range whose levels have the least squared error, among those that shrink both ends proportionally.

        Args:
            bits: 8 or 4; a range belongs to its bits.
            symmetric: whether levels are symmetric around 0.

        Returns:
            Minimum and maximum, as floats.

        Raises:
            LmcompressError: If bits are neither 8 nor 4, or nothing or only zeros were observed.
        """
        check_bits(bits, BITS)
        counts, edges = self._bins()
        low, high = self.extremes.range()
        centres = ((edges[:-1] + edges[1:]) / 2).clamp(low, high)
        weight = counts.double() / counts.sum()

        def error(share: Tensor) -> Tensor:
            ends = low * float(share), high * float(share)
            values = static(centres.float(), *ends, bits=bits, symmetric=symmetric).values.double()
            return (weight * (values - centres).square()).sum().reshape(1)

        share = float(search_shares(error, torch.ones(1, dtype=torch.float64, device=counts.device)))
        return low * share, high * share

    def _bins(self) -> tuple[Tensor, Tensor]:
        """Counts ``(bins,)`` and float64 edges ``(bins + 1,)``."""
        if self.counts is None or self.exponent is None:
            raise LmcompressError(_NO_DATA)
        self.extremes.range()
        steps = torch.arange(-(self.bins // 2), self.bins // 2 + 1, dtype=torch.float64, device=self.counts.device)
        return self.counts, steps * (2.0**self.exponent / (self.bins / 2))


_NO_DATA = (
    "calibration needs data, got none: give it a few batches with tokens that are not padding, or use dynamic ranges"
)


def _merged(counts: Tensor, doublings: int) -> Tensor:
    """Counts in bins 2^doublings times as wide, around the same centre."""
    half = counts.shape[0] // 2
    width = 2 ** min(doublings, 62)
    merged = torch.zeros_like(counts)
    # floor division maps bin -1 to -1 and 0 to 0: the centre stays an edge
    place = torch.div(torch.arange(-half, half, device=counts.device), width, rounding_mode="floor") + half
    return merged.index_add_(0, place, counts)


def _counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """The values to count, flat float32, checked."""
    x = x.detach().float()
    if mask is not None:
        if mask.shape != x.shape[: mask.dim()]:
            raise LmcompressError(
                f"a mask must have the leading axes of its activations, got {tuple(mask.shape)} for {tuple(x.shape)}"
            )
        x = x[mask.bool()]
    refuse_unless(bool(torch.isfinite(x).all()))
    return x.flatten()
