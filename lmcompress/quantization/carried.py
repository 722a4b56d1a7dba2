"""Codes and scales that follow the rows of a matrix while the model is cut."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmcompress.checkpoint.places import Packable
from lmcompress.checkpoint.schema import ActivationEncoding
from lmcompress.errors import LmcompressError
from lmcompress.nn.packed import InputRange
from lmcompress.numerics.grids import Granularity, Grid, PerRow
from lmcompress.numerics.packing import dequantize
from lmcompress.numerics.quantizers.base import Quantized
from lmcompress.quantization.packing import AttentionRanges
from lmcompress.quantization.planning import Planned


@dataclass(frozen=True, eq=False)
class FrozenCodes:
    """The state of the model before it is cut."""

    reference: list[Tensor]
    bytes_before: int
    attention: AttentionRanges


@dataclass(frozen=True, eq=False)
class CarriedCodes:
    """Reconstructs codes from plain weights after a cut."""

    planned: Planned
    scales: Tensor
    zero_points: Tensor | None
    grid: Grid
    granularity: Granularity
    inputs: ActivationEncoding | None
    input_range: InputRange | None
    error: float

    def rows(self, keep: Tensor) -> CarriedCodes:
        """The entries of some rows.

        Args:
            keep: numbers of the rows.

        Returns:
            A new one.
        """
        if not isinstance(self.granularity, PerRow):
            return self
        keep = keep.to(self.scales.device)
        zeros = None if self.zero_points is None else self.zero_points[keep]
        return replace(self, scales=self.scales[keep], zero_points=zeros)

    def packable(self, weight: Tensor, path: str) -> Packable:
        """Codes of weights that are on the grid.

        Args:
            weight: ``(out, in)``.
            path: path of the module in the error.

        Returns:
            The codes, and the quantization of the input.

        Raises:
            LmcompressError: If some weights are not on the grid.
        """
        values = weight.detach().float()
        steps = values / torch.where(self.scales > 0, self.scales, torch.inf)
        levels = self.grid.nearest(steps if self.zero_points is None else steps.round() + self.zero_points.float())
        again = dequantize(levels, self.scales, granularity=self.granularity, zero_points=self.zero_points)
        if not torch.equal(again.to(weight.dtype), weight.detach()):
            raise LmcompressError(
                f"{path} must have its quantized values when it is packed, something has changed it since freeze(); "
                "finish pruning and quantization by CompressionTrainer.finish()"
            )
        quantized = Quantized(
            again, self.scales, self.zero_points, self.grid, self.granularity, self.granularity.split(levels), values
        )
        return Packable(quantized, self.inputs, self.input_range)
