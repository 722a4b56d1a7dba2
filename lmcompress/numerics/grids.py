"""Grids and granularities of quantized numbers: the possible codes, and which numbers share a scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError

Bits = Literal[1, 2, 3, 4, 8, "ternary"]
"""Precision of a quantized weight: bits, or ternary."""

BITS: tuple[Bits, ...] = (1, "ternary", 2, 3, 4, 8)


@dataclass(frozen=True)
class Grid:
    """The integers that codes may be: ``levels`` of them from ``low``, ``stride`` apart.

    A number is ``scale * code``, or ``scale * (code - zero_point)``. Every grid fits a signed or an unsigned byte, so
    that codes can be used directly in integer matmuls: also {-3, -1, 1, 3} of the four levels around 0 that
    ParetoQ has at 2 bits, in place of halves.

    Attributes:
        low: the lowest code.
        levels: number of codes, from 2 to 256.
        stride: distance between codes; 2 for grids without a zero, whose codes are odd.

    Raises:
        LmcompressError: If the number of levels or a code does not fit a byte.

    Example:
        >>> Grid(low=-3, levels=4, stride=2).high, symmetric_grid(4)
        (3, Grid(low=-7, levels=15, stride=1))
    """

    low: int
    levels: int
    stride: int = 1

    def __post_init__(self) -> None:
        if not 2 <= self.levels <= 256 or self.stride < 1:
            raise LmcompressError(
                f"a grid must have from 2 to 256 levels and a stride of 1 or more, got {self.levels} levels "
                f"with stride {self.stride}"
            )
        if not (-128 <= self.low and self.high <= 127) and not (self.low >= 0 and self.high <= 255):
            raise LmcompressError(
                f"codes must fit one byte, signed or not, got codes from {self.low} to {self.high}; use fewer bits"
            )

    @property
    def high(self) -> int:
        """The highest code."""
        return self.low + self.stride * (self.levels - 1)

    @property
    def dtype(self) -> torch.dtype:
        """``torch.int8`` if codes may be negative, else ``torch.uint8``."""
        return torch.int8 if self.low < 0 else torch.uint8

    def nearest(self, x: Tensor, *, overwrite: bool = False) -> Tensor:
        """The code nearest to each number, ties to the even step as in :func:`torch.round`.

        Args:
            x: in units of one code, any shape; NaN stays NaN.
            overwrite: whether the result may take the memory of ``x``.

        Returns:
            Codes as floats of ``x``'s dtype, never -0.
        """
        if self.levels == 2:
            # not by rounding: -1e-9 - 1 is -1 in float32, and a tiny negative number would turn positive
            middle = (self.low + self.high) / 2
            ends = (x < middle).to(x.dtype) * (self.low - self.high) + self.high
            return torch.where(x.isnan(), x, ends)
        phase = self.low % self.stride
        codes = x if self.stride == 1 else (x - phase) / self.stride
        codes = codes.round_() if overwrite or self.stride != 1 else codes.round()
        if self.stride != 1:
            codes.mul_(self.stride).add_(phase)
        # adding 0 makes 0 of -0, so that floats and integers give the same bits
        return codes.clamp_(self.low, self.high).add_(0.0)


def symmetric_grid(bits: Bits) -> Grid:
    """``2 ** bits - 1`` levels around 0 including 0: {-n, ..., n}; 2 bits and ternary are {-1, 0, 1}.

    Args:
        bits: from 2 up, or ``"ternary"``.

    Returns:
        The grid.

    Raises:
        LmcompressError: If the grid has 1 bit, or the bit-width cannot be packed.

    Reference:
        Tao et al. 2022 (QuantGPT), https://arxiv.org/abs/2203.10705: n = 2^(b-1) - 1.
    """
    check_bits(bits)
    if bits == 1:
        raise LmcompressError(
            "bits must be at least 2 for a grid with a zero, got 1; quantize to 1 bit with binary, laq or elastic"
        )
    half = 1 if bits == "ternary" else 2 ** (bits - 1) - 1
    return Grid(low=-half, levels=2 * half + 1)


def signed_grid(bits: Bits) -> Grid:
    """All ``2 ** bits`` two's complement integers, as in LSQ: 2 bits is {-2, -1, 0, 1}; ternary is {-1, 0, 1}.

    Args:
        bits: from 2 up, or ``"ternary"``.

    Returns:
        The grid.

    Raises:
        LmcompressError: If the grid has 1 bit, or the bit-width cannot be packed.
    """
    if bits == "ternary" or bits == 1:
        return symmetric_grid(bits)
    check_bits(bits)
    return Grid(low=-(2 ** (bits - 1)), levels=2**bits)


def unsigned_grid(bits: Bits) -> Grid:
    """``{0, ..., 2 ** bits - 1}``, for numbers with a zero point; ternary is {0, 1, 2}.

    Args:
        bits: any, or ``"ternary"``.

    Returns:
        The grid.

    Raises:
        LmcompressError: If the bit-width cannot be packed.
    """
    check_bits(bits)
    return Grid(low=0, levels=3 if bits == "ternary" else 2**bits)


BINARY_GRID = Grid(low=-1, levels=2, stride=2)
"""{-1, 1}."""

STRETCHED_GRID = Grid(low=-3, levels=4, stride=2)
"""{-3, -1, 1, 3}: four levels around 0, ParetoQ's at 2 bits."""


