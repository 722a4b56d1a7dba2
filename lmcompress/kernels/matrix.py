"""The operands of a matmul: a matrix of packed codes, and how the input is quantized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from lmcompress.numerics.grids import Granularity, Grid, PerRow, PerTensor
from lmcompress.numerics.inputs import InputEncoding, quantize_input
from lmcompress.numerics.packing import Container, dequantize, packed_shape, unpack
from lmcompress.numerics.quantizers.base import Quantized


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix ``(out, in)`` of packed codes, as a module holds it; an embedding is ``(tokens, width)``.

    Attributes:
        packed: uint8, the bytes of :func:`~lmcompress.numerics.packing.pack`, flat or in their original shape.
        scales: float32, ``granularity.scale_shape(shape)``.
        zero_points: uint8 of the same shape, or ``None``.
        shape: out and in.
        grid: possible codes.
        container: storage of codes in bytes.
        granularity: which codes share a scale.
        trusted: whether codes and scales have already been checked for values that packing never produces: a check
            makes the host wait for a GPU, and no graph can hold it.

    Example:
        >>> import torch
        >>> codes = Matrix(torch.tensor([237, 81]).byte(), torch.ones(2, 1), None, (2, 5), Grid(-1, 3), "base3")
        >>> codes.values()
        tensor([[-1.,  0.,  1.,  1.,  1.],
                [-1., -1., -1., -1.,  0.]])
    """

    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None
    shape: tuple[int, int]
    grid: Grid
    container: Container
    granularity: Granularity = field(default_factory=PerRow)
    trusted: bool = False

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Bytes, scales and zero points."""
        return self.packed, self.scales, self.zero_points

    @property
    def layout(self) -> tuple[object, ...]:
        """What a prepacked matrix depends on besides the values of its tensors."""
        return self.shape, self.grid, self.container, self.granularity

    def whole(self, bias: Tensor | None) -> tuple[Matrix, Tensor | None]:
        """The matrix and the bias themselves: they are not stacks of several.

        Args:
            bias: ``(out,)`` or ``None``.
        """
        return self, bias

    def codes(self) -> Tensor:
        """The codes, ``(out, in)``, int8 where some are negative, else uint8.

        Raises:
            CheckpointError: If the bytes do not fit this shape and grid.
        """
        return unpack(self.packed, self.shape, self.grid, self.container, check=not self.trusted)

    def values(self) -> Tensor:
        """The dequantized matrix, ``(out, in)`` float32.

        Raises:
            CheckpointError: If bytes or scales do not fit this shape and grid.
        """
        return dequantize(
            self.codes(),
            self.scales,
            granularity=self.granularity,
            zero_points=self.zero_points,
            check=not self.trusted,
        )

    def block(self, start: int, stop: int) -> Matrix:
        """The rows from ``start`` to before ``stop``, without a copy."""
        return self._of_rows(lambda rows: rows[start:stop], min(stop, self.shape[0]) - start)

    def rows(self, ids: Tensor) -> Tensor:
        """Dequantized rows, as an embedding looks them up: only these are unpacked, without checks.

        Args:
            ids: any shape, int32 or int64.

        Returns:
            ``(*ids.shape, in)`` float32.

        Raises:
            IndexError: If an id is below 0 or beyond the rows.
        """
        flat = ids.reshape(-1)
        chosen = self._of_rows(lambda rows: rows.index_select(0, flat), flat.numel())
        return replace(chosen, trusted=True).values().reshape(*ids.shape, self.shape[1])

    def _of_rows(self, choose: Callable[[Tensor], Tensor], count: int) -> Matrix:
        shape = count, self.shape[1]
        packed = choose(self.packed.reshape(packed_shape(self.shape, self.container)))
        if isinstance(self.granularity, PerTensor):
            return replace(self, packed=packed, shape=shape)
        zero_points = None if self.zero_points is None else choose(self.zero_points)
        return replace(self, packed=packed, scales=choose(self.scales), zero_points=zero_points, shape=shape)


@dataclass(frozen=True)
class Encoding:
    """The description of an input without a checkpoint: an :class:`~lmcompress.numerics.inputs.InputEncoding`."""

    bits: Literal[4, 8] = 8
    symmetric: bool = False
    granularity: Literal["tensor", "token"] = "tensor"
    range: Literal["dynamic", "static"] = "dynamic"
    clip: float | None = None
    full: bool = False


@dataclass(frozen=True, eq=False)
class Inputs:
    """The quantization of a matmul's input.

    Attributes:
        encoding: quantization of the input.
        scale: one number, for static ranges.
        zero_point: one number, for static ranges that are not symmetric.
    """

    encoding: InputEncoding
    scale: Tensor | None = None
    zero_point: Tensor | None = None

    def quantized(self, x: Tensor) -> Quantized:
        """The quantized input, as in :func:`~lmcompress.numerics.inputs.quantize_input`."""
        return quantize_input(x, self.encoding, self.scale, self.zero_point)


Prepacked = Callable[[Tensor], Tensor]
"""A prepacked matrix: ``x (..., in) -> (..., out)``, float32 except for the reference with only weights quantized."""
