"""The interface and result of weight quantizers, and the steps that several of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError
from lmcompress.numerics._straight_through import Inside, Rule, fake_quantize, straight_through
from lmcompress.numerics.grids import Bits, Granularity, Grid

WITH_ZERO: tuple[Bits, ...] = ("ternary", 2, 3, 4, 8)
TERNARY: tuple[Bits, ...] = ("ternary", 2)


@dataclass(frozen=True, eq=False)
class Quantized:
    """The result of a quantizer: quantized values with their codes and scales.

    Attributes:
        values: same shape as the input, float32, with gradient.
        scales: ``granularity.scale_shape(shape)`` float32, >= 0, without gradient.
        zero_points: the same shape, uint8, or ``None`` if the code 0 is the number 0.
        grid: possible codes.
        granularity: which numbers share a scale.
        levels: the codes as floats, shaped as the granularity splits them; :attr:`codes` are these as bytes.
        source: the input, without gradient.
    """

    values: Tensor
    scales: Tensor
    zero_points: Tensor | None
    grid: Grid
    granularity: Granularity
    levels: Tensor
    source: Tensor

    @property
    def codes(self) -> Tensor:
        """The codes: same shape as the input, int8 if some are negative, else uint8.

        Raises:
            LmcompressError: If the source or a scale is NaN or infinite.
        """
        check_finite(self.source)
        if not bool(torch.isfinite(self.scales).all()):
            raise LmcompressError(
                "scales must be finite, got one that is not: a learned scale has diverged; lower the learning rate of "
                "the scales"
            )
        return self.levels.to(self.grid.dtype).reshape(self.values.shape)


Quantizer = Callable[..., Quantized]
"""``(weight, state, *, bits, granularity) -> Quantized``."""

InitialState = Callable[..., Tensor]
"""``(weight, *, bits, granularity) -> state``."""


@dataclass(frozen=True)
class WeightQuantizer:
    """A weight quantizer and its properties: one of the built-in ones, or a custom one.

    Checkpoints hold codes, scales and the grid, never the quantizer: a packed model loads, and computes the same, where
    the code of a custom quantizer does not exist.

    Attributes:
        function: ``(weight, state, *, bits, granularity) -> Quantized``.
        initial: ``(weight, *, bits, granularity) -> state``; ``None`` if there is no state.
        learned: whether the state is a trained parameter; otherwise it stays as initialized.
        bits: the bit-widths it supports.
        by_rows: whether the values of a row are independent of the other rows, with scales by row or group;
            an embedding then quantizes only the rows that a batch looks up.
        takes_percentile: whether ``initial`` takes ``percentile``, from a
            :class:`~lmcompress.quantization.WeightScheme`.
        takes_curvature: whether ``function`` takes ``curvature``, by which squared errors are weighted.

    Example:
        >>> from lmcompress.numerics.quantizers.learned import initial_clip
        >>> from lmcompress.numerics.quantizers.uniform import symmetric
        >>> half = WeightQuantizer(symmetric, lambda w, **how: initial_clip(w, **how) / 2, bits=(4, 8))
        >>> half.initial(torch.tensor([[1.0, -3.0]]), bits=4)
        tensor([[1.5000]])
    """

    function: Quantizer
    initial: InitialState | None = None
    learned: bool = False
    bits: tuple[Bits, ...] = WITH_ZERO
    by_rows: bool = False
    takes_percentile: bool = False
    takes_curvature: bool = False


def check_finite(x: Tensor, name: str = "weights") -> None:
    """Refuses NaN and infinity.

    Args:
        x: any floating tensor.
        name: name of the tensor in the error.

    Raises:
        LmcompressError: If there are NaN or infinite values.
    """
    x = x.detach()
    # one NaN or infinity makes the sum one, which is found in a quarter of the time; a sum may also overflow
    if bool(torch.isfinite(x.sum())):
        return
    finite = torch.isfinite(x)
    if not bool(finite.all()):
        wrong = int((~finite).sum())
        raise LmcompressError(
            f"{name} must be finite to be quantized, got {wrong} of {x.numel()} that are NaN or infinite; "
            "has the training diverged, or the checkpoint overflowed in float16?"
        )


def check_state(state: Tensor, weight: Tensor, granularity: Granularity, name: str) -> Tensor:
    """A state, or scales, with the shape checked.

    Args:
        state: state of the quantizer.
        weight: the weight it belongs to.
        granularity: which weights share one entry.
        name: name of the state in the error.

    Raises:
        LmcompressError: If it has another shape than ``granularity.scale_shape(weight.shape)``.
    """
    expected = granularity.scale_shape(weight.shape)
    if tuple(state.shape) != expected:
        raise LmcompressError(
            f"{name} of weights of shape {tuple(weight.shape)} must have shape {expected} ({granularity}), "
            f"got {tuple(state.shape)}"
        )
    return state


def clipped(
    weight: Tensor, alpha: Tensor, grid: Grid, granularity: Granularity, *, inside: Inside, pass_outside: bool
) -> Quantized:
    """Fake-quantized on a symmetric grid between ±alpha.

    Args:
        weight: any shape, floating.
        alpha: ``granularity.scale_shape(weight.shape)``, the clip.
        grid: symmetric.
        granularity: which weights share a clip.
        inside: gradient of the clip for weights within it.
        pass_outside: whether weights beyond the clip get a gradient.
    """
    rule = Rule(grid, float(grid.high), -1.0, 1.0, inside, pass_outside)
    return by_rule(weight, alpha, rule, granularity)


def by_rule(weight: Tensor, unit: Tensor, rule: Rule, granularity: Granularity) -> Quantized:
    """Fake-quantized by a rule with a gradient of the unit.

    Args:
        weight: any shape, floating.
        unit: ``granularity.scale_shape(weight.shape)``, > 0.
        rule: grid, range and gradient.
        granularity: which weights share a unit.
    """
    split = granularity.split(weight.float())
    values, levels = fake_quantize(split, granularity.spread(unit, weight.shape), rule)
    scales = unit.detach() / rule.per_unit
    return Quantized(values.reshape(weight.shape), scales, None, rule.grid, granularity, levels, weight.detach())


def from_levels(
    weight: Tensor, split: Tensor, levels: Tensor, scale: Tensor, grid: Grid, granularity: Granularity
) -> Quantized:
    """Values from given codes and scales, with a straight-through gradient.

    Args:
        weight: any shape, floating.
        split: the weight as the granularity splits it, with gradient.
        levels: the codes, in the same shape.
        scale: broadcasts over them.
        grid: grid of the codes.
        granularity: which weights share a scale.
    """
    values = straight_through(split, levels * scale).reshape(weight.shape)
    scales = scale.reshape(granularity.scale_shape(weight.shape))
    return Quantized(values, scales, None, grid, granularity, levels, weight.detach())


def nearest_levels(split: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """The nearest codes of a grid around 0.

    Args:
        split: weights as the granularity splits them.
        scale: broadcasts over them, >= 0.
        grid: possible codes.
    """
    # x / infinity is 0: where the scale is 0 all values are 0
    return grid.nearest(split / torch.where(scale > 0, scale, torch.inf))


def affine_levels(split: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """The nearest codes of an unsigned grid with zero points.

    Args:
        split: weights as the granularity splits them.
        scale: broadcasts over them, >= 0.
        zero: the zero points, same broadcasting.
        grid: grid from 0 up.
    """
    levels = (split / torch.where(scale > 0, scale, torch.inf)).round_().add_(zero)
    return levels.clamp_(grid.low, grid.high).add_(0.0)
