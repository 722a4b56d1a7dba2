r"""Activations on a few levels: ranges taken at every forward pass, learned, or calibrated beforehand.

============ ============================== ============================== ===================== =====================
function     paper                          range                          state                 granularity
============ ============================== ============================== ===================== =====================
``dynamic``  Zhang et al. 2020              least and greatest of this     none                  tensor, or each token
             (TernaryBERT), section 3.1     very input
``learned``  Esser et al. 2020 (LSQ);       symmetric: a step; asymmetric: step learned, or step tensor
             Bhalgat et al. 2020 (LSQ+)     a step and an offset           and offset learned
``static``   Jacob et al. 2018, section 3   calibrated by an observer      a range, fixed        tensor
============ ============================== ============================== ===================== =====================

Symmetric activations have the codes -n to n (for ``learned`` -n - 1 to n) with n = 2^(b-1) - 1, int8; asymmetric ones 0
to 2^b - 1 with a whole zero point, uint8: what is mostly on one side of 0, such as attention probabilities and what
comes out of a GELU. Ranges are widened to hold 0, so that a masked probability stays exactly 0.

Arithmetic is float32 whatever the input's dtype and the autocast; the values come back as float32.

Observers are values: :meth:`~MinMax.updated` gives a new one, and the order and size of batches make no difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError
from lmcompress.numerics._straight_through import (
    Rule,
    at_least,
    fake_quantize,
    learned_affine,
    straight_through,
)
from lmcompress.numerics.grids import (
    PER_TENSOR,
    Grid,
    PerTensor,
    PerToken,
    check_bits,
    extremes,
    signed_grid,
    symmetric_grid,
    unsigned_grid,
)
from lmcompress.numerics.quantizers import Quantized, affine, check_percentile, search_shares

ActivationBits = Literal[4, 8]
"""Widths of activations."""

_BITS: tuple[ActivationBits, ...] = (4, 8)
_NO_DATA = (
    "calibration needs data, got none: give it a few batches with tokens that are no padding, or use dynamic ranges"
)


def dynamic(
    x: Tensor,
    *,
    bits: ActivationBits = 8,
    symmetric: bool = True,
    granularity: PerTensor | PerToken = PER_TENSOR,
    clip: float | None = None,
    check: bool = True,
) -> Quantized:
    r"""Activations over the range that they have now.

    .. math:: x_q = s \cdot \mathrm{round}(x / s), \quad s = \frac{\max|x|}{2^{b-1} - 1}

    or, not symmetric, with whole zero points as in :func:`~lmcompress.numerics.quantizers.asymmetric`, over the
    least and greatest value. The range is data: the gradient goes straight through to what is not clipped. An input of
    zeros only gives zeros.

    Args:
        x: any shape, floating.
        bits: 8 or 4.
        symmetric: whether levels lie around 0.
        granularity: one range for the tensor, or for each vector along the last axis.
        clip: what is beyond ±clip is cut to it beforehand and gets no gradient; ``None`` cuts nothing.
        check: whether to refuse NaN and infinity, for which the host waits for a GPU; else they make NaN of all values
            that share their range (of infinity a clip makes the clip).

    Returns:
        Values and codes.

    Raises:
        LmcompressError: other bits, a clip that is not > 0, or an input with NaN or infinity.

    Note:
        TernaryBERT's code has a zero point that is no whole number, the least value itself, and clips to 2.5.

    Reference:
        Zhang, Hou, Yin, Shang, Chen, Jiang & Liu, *TernaryBERT: Distillation-aware Ultra-low Bit BERT*, EMNLP 2020,
        https://arxiv.org/abs/2009.12812, section 3.1.

    Example:
        >>> dynamic(torch.tensor([[-7.0, 0.4, 1.6]]), bits=4).codes
        tensor([[-7,  0,  2]], dtype=torch.int8)
    """
    check_bits(bits, _BITS)
    cut, outside = x.float(), None
    if clip is not None:
        if not clip > 0:
            raise LmcompressError(f"clip must be > 0, got {clip}; leave it out to cut nothing")
        # NaN survives clipping, infinity does not
        if check:
            _refuse(bool(torch.isfinite(x).all()))
        # a number at the end itself is not inside either, as in the code of the paper
        outside = cut.abs() >= clip
        cut = straight_through(cut, cut.detach().clamp(-clip, clip), outside)
    low, high = extremes(cut, granularity)
    if check:
        _refuse(bool((torch.isfinite(low) & torch.isfinite(high)).all()))
    if not symmetric:
        return affine(cut, low, high, unsigned_grid(bits), granularity, cut=False)
    return _symmetric(cut, torch.maximum(high, -low), symmetric_grid(bits), granularity, pass_outside=True)


def static(x: Tensor, low: float, high: float, *, bits: ActivationBits = 8, symmetric: bool = True) -> Quantized:
    r"""Activations over a range that was calibrated; what is beyond is cut to it and gets no gradient.

    Args:
        x: any shape, floating.
        low: the least value there was.
        high: the greatest; symmetric levels end at the greater magnitude of the two.
        bits: 8 or 4.
        symmetric: whether levels lie around 0.

    Returns:
        Values and codes. NaN stays NaN.

    Raises:
        LmcompressError: other bits, or a range that is empty, reversed, or not finite.

    Reference:
        Jacob et al., *Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference*,
        CVPR 2018, https://arxiv.org/abs/1712.05877, section 3.

    Example:
        >>> static(torch.tensor([0.5, 9.0]), 0.0, 1.5, bits=4, symmetric=False).values
        tensor([0.5000, 1.5000])
    """
    check_bits(bits, _BITS)
    check_range(low, high)
    ends = torch.tensor([low, high], dtype=torch.float32, device=x.device)
    if not symmetric:
        return affine(x, ends[:1, None], ends[1:, None], unsigned_grid(bits), PER_TENSOR, cut=True)
    return _symmetric(x, ends.abs().max().reshape(1, 1), symmetric_grid(bits), PER_TENSOR, pass_outside=False)


def learned(x: Tensor, step: Tensor, offset: Tensor | None = None, *, bits: ActivationBits = 8) -> Quantized:
    r"""Activations over a range that is learned: LSQ around 0, or LSQ+ with an offset.

    .. math:: x_q = s \cdot \mathrm{clip}(\mathrm{round}(x / s), -2^{b-1}, 2^{b-1} - 1)

    .. math:: x_q = s \cdot (\mathrm{clip}(\mathrm{round}(x / s) + z, 0, 2^b - 1) - z), \quad
        z = \mathrm{round}(-\beta / s)

    The gradient of s is as for weights (:func:`~lmcompress.numerics.quantizers.lsq`), that of β is 1 for numbers
    beyond the range and 0 within; both times :math:`1 / \sqrt{N Q_P}` with N the numbers of one example's vector (last
    axis), so that neither batch nor length changes it.

    Args:
        x: any shape, floating.
        step: the state s, ``(1, 1)``; counts as 1e-5 where it is less.
        offset: the state β, ``(1, 1)``, for an asymmetric range; clipped to where the range holds 0.
        bits: 8 or 4; a step belongs to its bits.

    Returns:
        Values and codes. NaN stays NaN.

    Raises:
        LmcompressError: other bits, or a state of another shape.

    Note:
        LSQ's N is the number of features of a layer. LSQ+ keeps β as it is; here it is rounded to a whole zero point,
        straight through.

    Reference:
        Esser et al. 2020 (LSQ), https://arxiv.org/abs/1902.08153, section 2; Bhalgat, Lee, Nagel, Blankevoort & Kwak,
        *LSQ+: Improving low-bit quantization through learnable offsets and better initialization*, 2020,
        https://arxiv.org/abs/2004.09576, section 3.

    Example:
        >>> learned(torch.tensor([0.9, -9.0]), torch.tensor([[0.5]]), bits=4).values
        tensor([ 1., -4.])
    """
    check_bits(bits, _BITS)
    for name, state in (("the step", step), ("the offset", offset)):
        if state is not None and tuple(state.shape) != (1, 1):
            raise LmcompressError(f"{name} of activations must have shape (1, 1), got {tuple(state.shape)}")
    s = at_least(step)
    features = max(1, x.shape[-1] if x.dim() else 1)
    if offset is None:
        grid = signed_grid(bits)
        rule = Rule(grid, 1.0, low=grid.low, high=grid.high, factor=1 / math.sqrt(features * grid.high))
        values, levels = fake_quantize(x.float(), PER_TENSOR.spread(s, x.shape), rule)
        return Quantized(values, s.detach(), None, grid, PER_TENSOR, levels, x.detach())
    grid = unsigned_grid(bits)
    values, levels, zero = learned_affine(
        x.float(),
        PER_TENSOR.spread(s, x.shape),
        PER_TENSOR.spread(offset.float(), x.shape),
        grid,
        1 / math.sqrt(features * grid.high),
    )
    zero_points = zero.reshape(1, 1).nan_to_num(nan=0.0).to(torch.uint8)
    return Quantized(values, s.detach(), zero_points, grid, PER_TENSOR, levels, x.detach())


def initial_step(x: Tensor, *, bits: ActivationBits = 8) -> Tensor:
    r"""The first step of symmetric :func:`learned`, from a batch: :math:`2\, \mathrm{mean}|x| / \sqrt{2^{b-1} - 1}`.

    Args:
        x: activations, padding left out.
        bits: 8 or 4.

    Returns:
        ``(1, 1)`` float32.

    Raises:
        LmcompressError: other bits, or activations that are none, all zero, NaN or infinite.

    Reference:
        Esser et al. 2020, https://arxiv.org/abs/1902.08153, section 2.1.
    """
    check_bits(bits, _BITS)
    _refuse(bool(torch.isfinite(x).all()))
    mean = x.detach().float().abs().mean().reshape(1, 1)
    if not bool(mean > 0):
        raise LmcompressError(
            f"activations must not all be zero to start a step, got {x.numel()} of them without any other; calibrate "
            "on real batches, or leave this input as it is"
        )
    return mean * (2 / math.sqrt(signed_grid(bits).high))


def initial_range(low: float, high: float, *, bits: ActivationBits = 8) -> tuple[Tensor, Tensor]:
    """The first step and offset of asymmetric :func:`learned`, from a calibrated range.

    Args:
        low: the least value.
        high: the greatest.
        bits: 8 or 4.

    Returns:
        Step and offset, ``(1, 1)`` float32 each: the range widened to hold 0.

    Raises:
        LmcompressError: other bits, or a range that is empty, reversed, or not finite.

    Reference:
        Bhalgat et al. 2020 (LSQ+), https://arxiv.org/abs/2004.09576, section 3.2.
    """
    check_bits(bits, _BITS)
    check_range(low, high)
    low, high = min(low, 0.0), max(high, 0.0)
    return torch.tensor([[(high - low) / unsigned_grid(bits).high]]), torch.tensor([[low]])


def check_range(low: float, high: float) -> None:
    """Refuses a range that no activations can lie in.

    Args:
        low: the least value.
        high: the greatest.

    Raises:
        LmcompressError: it is not finite, reversed, or 0 wide with 0 in it.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise LmcompressError(f"an activation range must be finite, got [{low}, {high}]; calibrate again on sound data")
    if low > high:
        raise LmcompressError(f"an activation range must go from low to high, got [{low}, {high}]")
    if low == high == 0:
        raise LmcompressError(
            "an activation range must be wider than zero, got [0, 0]: calibration saw nothing but zeros here; give it "
            "real batches, use dynamic ranges, or leave this input as it is"
        )


