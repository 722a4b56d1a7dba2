"""FBGEMM's int8 matmul, which quantizes the input itself (CPU, x86)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError
from lmcompress.kernels.integers import IntegerKernel, by_row, finished, row_sums, signed_codes
from lmcompress.kernels.matrix import Inputs, Matrix, Prepacked
from lmcompress.kernels.ranges import by_token, range_of, token_levels


@dataclass(frozen=True)
class Fbgemm(IntegerKernel):
    """FBGEMM's int8 matmul: quantizes the input, multiplies and scales in one pass.

    Attributes:
        name: its name.
    """

    name: str = "fbgemm"

    def prepack(self, matrix: Matrix, bias: Tensor | None, inputs: Inputs | None, dtype: torch.dtype) -> Prepacked:
        """FBGEMM's own layout, a byte for each weight."""
        if inputs is None:
            raise LmcompressError("fbgemm multiplies quantized inputs, got none; use the reference")
        codes, zeros = signed_codes(matrix)
        scales, tokens_apart = by_row(matrix.scales, matrix), by_token(inputs.encoding)
        zero_points = torch.zeros(codes.shape[0], dtype=torch.int64) if zeros is None else zeros.long()
        with warnings.catch_warnings():
            # torch 2.13 announces the removal of these tensors; the self-test will then find them missing
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
            quantized = torch._make_per_channel_quantized_tensor(codes, scales.double(), zero_points, 0)
            own_bias = None if bias is None else bias.detach().float()
            packed = torch.ops.quantized.linear_prepack(quantized, None if tokens_apart else own_bias)
        # the overload itself: a packet looks it up in every call
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        measured = range_of(inputs)

        def per_tensor(x: Tensor) -> Tensor:
            x = x.float()
            span = measured(x)
            return multiply(span.cut(x), span.scale, span.zero, packed)

        if not tokens_apart:
            return per_tensor
        sums = row_sums(codes, zeros) * scales
        out, width = matrix.shape

        def per_token(x: Tensor) -> Tensor:
            if x.numel() == width:
                product = per_tensor(x)
                return product if own_bias is None else product + own_bias
            levels, token_scales, token_zeros = token_levels(x.reshape(-1, width), inputs)
            product = multiply(levels, 1.0, 128 if token_zeros is None else 0, packed)
            return finished(product, token_zeros, token_scales, sums, own_bias).reshape(*x.shape[:-1], out)

        return per_token
