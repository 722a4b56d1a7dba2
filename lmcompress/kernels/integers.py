"""Shared parts of int8 matmuls: operands from codes of any width, and scales and zero points applied afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError
from lmcompress.kernels.matrix import Inputs, Matrix
from lmcompress.numerics.grids import PerGroup
from lmcompress.numerics.quantizers.base import Quantized

_INT32 = 2**31 - 1


@dataclass(frozen=True)
class IntegerKernel:
    """Base of kernels with int8 operands.

    Attributes:
        greatest: largest magnitude of codes that does not saturate on this processor.
    """

    greatest: int = 128

    def refusal(self, matrix: Matrix, inputs: Inputs | None, dtype: torch.dtype, few: bool = False) -> str | None:
        """Why a matmul is not an integer one, or its codes or sums are too large; ``None`` if the kernel takes it."""
        if inputs is None:
            return "only weights are quantized"
        if isinstance(matrix.granularity, PerGroup):
            return "scales belong to groups, and an integer sum runs over whole rows"
        # as in `signed_codes`
        reach = 128 if matrix.grid.high > 127 else max(abs(matrix.grid.low), matrix.grid.high)
        if reach > self.greatest:
            return f"codes up to {reach} may saturate on this processor"
        low, high = matrix.grid.low, matrix.grid.high
        # from its zero point a code is at most as far as the grid is wide; an input's byte is at most 255 from its own
        most = _INT32 // (255 * (max(abs(low), high) if matrix.zero_points is None else high - min(low, 0)))
        if matrix.shape[1] > most:
            return f"sums over {matrix.shape[1]:,} columns may overflow 32 bits, which hold {most:,} of them"
        return None


@dataclass(frozen=True, eq=False)
class Int8Matmul:
    """An int8 matmul ``(tokens, in) -> (tokens, out)`` between the quantizer before and the scales after.

    Attributes:
        multiply: returns int32.
        out: rows of the matrix.
        zeros: ``(out,)`` int32, zero points of rows, or ``None``.
        sums: ``(out,)`` int32, sums of codes minus zero points.
        scales: ``(out,)`` float32.
        bias: ``(out,)`` or None.
        inputs: quantization of the input.
    """

    multiply: Callable[[Tensor], Tensor]
    out: int
    zeros: Tensor | None
    sums: Tensor
    scales: Tensor
    bias: Tensor | None
    inputs: Inputs | None

    def __call__(self, x: Tensor) -> Tensor:
        if self.inputs is None:
            raise LmcompressError("integers multiply quantized inputs, got none; use the reference")
        codes, scales, zero_points = input_bytes(self.inputs.quantized(x))
        return self.of_codes(codes, scales, zero_points).reshape(*x.shape[:-1], self.out)

    def of_codes(self, x: Tensor, scales: Tensor, zero_points: Tensor | None) -> Tensor:
        """``(tokens, out)`` float32 from int8 codes ``(tokens, in)``, their scales and zero points."""
        product = self.multiply(x)
        if self.zeros is not None:
            product = product - x.sum(dim=1, keepdim=True, dtype=torch.int32) * self.zeros
        if zero_points is not None:
            product = product - zero_points * self.sums
        return finished(product * self.scales, None, scales, self.sums, self.bias)


def by_row(numbers: Tensor, matrix: Matrix) -> Tensor:
    """Scales or zero points, one for each row, ``(out,)``."""
    return numbers.reshape(-1).expand(matrix.shape[0]).contiguous()


def signed_codes(matrix: Matrix) -> tuple[Tensor, Tensor | None]:
    """Codes as int8 ``(out, in)``, and the remaining zero points of rows ``(out,)`` int32, if any."""
    codes, grid = matrix.codes(), matrix.grid
    zeros = None if matrix.zero_points is None else by_row(matrix.zero_points, matrix)
    if codes.dtype == torch.int8:
        return codes, None if zeros is None else zeros.int()
    if grid.high <= 127:
        # for codes and zero points below 128 the difference fits a byte
        signed = codes.to(torch.int8)
        return (signed, None) if zeros is None else (signed - zeros.to(torch.int8).unsqueeze(1), None)
    zeros = torch.zeros(matrix.shape[0], dtype=torch.int32, device=codes.device) if zeros is None else zeros.int()
    # flipping the first bit subtracts 128
    return (codes ^ 128).view(torch.int8), zeros - 128


def row_sums(codes: Tensor, zeros: Tensor | None) -> Tensor:
    """Sums of codes minus zero points, ``(out,)`` int32: the effect of shifting the input by 1."""
    sums = codes.sum(dim=1, dtype=torch.int32)
    return sums if zeros is None else sums - codes.shape[1] * zeros


def input_bytes(quantized: Quantized) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes ``(tokens, in)`` int8; scales ``(tokens or 1, 1)``, and zero points, same shape, int32 or ``None``."""
    levels = quantized.levels.reshape(-1, quantized.levels.shape[-1])
    scales, zero_points = no_infinity(quantized.scales), quantized.zero_points
    if zero_points is None:
        return levels.to(torch.int8), scales, None
    if quantized.grid.high <= 127:
        return levels.to(torch.int8), scales, zero_points.int()
    return (levels - 128).to(torch.int8), scales, zero_points.int() - 128


def no_infinity(scales: Tensor) -> Tensor:
    """Scales with NaN in place of infinity, which times wrong codes might be finite."""
    # the remainder by infinity is the number itself
    return scales.fmod(torch.inf)


def finished(product: Tensor, zero_points: Tensor | None, scales: Tensor, sums: Tensor, bias: Tensor | None) -> Tensor:
    """``(product - zero point * sums) * scale + bias``, in place; scales and zero points of tokens, sums of rows."""
    if zero_points is not None:
        product.addcmul_(zero_points.float(), sums, value=-1.0)
    # one pass for both
    return product.mul_(scales) if bias is None else torch.addcmul(bias.float(), product, scales, out=product)
