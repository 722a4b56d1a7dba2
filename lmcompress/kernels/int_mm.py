"""torch's own int8 matmul, ``torch._int_mm`` (CPU and CUDA)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmcompress.kernels.integers import Int8Matmul, IntegerKernel, by_row, row_sums, signed_codes
from lmcompress.kernels.matrix import Inputs, Matrix


@dataclass(frozen=True)
class IntMM(IntegerKernel):
    """torch's own int8 matmul, on CPU and CUDA; the input is quantized before it.

    Attributes:
        name: its name.
    """

    name: str = "int_mm"

    def prepack(self, matrix: Matrix, bias: Tensor | None, inputs: Inputs | None, dtype: torch.dtype) -> Int8Matmul:
        """The codes as int8, padded with zeros where the operation needs it."""
        codes, zeros = signed_codes(matrix)
        sums, scales = row_sums(codes, zeros), by_row(matrix.scales, matrix)
        out, width = matrix.shape
        if codes.device.type == "cuda":
            # more than 16 rows on the left and multiples of 8 otherwise are required, which some versions of cuBLAS
            # multiply incorrectly for few rows (pytorch/pytorch#107671, #169956): zeros up to what its fast kernels use
            least, columns, rows = 32, -width % 16, -out % 16
        else:
            # the stride of an axis of size 1 is arbitrary, and oneDNN gives wrong results then (pytorch/pytorch#195066)
            least, columns, rows = 2, int(width == 1), 0
        right = torch.nn.functional.pad(codes, (0, columns, 0, rows)).t()

        def multiply(x: Tensor) -> Tensor:
            tokens = x.shape[0]
            if columns or tokens < least:
                x = torch.nn.functional.pad(x, (0, columns, 0, max(0, least - tokens)))
            return torch._int_mm(x, right)[:tokens, :out]

        return Int8Matmul(multiply, out, zeros, sums, scales, bias, inputs)
