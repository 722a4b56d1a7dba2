"""FBGEMM's matmul of float32 with float16, of codes: weights of which only the codes are quantized (CPU, x86)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError
from lmcompress.kernels.base import UNAVAILABLE, unavailable
from lmcompress.kernels.integers import by_row, signed_codes
from lmcompress.kernels.matrix import Inputs, Matrix, Prepacked
from lmcompress.kernels.reference import float_linear
from lmcompress.numerics.grids import Grid, PerGroup

# of float32's rounding in sums of a few hundred terms
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class HalfCodes:
    """Inputs in float32 times codes in float16, which has every code exactly; scales of rows multiply the result.

    The operation converts codes to float32 on the way, so that only sums are rounded, in another order than the
    reference's. It reads half as many bytes as a matmul of floats, on which the time of decoding depends.

    Attributes:
        name: its name.
    """

    name: str = "fbgemm16"

    def refusal(self, matrix: Matrix, inputs: Inputs | None, dtype: torch.dtype, few: bool = False) -> str | None:
        """Why this kernel does not accept a matrix, or an input of this dtype; ``None`` if it does."""
        if inputs is not None:
            return "inputs are quantized, and it multiplies floats"
        if isinstance(matrix.granularity, PerGroup):
            return "scales belong to groups, and a sum runs over whole rows"
        if dtype == torch.bfloat16:
            return None if few else "many tokens in bfloat16 are multiplied faster in bfloat16"
        return None if dtype == torch.float32 else f"inputs are {dtype}, and it multiplies torch.float32"

    def prepack(self, matrix: Matrix, bias: Tensor | None, inputs: Inputs | None, dtype: torch.dtype) -> Prepacked:
        """FBGEMM's own layout, two bytes for each weight."""
        if inputs is not None:
            raise LmcompressError("fbgemm16 multiplies floats, got quantized inputs; use the reference")
        codes, zeros = signed_codes(matrix)
        values = codes.float() if zeros is None else codes.float() - zeros.unsqueeze(1)
        packed = torch.ops.quantized.linear_prepack_fp16(values, None)
        # the overload itself: a packet looks it up in every call
        multiply = torch.ops.quantized.linear_dynamic_fp16.default
        scales = by_row(matrix.scales, matrix)
        own_bias = None if bias is None else bias.detach().float()

        def scaled(x: Tensor) -> Tensor:
            y = multiply(x.float(), packed)
            return y.mul_(scales) if own_bias is None else torch.addcmul(own_bias, y, scales, out=y)

        return scaled

    def trouble(self, device: torch.device) -> str | None:
        """The reason why it does not work on a device: unsupported, or wrong results.

        Args:
            device: the device.

        Returns:
            ``None`` if it works.
        """
        if device.type != "cpu":
            return "for CPUs"
        out, width = 24, 80
        codes = (torch.arange(out * width) * 7 % 256).to(torch.uint8).reshape(out, width)
        zeros = (torch.arange(out) * 11 % 256).to(torch.uint8).reshape(out, 1)
        matrix = Matrix(codes, torch.linspace(0.5, 2.0, out).reshape(out, 1), zeros, (out, width), Grid(0, 256), 8)
        x, bias = torch.linspace(-1.0, 1.0, 10 * width).reshape(10, width), torch.linspace(-1.0, 1.0, out)
        try:
            with torch.inference_mode():
                for tokens in (1, 10):
                    given = self.prepack(matrix, bias, None, torch.float32)(x[:tokens])
                    wanted = float_linear(x[:tokens], matrix.values(), bias)
                    if not torch.allclose(given, wanted, rtol=_TOLERANCE, atol=_TOLERANCE * float(wanted.abs().max())):
                        return "its results are wrong on this device"
        except UNAVAILABLE as error:
            return unavailable(error)
        return None