@dataclass(frozen=True)
class MinMax:
    """Least and greatest value seen.

    Attributes:
        low: infinity before the first batch.
        high: minus infinity before the first batch.
        count: values seen.

    Example:
        >>> MinMax().updated(torch.tensor([1.0, -2.0])).updated(torch.tensor([3.0])).range()
        (-2.0, 3.0)
    """

    low: float = math.inf
    high: float = -math.inf
    count: int = 0

    def updated(self, x: Tensor, mask: Tensor | None = None) -> MinMax:
        """A new observer that has also seen ``x``.

        Args:
            x: activations, any floating dtype.
            mask: of ``x``'s leading axes, true for what counts, such as tokens that are no padding.

        Returns:
            The observer.

        Raises:
            LmcompressError: activations that are NaN or infinite, or a mask of other axes.
        """
        x = _counted(x, mask)
        if not x.numel():
            return self
        low, high = (float(end) for end in torch.aminmax(x))
        return MinMax(min(self.low, low), max(self.high, high), self.count + x.numel())

    def range(self) -> tuple[float, float]:
        """Least and greatest value.

        Returns:
            Both, as floats.

        Raises:
            LmcompressError: nothing was seen, or nothing but zeros.
        """
        if not self.count:
            raise LmcompressError(_NO_DATA)
        check_range(self.low, self.high)
        return self.low, self.high


