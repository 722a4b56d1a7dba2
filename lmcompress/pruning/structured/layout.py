"""Units flattened into one vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError
from lmcompress.pruning.structured.units import Part, Units


class Layout:
    """The position of each unit in one flat vector, so that thousands of gates are one tensor to the optimizer.

    Args:
        shapes: number of units of each tensor of each part.
    """

    def __init__(self, shapes: Mapping[Part, Sequence[int]]) -> None:
        self.shapes: dict[Part, tuple[int, ...]] = {part: tuple(sizes) for part, sizes in shapes.items()}
        self.size = sum(sum(sizes) for sizes in self.shapes.values())

    @classmethod
    def of(cls, units: Units) -> Layout:
        """The layout of given units.

        Args:
            units: units of any values.
        """
        return cls({part: [t.shape[-1] for t in units.tensors(part)] for part in units.parts()})

    def split(self, vector: Tensor) -> Units:
        """Units as views of the vector's last axis.

        Args:
            vector: ``(..., size)``.

        Returns:
            Units that share the vector's memory and its gradient.

        Raises:
            LmcompressError: If the vector has another size.
        """
        if vector.shape[-1] != self.size:
            raise LmcompressError(f"the vector must have {self.size} entries, got {vector.shape[-1]}")
        pieces = iter(vector.split([n for sizes in self.shapes.values() for n in sizes], dim=-1))
        state = {
            (f"{part}.{i}" if part in ("heads", "neurons") else part): next(pieces)
            for part, sizes in self.shapes.items()
            for i in range(len(sizes))
        }
        return Units.from_state_dict(state)

    def join(self, units: Units) -> Tensor:
        """The inverse of :meth:`split`, as a copy.

        Args:
            units: with this layout's parts.

        Raises:
            LmcompressError: If they have other parts or sizes.
        """
        state = units.state_dict()
        pieces = []
        for part, sizes in self.shapes.items():
            for i, n in enumerate(sizes):
                tensor = state.get(f"{part}.{i}" if part in ("heads", "neurons") else part)
                if tensor is None or tensor.shape[-1] != n:
                    raise LmcompressError(f"units must have {n} {part} in block {i}, got other units")
                pieces.append(tensor)
        return torch.cat(pieces, dim=-1)
