"""FBGEMM's int8 matmul, which quantizes the input itself (CPU, x86)."""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError
from lmcompress.kernels.integers import IntegerKernel, by_row, finished, no_infinity, row_sums, signed_codes
from lmcompress.kernels.matrix import Inputs, Matrix, Prepacked
from lmcompress.numerics.inputs import InputEncoding, input_grid

# the smallest scale whose reciprocal is finite in float32
LEAST_SCALE = 2.0**-126


@dataclass(frozen=True)
class Fbgemm(IntegerKernel):
    """FBGEMM's int8 matmul: quantizes the input, multiplies and scales in one pass.

    Attributes:
        name: its name.
    """

    name: str = "fbgemm"

    def prepack(self, matrix: Matrix, bias: Tensor | None, inputs: Inputs | None, dtype: torch.dtype) -> Prepacked:
        """FBGEMM's own layout, a byte for each weight."""
        if inputs is None:
            raise LmcompressError("fbgemm multiplies quantized inputs, got none; use the reference")
        codes, zeros = signed_codes(matrix)
        scales = by_row(matrix.scales, matrix)
        by_token = _by_token(inputs.encoding)
        zero_points = torch.zeros(codes.shape[0], dtype=torch.int64) if zeros is None else zeros.long()
        with warnings.catch_warnings():
            # torch 2.13 announces the removal of these tensors; the self-test will then find them missing
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
            quantized = torch._make_per_channel_quantized_tensor(codes, scales.double(), zero_points, 0)
            own_bias = None if bias is None else bias.detach().float()
            packed = torch.ops.quantized.linear_prepack(quantized, None if by_token else own_bias)
        # the overload itself: a packet looks it up in every call
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        ranged = _static(inputs) if inputs.encoding.range == "static" else _dynamic(inputs.encoding)

        def per_tensor(x: Tensor) -> Tensor:
            x, scale, zero = ranged(x.float())
            return multiply(x, scale, zero, packed)

        if not by_token:
            return per_tensor
        sums = row_sums(codes, zeros) * scales
        out, width = matrix.shape

        def per_token(x: Tensor) -> Tensor:
            if x.numel() == width:
                product = per_tensor(x)
                return product if own_bias is None else product + own_bias
            x_by_tokens = x.reshape(-1, width)
            levels, token_scales, token_zeros = _by_tokens(x_by_tokens, inputs)
            product = multiply(levels, 1.0, 128 if token_zeros is None else 0, packed)
            return finished(product, token_zeros, token_scales, sums, own_bias).reshape(*x.shape[:-1], out)

        return per_token


def _by_token(encoding: InputEncoding) -> bool:
    return encoding.range == "dynamic" and encoding.granularity == "token"


def _by_tokens(x: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Levels ``(tokens, in)``, to be rounded and clipped to bytes, and scales and zero points ``(tokens, 1)``."""
    encoding = inputs.encoding
    if encoding.bits != 8 or encoding.clip is not None:
        quantized = inputs.quantized(x)
        return quantized.levels, no_infinity(quantized.scales), quantized.zero_points
    # the same in fewer passes, since the kernel rounds
    x, grid = x.float(), input_grid(encoding)
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    if encoding.symmetric:
        scales = (torch.maximum(high, -low) / grid.high).clamp_(min=LEAST_SCALE)
        return x / scales, no_infinity(scales), None
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scales = (high / grid.high - low / grid.high).clamp_(min=LEAST_SCALE)
    zero_points = grid.nearest(-low / scales)
    return (x / scales).add_(zero_points), no_infinity(scales), zero_points


_Ranged = Callable[[Tensor], tuple[Tensor, float, int]]
"""An input, clipped to its range, with its scale and the zero point of its unsigned codes."""


def _dynamic(encoding: InputEncoding) -> _Ranged:
    """The range of :func:`~lmcompress.numerics.activations.dynamic` in Python's numbers."""
    grid, clip, symmetric = input_grid(encoding), encoding.clip, encoding.symmetric

    def ranged(x: Tensor) -> tuple[Tensor, float, int]:
        ends = torch.aminmax(x)
        low, high = ends.min.item(), ends.max.item()
        if clip is not None and (low < -clip or high > clip):
            # NaN comes first in these, so that it is kept
            x, low, high = x.clamp(-clip, clip), max(low, -clip), min(high, clip)
        if symmetric:
            return x, _scale(_single(max(high, -low) / grid.high)), 128
        low, high = min(low, 0.0), max(high, 0.0)
        scale = _scale(_single(_single(high / grid.high) - _single(low / grid.high)))
        zero = min(round(-low / scale), grid.high) if math.isfinite(scale) else 0
        # beyond 8 bits the bytes of the kernel clip nothing
        if grid.high < 255:
            x = x.clamp(-zero * scale, (grid.high - zero) * scale)
        return x, scale, zero

    return ranged


def _static(inputs: Inputs) -> _Ranged:
    """The static range in Python's numbers; NaN in an input makes it NaN."""
    if inputs.scale is None:
        raise LmcompressError("a static range must have a scale, got none; is the checkpoint complete?")
    grid, given = input_grid(inputs.encoding), float(inputs.scale)
    zero = 0 if inputs.zero_point is None else int(inputs.zero_point)
    least, greatest = (grid.low - zero) * given, (grid.high - zero) * given

    def ranged(x: Tensor) -> tuple[Tensor, float, int]:
        ends = torch.aminmax(x)
        low, high = ends.min.item(), ends.max.item()
        if low < least or high > greatest:
            x = x.clamp(least, greatest)
        return x, given if low == low else math.nan, 128 if inputs.zero_point is None else zero

    return ranged


def _single(number: float) -> float:
    """The float32 nearest to a number: for two float32 divided in float64 it equals float32 division."""
    return ctypes.c_float(number).value


def _scale(scale: float) -> float:
    """A scale that can be used as a divisor, since if all values are 0 any will do; NaN for infinity."""
    if scale < LEAST_SCALE:
        return LEAST_SCALE
    return scale if math.isfinite(scale) else math.nan