@dataclass(frozen=True, eq=False)
class Histogram:
    """How often values were seen, for percentiles and least squared error.

    Bins are ``2 * reach / bins`` wide, from ``-reach`` to ``reach``, a power of 2 that doubles when a value is beyond:
    then two bins become one, exactly, so that neither order nor size of batches makes a difference.

    Attributes:
        bins: how many, even.
        exponent: of the reach, 2 to this power; ``None`` before the first value that is not 0.
        counts: ``(bins,)`` int64.
        extremes: least and greatest value.

    Raises:
        LmcompressError: a number of bins that is not even and at least 2.

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
        """A new observer that has also seen ``x``.

        Args:
            x: activations, any floating dtype.
            mask: of ``x``'s leading axes, true for what counts, such as tokens that are no padding.

        Returns:
            The observer.

        Raises:
            LmcompressError: activations that are NaN or infinite, or a mask of other axes.
        """
        x = _counted(x, mask)
        seen = self.extremes.updated(x)
        if seen.count == self.extremes.count:
            return self
        greatest = max(abs(seen.low), abs(seen.high))
        # frexp gives 2^e > greatest, so the greatest value has a bin; zeros alone wait in the least reach there is
        exponent = math.frexp(greatest)[1] if greatest > 0 else -126
        exponent = max(exponent, -126 if self.exponent is None else self.exponent)
        counts = torch.zeros(self.bins, dtype=torch.int64, device=x.device)
        if self.counts is not None and self.exponent is not None:
            counts = _merged(self.counts.to(x.device), exponent - self.exponent)
        # a power of 2 divides exactly, and in float64 no value lies beyond its bin
        place = (x.double() * (self.bins / 2 / 2.0**exponent)).floor().long() + self.bins // 2
        return Histogram(self.bins, exponent, counts + torch.bincount(place, minlength=self.bins), seen)

    def percentile_range(self, percentile: float = 99.9) -> tuple[float, float]:
        """The range that holds ``percentile`` % of the values, with as many below as above, to within a bin.

        Args:
            percentile: above 0, at most 100, which is least and greatest.

        Returns:
            Least and greatest value, as floats, not beyond what was seen.

        Raises:
            LmcompressError: a percentile that is none; nothing was seen, or nothing but zeros.
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
        """The range whose levels have the least squared error, among those that shrink both ends alike.

        Args:
            bits: 8 or 4; a range belongs to its bits.
            symmetric: whether levels lie around 0.

        Returns:
            Least and greatest value, as floats.

        Raises:
            LmcompressError: other bits; nothing was seen, or nothing but zeros.
        """
        check_bits(bits, _BITS)
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


