"""Matmuls without a prepacked matrix: rows are unpacked one block at a time in every call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmcompress.kernels.int_mm import IntMM
from lmcompress.kernels.integers import input_bytes
from lmcompress.kernels.matrix import Inputs, Matrix
from lmcompress.kernels.reference import Reference, float_linear

BLOCK_WEIGHTS = 1 << 20


@dataclass(frozen=True, eq=False)
class BlockwiseMatmul:
    """A matmul without a prepacked matrix: rows are unpacked one block at a time in every call.

    Attributes:
        matrix: the weights.
        bias: ``(out,)`` or None.
        inputs: quantization of the input.
        integers: whether to multiply int8 codes, otherwise floats.
    """

    matrix: Matrix
    bias: Tensor | None
    inputs: Inputs | None
    integers: bool

    def __call__(self, x: Tensor) -> Tensor:
        out, width = self.matrix.shape
        flat, matrix = x.reshape(-1, width), replace(self.matrix, trusted=True)
        multiply: Callable[[Matrix, Tensor | None], Tensor]
        if self.integers and self.inputs is not None:
            parts = input_bytes(self.inputs.quantized(x))

            def multiply(rows: Matrix, bias: Tensor | None) -> Tensor:
                prepacked = IntMM().prepack(rows, bias, self.inputs, x.dtype)
                return prepacked.of_codes(*parts)
        elif self.inputs is not None:
            values = self.inputs.quantized(x).values.reshape(-1, width)

            def multiply(rows: Matrix, bias: Tensor | None) -> Tensor:
                return float_linear(values, rows.values(), bias)
        else:

            def multiply(rows: Matrix, bias: Tensor | None) -> Tensor:
                return Reference().prepack(rows, bias, None, x.dtype)(flat)

        result = torch.empty(flat.shape[0], out, dtype=x.dtype, device=x.device)
        step = max(1, BLOCK_WEIGHTS // max(1, width))
        for start in range(0, out, step):
            stop = min(start + step, out)
            bias = None if self.bias is None else self.bias[start:stop]
            result[:, start:stop] = multiply(matrix.block(start, stop), bias)
        return result.reshape(*x.shape[:-1], out)
