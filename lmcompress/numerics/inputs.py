"""Quantization of activations from a description, shared by training, packed modules and kernels."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from lmcompress.errors import CheckpointError, LmcompressError
from lmcompress.numerics._straight_through import Rule, fake_quantize, straight_through
from lmcompress.numerics.activations import check_range, dynamic
from lmcompress.numerics.grids import PER_TENSOR, Grid, PerToken, signed_grid, symmetric_grid, unsigned_grid
from lmcompress.numerics.padding import real
from lmcompress.numerics.quantizers.base import Quantized


class InputEncoding(Protocol):
    """What is told of an activation; :class:`lmcompress.checkpoint.schema.ActivationEncoding` is one."""

    @property
    def bits(self) -> Literal[4, 8]:
        """Width."""

    @property
    def symmetric(self) -> bool:
        """Whether levels are symmetric around 0."""

    @property
    def granularity(self) -> Literal["tensor", "token"]:
        """The scope of dynamic ranges."""

    @property
    def range(self) -> Literal["dynamic", "static"]:
        """Whether the range is computed from every input, or scale and zero point are given."""

    @property
    def clip(self) -> float | None:
        """The limit that inputs of dynamic ranges are clipped to first."""

    @property
    def full(self) -> bool:
        """Whether symmetric static codes include the extra negative code of learned ones."""


def input_grid(encoding: InputEncoding) -> Grid:
    """The codes of an activation.

    Args:
        encoding: its description.

    Returns:
        From 0 up if not symmetric; else around 0.
    """
    if not encoding.symmetric:
        return unsigned_grid(encoding.bits)
    return signed_grid(encoding.bits) if encoding.full else symmetric_grid(encoding.bits)


def quantize_input(
    x: Tensor, encoding: InputEncoding, scale: Tensor | None = None, zero_point: Tensor | None = None
) -> Quantized:
    """An activation quantized as described; gradients pass straight through unclipped values.

    Dynamic ranges of the whole tensor leave out padding that is known (:mod:`lmcompress.numerics.padding`).

    Args:
        x: any shape, floating.
        encoding: the description.
        scale: one number, float32; only for static ranges.
        zero_point: one number, uint8; only for static ranges that are not symmetric.

    Returns:
        Values (float32), codes, scales and zero points; NaN stays NaN.

    Raises:
        LmcompressError: If a static range comes without its scale or zero point, or a dynamic one with them.

    Example:
        >>> from lmcompress.checkpoint.schema import ActivationEncoding
        >>> static = ActivationEncoding(bits=4, symmetric=False, range="static")
        >>> quantize_input(torch.tensor([0.6, 9.0]), static, torch.tensor([0.5]), torch.tensor([3])).values
        tensor([0.5000, 6.0000])
    """
    static = encoding.range == "static"
    if (scale is not None) != static or (zero_point is not None) != (static and not encoding.symmetric):
        raise LmcompressError(
            "a static range must have a scale, and a zero point if it is not symmetric, a dynamic one has neither; got "
            f"{encoding.range}, {'' if encoding.symmetric else 'a'}symmetric, scale {scale}, zero point {zero_point}"
        )
    if scale is None:
        by_token = encoding.granularity == "token"
        granularity = PerToken() if by_token else PER_TENSOR
        return dynamic(
            x,
            bits=encoding.bits,
            symmetric=encoding.symmetric,
            granularity=granularity,
            clip=encoding.clip,
            mask=None if by_token else real(x),
            check=False,
        )
    grid, unit = input_grid(encoding), scale.float().reshape(1, 1)
    spread = PER_TENSOR.spread(unit, x.shape)
    if zero_point is None:
        rule = Rule(grid, 1.0, low=grid.low, high=grid.high)
        values, levels = fake_quantize(x.float(), spread, rule)
        return Quantized(values, unit, None, grid, PER_TENSOR, levels, x.detach())
    zero = zero_point.float().reshape((1,) * x.dim())
    steps = x.detach().float() / spread
    outside = (steps + zero <= grid.low) | (steps + zero >= grid.high)
    levels = steps.round_().add_(zero).clamp_(grid.low, grid.high)
    values = straight_through(x.float(), (levels - zero) * spread, outside)
    return Quantized(values, unit, zero_point.reshape(1, 1).to(torch.uint8), grid, PER_TENSOR, levels, x.detach())


def static_range(low: float, high: float, encoding: InputEncoding) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of a calibrated range.

    Args:
        low: minimum.
        high: maximum; symmetric levels end at the larger magnitude of the two.
        encoding: a description with a static range.

    Returns:
        Scale ``(1,)`` float32, and zero point ``(1,)`` uint8, or ``None`` if levels are symmetric around 0.

    Raises:
        LmcompressError: If the range is empty, reversed or not finite.

    Example:
        >>> from lmcompress.checkpoint.schema import ActivationEncoding
        >>> static_range(-1.0, 2.0, ActivationEncoding(bits=4, symmetric=False, range="static"))
        (tensor([0.2000]), tensor([5], dtype=torch.uint8))
    """
    check_range(low, high)
    grid = input_grid(encoding)
    if encoding.symmetric:
        return torch.tensor([max(abs(low), abs(high)) / grid.high]), None
    low, high = min(low, 0.0), max(high, 0.0)
    scale = torch.tensor([high / grid.high - low / grid.high])
    return scale, grid.nearest(torch.tensor([-low]) / scale).to(torch.uint8)


def check_input_range(scale: Tensor, zero_point: Tensor | None, encoding: InputEncoding, name: str) -> None:
    """Refuses a checkpoint's scale or zero point that cannot come from calibration.

    Args:
        scale: one number.
        zero_point: one number, or ``None``.
        encoding: encoding of the activation.
        name: name of the activation in the error.

    Raises:
        CheckpointError: If the scale is not finite or not above 0, or the zero point is not a code.
    """
    value = float(scale)
    if not 0 < value < float("inf"):
        raise CheckpointError(
            f"the scale of {name} must be finite and above 0, got {value}; the checkpoint is damaged or its training "
            "diverged"
        )
    high = input_grid(encoding).high
    if zero_point is not None and int(zero_point) > high:
        raise CheckpointError(f"the zero point of {name} must be a code, at most {high}, got {int(zero_point)}")