def check_bits(bits: object, allowed: Sequence[Bits] = BITS) -> None:
    """Refuses a bit-width that is not among ``allowed``.

    Args:
        bits: the given bit-width.
        allowed: the bit-widths supported here.

    Raises:
        LmcompressError: If it is not among them.
    """
    # True == 1 and 2.0 == 2, and neither is a bit-width
    if isinstance(bits, (bool, float)) or bits not in allowed:
        raise LmcompressError(f"bits must be one of {', '.join(map(str, allowed))}, got {bits!r}")


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor; scales have shape ``(1, 1)``."""

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """``(1, 1)``."""
        return 1, 1

    def split(self, x: Tensor) -> Tensor:
        """The tensor itself."""
        return x

    def axes(self, ndim: int) -> tuple[int, ...]:
        """Axes of the result of :meth:`split` that share a scale."""
        return tuple(range(ndim))

    def spread(self, scales: Tensor, shape: Sequence[int]) -> Tensor:
        """Scales shaped to broadcast over the result of :meth:`split` for a tensor of ``shape``."""
        return scales.reshape((1,) * len(shape))


PER_TENSOR = PerTensor()
"""The default granularity."""


@dataclass(frozen=True)
class PerRow:
    """One scale for each row (first axis): for a weight as ``(out, in)`` one per output; scales ``(rows, 1)``.

    GPT-2's ``Conv1D`` stores ``(in, out)``: use its ``weight_view``, or the scales lie along the inputs.
    """

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """``(rows, 1)``; a tensor of fewer than two axes has no rows and is refused."""
        _check_matrix(self, shape)
        return shape[0], 1

    def split(self, x: Tensor) -> Tensor:
        """The tensor itself."""
        return x

    def axes(self, ndim: int) -> tuple[int, ...]:
        """All axes but the first."""
        return tuple(range(1, ndim))

    def spread(self, scales: Tensor, shape: Sequence[int]) -> Tensor:
        """Scales shaped to broadcast over a tensor of ``shape``."""
        return scales.reshape(-1, *(1,) * (len(shape) - 1))


@dataclass(frozen=True)
class PerGroup:
    """One scale for each ``size`` neighbours of a row; scales ``(rows, groups per row)``.

    A row length that ``size`` does not divide is refused, never padded: the last group would have another meaning.

    Attributes:
        size: numbers that share a scale, at least 1.

    Raises:
        LmcompressError: If ``size`` is not an integer >= 1.
    """

    size: int

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise LmcompressError(f"the size of a group must be a whole number from 1 up, got {self.size!r}")

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """``(rows, groups per row)``; a row length that the size does not divide is refused, with the nearest."""
        _check_matrix(self, shape)
        row = math.prod(shape[1:])
        if row % self.size:
            fitting = max(size for size in range(1, self.size + 1) if row % size == 0)
            raise LmcompressError(
                f"the size of a group must divide the length of a row, got {self.size} for rows of {row} in a tensor "
                f"of shape {tuple(shape)}; rows are not padded. Use PerGroup({fitting}) or PerRow()."
            )
        return shape[0], row // self.size

    def split(self, x: Tensor) -> Tensor:
        """``(rows, groups, size)``."""
        return x.reshape(*self.scale_shape(x.shape), self.size)

    def axes(self, ndim: int) -> tuple[int, ...]:
        """The last axis."""
        return (ndim - 1,)

    def spread(self, scales: Tensor, shape: Sequence[int]) -> Tensor:
        """``(rows, groups, 1)``."""
        return scales.unsqueeze(-1)


@dataclass(frozen=True)
class PerToken:
    """For activations: one scale for each vector along the last axis; scales ``(all leading axes together, 1)``."""

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """``(tokens, 1)``; a single number is refused."""
        if not shape:
            raise LmcompressError("PerToken needs a tensor with at least one axis, got a single number; use PerTensor")
        return math.prod(shape[:-1]), 1

    def split(self, x: Tensor) -> Tensor:
        """The tensor itself."""
        return x

    def axes(self, ndim: int) -> tuple[int, ...]:
        """The last axis."""
        return (ndim - 1,)

    def spread(self, scales: Tensor, shape: Sequence[int]) -> Tensor:
        """``(..., 1)``."""
        return scales.reshape(*shape[:-1], 1)


Granularity = PerTensor | PerRow | PerGroup | PerToken
"""Which numbers share a scale. Scales, zero points and learned states are always matrices, ``scale_shape(shape)``."""


def mean_abs(x: Tensor, granularity: Granularity) -> Tensor:
    """Mean magnitude of the numbers that share a scale.

    Args:
        x: any shape and floating dtype.
        granularity: which numbers share a scale.

    Returns:
        ``granularity.scale_shape(x.shape)`` float32 without gradient; 0 for empty groups.

    Example:
        >>> mean_abs(torch.tensor([[1.0, -3.0], [0.0, 0.5]]), PerRow())
        tensor([[2.0000],
                [0.2500]])
    """
    return reduced(x, granularity, lambda split, axes: split.abs().mean(dim=axes))


def max_abs(x: Tensor, granularity: Granularity) -> Tensor:
    """Largest magnitude of the numbers that share a scale; see :func:`mean_abs`."""
    low, high = extremes(x, granularity)
    return torch.maximum(high, -low)


def extremes(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of the numbers that share a scale: two tensors; see :func:`mean_abs`."""
    low = reduced(x, granularity, lambda split, axes: split.amin(dim=axes))
    return low, reduced(x, granularity, lambda split, axes: split.amax(dim=axes))


def reduced(x: Tensor, granularity: Granularity, f: Callable[[Tensor, tuple[int, ...]], Tensor]) -> Tensor:
    """A statistic of the numbers that share a scale, in float32 and without gradient; 0 for empty groups.

    Args:
        x: any shape and floating dtype.
        granularity: which numbers share a scale.
        f: function of ``(numbers, axes)`` that returns one value per scale.

    Returns:
        ``granularity.scale_shape(x.shape)`` float32.
    """
    shape = granularity.scale_shape(x.shape)
    if x.numel() == 0:
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    split = granularity.split(x.detach().float())
    return f(split, granularity.axes(split.dim())).reshape(shape)


def _check_matrix(granularity: PerRow | PerGroup, shape: Sequence[int]) -> None:
    if len(shape) < 2:
        raise LmcompressError(
            f"{granularity} needs a tensor with at least two axes, got shape {tuple(shape)}; use PerTensor()"
        )