def _symmetric(
    x: Tensor, alpha: Tensor, grid: Grid, granularity: PerTensor | PerToken, *, pass_outside: bool
) -> Quantized:
    rule = Rule(grid, float(grid.high), -1.0, 1.0, pass_outside=pass_outside)
    values, levels = fake_quantize(x.float(), granularity.spread(alpha, x.shape), rule)
    return Quantized(values, alpha / grid.high, None, grid, granularity, levels, x.detach())


def _merged(counts: Tensor, doublings: int) -> Tensor:
    """Counts of bins 2^doublings times as wide, around the same middle."""
    half = counts.shape[0] // 2
    width = 2 ** min(doublings, 62)
    merged = torch.zeros_like(counts)
    # floor division sends bin -1 to -1 and 0 to 0: the middle stays an edge
    place = torch.div(torch.arange(-half, half, device=counts.device), width, rounding_mode="floor") + half
    return merged.index_add_(0, place, counts)


def _counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """What counts of activations, flat float32, checked."""
    x = x.detach().float()
    if mask is not None:
        if mask.shape != x.shape[: mask.dim()]:
            raise LmcompressError(
                f"a mask must have the leading axes of its activations, got {tuple(mask.shape)} for {tuple(x.shape)}"
            )
        x = x[mask.bool()]
    _refuse(bool(torch.isfinite(x).all()))
    return x.flatten()


def _refuse(finite: bool) -> None:
    if not finite:
        raise LmcompressError(
            "activations must be finite to be quantized, got NaN or infinity; is the model sound in this dtype? "
            "float16 overflows beyond 65504"
        )
