"""oneDNN's int8 matmul (CPU)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmcompress.kernels.integers import Int8Matmul, IntegerKernel, by_row, row_sums, signed_codes
from lmcompress.kernels.matrix import Inputs, Matrix, Prepacked


@dataclass(frozen=True)
class Onednn(IntegerKernel):
    """oneDNN's int8 matmul, in its own layout; the input is quantized before it.

    Attributes:
        name: its name.
    """

    name: str = "onednn"

    def prepack(self, matrix: Matrix, bias: Tensor | None, inputs: Inputs | None, dtype: torch.dtype) -> Prepacked:
        """oneDNN's own layout, a byte for each weight."""
        codes, zeros = signed_codes(matrix)
        scales = by_row(matrix.scales, matrix)
        packed = torch.ops.onednn.qlinear_prepack(codes, None)
        pointwise = torch.ops.onednn.qlinear_pointwise.default
        none = torch.zeros(codes.shape[0], dtype=torch.int64)

        def multiply(x: Tensor) -> Tensor:
            return pointwise(x, 1.0, 0, packed, scales, none, None, 1.0, 0, torch.float32, "none", [], "")

        return Int8Matmul(multiply, matrix.shape[0], zeros, row_sums(codes, zeros), scales, bias, inputs, scaled=True)
