"""The reference: matmuls in floating point, on every device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmcompress.kernels.matrix import Inputs, Matrix, Prepacked


@dataclass(frozen=True)
class Reference:
    """Floating point: the quantized input times the dequantized matrix. The others are compared with it."""

    name: str = "reference"

    def refusal(self, matrix: Matrix, inputs: Inputs | None, dtype: torch.dtype, few: bool = False) -> str | None:
        """None: every matrix is accepted."""
        return None

    def prepack(self, matrix: Matrix, bias: Tensor | None, inputs: Inputs | None, dtype: torch.dtype) -> Prepacked:
        """The dequantized matrix: float32 if the input is quantized, otherwise in the input's dtype."""
        weight = matrix.values()
        if inputs is None:
            weight = weight.to(dtype)
            return lambda x: torch.nn.functional.linear(x, weight, None if bias is None else bias.to(dtype))
        return lambda x: float_linear(inputs.quantized(x).values, weight, bias)


def float_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """float32, whatever the autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
