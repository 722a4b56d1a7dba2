"""Matrices whose rows follow each other: one operand of a matmul, without a copy of their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmcompress.kernels.matrix import Matrix
from lmcompress.numerics.grids import Granularity, PerRow, PerTensor
from lmcompress.numerics.packing import packed_shape


@dataclass(frozen=True, eq=False)
class Stack:
    """Matrices with as many columns and the same kind of codes, one below the other.

    Attributes:
        parts: at least one; :meth:`fits` says which.
        biases: ``(rows,)`` for each, or none at all.
    """

    parts: tuple[Matrix, ...]
    biases: tuple[Tensor, ...] = ()

    @staticmethod
    def fits(parts: Sequence[Matrix]) -> bool:
        """Whether matrices can be one: columns, codes, their bytes, scales' granularity and device are the same.

        Args:
            parts: the matrices.
        """
        kinds = {
            (
                part.shape[1],
                part.grid,
                part.container,
                part.granularity,
                part.zero_points is None,
                part.packed.device,
            )
            for part in parts
        }
        return len(kinds) == 1

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors of all parts."""
        return *(tensor for part in self.parts for tensor in part.tensors), *self.biases

    @property
    def layout(self) -> tuple[object, ...]:
        """What a prepacked matrix depends on besides the values of its tensors."""
        return tuple(part.layout for part in self.parts)

    @property
    def granularity(self) -> Granularity:
        """Which codes of a part share a scale."""
        return self.parts[0].granularity

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of all parts, and columns."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def whole(self, bias: Tensor | None = None) -> tuple[Matrix, Tensor | None]:
        """One matrix and one bias, which are copies.

        Args:
            bias: without effect; see ``biases``.

        Returns:
            A matrix with a scale for each row where each part has one, and ``(out,)`` or ``None``.
        """
        first = self.parts[0]
        single = isinstance(first.granularity, PerTensor)

        def rows(numbers: Tensor, part: Matrix) -> Tensor:
            return numbers.reshape(1, 1).expand(part.shape[0], 1) if single else numbers

        packed = [part.packed.reshape(packed_shape(part.shape, part.container)) for part in self.parts]
        zeros = [rows(part.zero_points, part) for part in self.parts if part.zero_points is not None]
        matrix = Matrix(
            torch.cat(packed),
            torch.cat([rows(part.scales, part) for part in self.parts]),
            torch.cat(zeros) if zeros else None,
            self.shape,
            first.grid,
            first.container,
            PerRow() if single else first.granularity,
            all(part.trusted for part in self.parts),
        )
        return matrix, torch.cat([one.detach() for one in self.biases]) if self.biases else None


Operand = Matrix | Stack
"""What a matmul multiplies by."""
