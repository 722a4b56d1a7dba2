"""Ranges of inputs for kernels on a CPU, which take scales and zero points as Python's numbers, and codes as bytes."""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError
from lmcompress.kernels.integers import no_infinity
from lmcompress.kernels.matrix import Inputs
from lmcompress.numerics.inputs import InputEncoding, input_grid
from lmcompress.numerics.padding import without_padding

# the smallest scale whose reciprocal is finite in float32
LEAST_SCALE = 2.0**-126


@dataclass(frozen=True)
class Range:
    """The range of an input: a number is ``(byte - zero) * scale``.

    Attributes:
        scale: float32; NaN if the input has NaN or infinity.
        zero: the byte of 0.
        low: smallest byte that is a code.
        high: largest byte that is a code.
        beyond: whether numbers may be beyond these codes, and within those of a byte.
    """

    scale: float
    zero: int
    low: int
    high: int
    beyond: bool

    def cut(self, x: Tensor) -> Tensor:
        """Numbers clipped to the codes, for a quantizer that clips to bytes itself."""
        if not self.beyond:
            return x
        return x.clamp((self.low - self.zero) * self.scale, (self.high - self.zero) * self.scale)

    def codes(self, x: Tensor) -> Tensor:
        """The bytes, uint8 of the same shape; ``x`` is contiguous and float32."""
        codes = to_bytes(x, self.scale, self.zero)
        return codes.clamp_(self.low, self.high) if self.beyond else codes


def range_of(inputs: Inputs) -> Callable[[Tensor], Range]:
    """The function that gives the range of a float32 input, if one range belongs to the whole of it.

    Args:
        inputs: the quantization of the input.

    Returns:
        The function; it reads the input if ranges are dynamic.

    Raises:
        LmcompressError: If a static range has no scale.
    """
    return _static(inputs) if inputs.encoding.range == "static" else _dynamic(inputs.encoding)


def by_token(encoding: InputEncoding) -> bool:
    """Whether each token has a range of its own."""
    return encoding.range == "dynamic" and encoding.granularity == "token"


def token_levels(x: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Every token over its own range.

    Args:
        x: ``(tokens, in)``.
        inputs: the quantization, by token.

    Returns:
        Levels ``(tokens, in)`` float32, to be rounded; scales and zero points ``(tokens, 1)``, without zero points if
        levels are symmetric around 0.
    """
    encoding = inputs.encoding
    if encoding.bits != 8 or encoding.clip is not None:
        quantized = inputs.quantized(x)
        return quantized.levels, no_infinity(quantized.scales), quantized.zero_points
    x, grid = x.float(), input_grid(encoding)
    # along one axis aminmax takes ten times as long as both of these (torch 2.13)
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    if encoding.symmetric:
        scales = torch.maximum(high, low.neg_()).div_(grid.high).clamp_(min=LEAST_SCALE)
        return x / scales, no_infinity(scales), None
    low, high = low.clamp_(max=0.0), high.clamp_(min=0.0)
    scales = (high / grid.high - low / grid.high).clamp_(min=LEAST_SCALE)
    zero_points = grid.nearest(-low / scales)
    return (x / scales).add_(zero_points), no_infinity(scales), zero_points


def to_bytes(x: Tensor, scale: float, zero: int) -> Tensor:
    """``round(x / scale) + zero`` clipped to a byte.

    Args:
        x: contiguous, float32.
        scale: the divisor.
        zero: the byte of 0.

    Returns:
        uint8 of the same shape; any byte where ``x`` or the scale is NaN.
    """
    if _quantized_tensors():
        quantized = torch.quantize_per_tensor(x, scale, zero, torch.quint8)
        # the same bytes: int_repr copies them one by one, which takes longer than all before
        bytes_ = torch.empty(0, dtype=torch.uint8)
        return bytes_.set_(quantized.untyped_storage(), 0, quantized.shape, quantized.stride())
    # only the conversion to int8 is vectorized; flipping the first bit adds 128
    levels = (x / scale).round_().add_(zero - 128).clamp_(-128, 127)
    return levels.to(torch.int8).bitwise_xor_(-128).view(torch.uint8)


@cache
def _quantized_tensors() -> bool:
    """Whether this torch has tensors of quantized numbers, whose quantizer is one pass."""
    try:
        with warnings.catch_warnings():
            # torch 2.13 announces their removal, once in each process
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
            torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
    except (RuntimeError, AttributeError):
        return False
    return True


def _dynamic(encoding: InputEncoding) -> Callable[[Tensor], Range]:
    """The range of :func:`~lmcompress.numerics.activations.dynamic`."""
    grid, clip, symmetric = input_grid(encoding), encoding.clip, encoding.symmetric

    def measured(x: Tensor) -> Range:
        # padding may be beyond the range of the others
        tokens = without_padding(x)
        ends = torch.aminmax(tokens)
        low, high = ends.min.item(), ends.max.item()
        beyond = tokens is not x
        if clip is not None and (low < -clip or high > clip):
            # NaN comes first in these, so that it is kept
            low, high, beyond = max(low, -clip), min(high, clip), True
        if symmetric:
            scale = _scale(_single(max(high, -low) / grid.high))
            return Range(scale, 128, 128 - grid.high, 128 + grid.high, beyond)
        low, high = min(low, 0.0), max(high, 0.0)
        scale = _scale(_single(_single(high / grid.high) - _single(low / grid.high)))
        zero = min(round(_single(-low / scale)), grid.high) if math.isfinite(scale) else 0
        first, last = 0, grid.high
        if clip is not None and math.isfinite(scale):
            # the zero point is rounded, so that the grid may reach one code beyond the clip
            reach = round(_single(clip / scale))
            first, last = max(first, zero - reach), min(last, zero + reach)
        # and the last code may be one too many
        return Range(scale, zero, first, last, beyond or grid.high < 255)

    return measured


def _static(inputs: Inputs) -> Callable[[Tensor], Range]:
    """The given range, for which no input is read."""
    if inputs.scale is None:
        raise LmcompressError("a static range must have a scale, got none; is the checkpoint complete?")
    grid, scale = input_grid(inputs.encoding), float(inputs.scale)
    shift, zero = (128, 128) if inputs.zero_point is None else (0, int(inputs.zero_point))
    low, high = grid.low + shift, grid.high + shift
    given = Range(scale, zero, low, high, low > 0 or high < 255)
    return lambda x: given


def _single(number: float) -> float:
    """The float32 nearest to a number: for two float32 divided in float64 it equals float32 division."""
    return ctypes.c_float(number).value


def _scale(scale: float) -> float:
    """A scale that can be used as a divisor, since if all values are 0 any will do; NaN for infinity."""
    if scale < LEAST_SCALE:
        return LEAST_SCALE
    return scale if math.isfinite(scale) else math.nan
