"""oneDNN's int8 matmul (CPU)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError
from lmcompress.kernels.integers import IntegerKernel, by_row, finished, row_sums, signed_codes
from lmcompress.kernels.matrix import Inputs, Matrix
from lmcompress.kernels.posts import Post, activated
from lmcompress.kernels.ranges import Range, by_token, range_of, to_bytes, token_levels

# the name and the algorithm of a function in oneDNN's terms
_POSTS: dict[Post | None, tuple[str, str]] = {
    None: ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}


@dataclass(frozen=True)
class Onednn(IntegerKernel):
    """oneDNN's int8 matmul of bytes, in its own layout: scales, bias and a GELU are applied in the same pass.

    Codes of the input are unsigned: for signed ones with scales this operation takes oneDNN's unoptimized loops, 600
    times as slow as float32 (oneDNN 3.7, AVX-512 without AMX).

    Attributes:
        name: its name.
    """

    name: str = "onednn"

    def prepack(self, matrix: Matrix, bias: Tensor | None, inputs: Inputs | None, dtype: torch.dtype) -> OnednnMatmul:
        """oneDNN's own layout, a byte for each weight."""
        if inputs is None:
            raise LmcompressError("onednn multiplies quantized inputs, got none; use the reference")
        return OnednnMatmul(self.prepack_for_bytes(matrix, bias), inputs, range_of(inputs))

    def prepack_for_bytes(self, matrix: Matrix, bias: Tensor | None) -> OnednnBytes:
        """The same, for inputs that are quantized elsewhere."""
        codes, zeros = signed_codes(matrix)
        scales = by_row(matrix.scales, matrix)
        return OnednnBytes(
            Product(codes, scales),
            matrix.shape[1],
            None if zeros is None else zeros * scales,
            row_sums(codes, zeros) * scales,
            None if bias is None else bias.detach().float(),
        )


class Product:
    """The operation with one matrix: bytes times codes, times scales of rows.

    Args:
        codes: ``(out, in)`` int8.
        scales: ``(out,)`` float32.
    """

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self._packed = torch.ops.onednn.qlinear_prepack(codes, None)
        # the overload itself: a packet looks it up in every call
        self._pointwise = torch.ops.onednn.qlinear_pointwise.default
        self._scales, self._zeros = scales, torch.zeros(codes.shape[0], dtype=torch.int64)

    def __call__(
        self,
        codes: Tensor,
        scale: float,
        zero: int,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        post: Post | None = None,
        span: tuple[float, int] = (1.0, 0),
    ) -> Tensor:
        """The result in ``dtype``, ``(..., out)``.

        Args:
            codes: ``(..., in)`` uint8.
            scale: scale of all of them.
            zero: the byte of 0.
            bias: ``(out,)`` float32.
            dtype: float32, bfloat16, or uint8 for codes of the result.
            post: a function of the result.
            span: scale of these codes, and the byte of 0.

        Returns:
            The matmul.
        """
        name, algorithm = _POSTS[post]
        return self._pointwise(
            codes, scale, zero, self._packed, self._scales, self._zeros, bias, *span, dtype, name, [], algorithm
        )


@dataclass(frozen=True, eq=False)
class OnednnBytes:
    """A prepacked matrix for inputs that are bytes.

    Attributes:
        product: the operation.
        width: columns of the matrix.
        zeros: ``(out,)`` float32, zero points of rows times their scales, or ``None``.
        sums: ``(out,)`` float32, sums of codes minus zero points, times scales.
        bias: ``(out,)`` float32, or ``None``.
    """

    product: Product
    width: int
    zeros: Tensor | None
    sums: Tensor
    bias: Tensor | None

    def one_range(self, codes: Tensor, scale: float, zero: int, dtype: torch.dtype, post: Post | None) -> Tensor:
        """``(tokens, out)`` from codes ``(tokens, in)`` of one range: bfloat16 if that is asked for, else float32."""
        if self.zeros is None:
            written = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
            return self.product(codes, scale, zero, self.bias, written, post)
        y = self.product(codes, scale, zero, self.bias)
        return activated(y.addcmul_(self._right(codes, zero), self.zeros, value=-scale), post)

    def by_token(self, codes: Tensor, scales: Tensor, zero_points: Tensor | None, post: Post | None) -> Tensor:
        """``(tokens, out)`` float32 from codes of as many ranges as tokens, around 128 without zero points."""
        zero = 128 if zero_points is None else 0
        y = self.product(codes, 1.0, zero)
        if self.zeros is not None:
            y.addcmul_(self._right(codes, zero), self.zeros, value=-1.0)
        return activated(finished(y, zero_points, scales, self.sums, self.bias), post)

    def of_bytes(
        self, codes: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: torch.dtype, post: Post | None
    ) -> Tensor:
        """``(tokens, out)`` from codes, whose scales and zero points are ``(tokens or 1, 1)``."""
        if scales.numel() > 1:
            return self.by_token(codes, scales, zero_points, post)
        zero = 128 if zero_points is None else int(zero_points)
        return self.one_range(codes, float(scales), zero, dtype, post)

    def _right(self, codes: Tensor, zero: int) -> Tensor:
        """Sums of the input's codes, by which zero points of rows count."""
        return codes.sum(dim=1, keepdim=True, dtype=torch.int32).sub_(self.width * zero).float()


@dataclass(frozen=True, eq=False)
class OnednnMatmul:
    """A prepacked matrix with the quantizer of its input.

    Attributes:
        matrix: the matrix.
        inputs: quantization of the input.
        measured: the range of an input, if it has only one.
    """

    matrix: OnednnBytes
    inputs: Inputs
    measured: Callable[[Tensor], Range]

    def __call__(self, x: Tensor, post: Post | None = None) -> Tensor:
        """The matmul, and a function of it.

        Args:
            x: ``(..., in)``, at least two axes.
            post: the function.

        Returns:
            ``(..., out)``: bfloat16 for such an input where the operation can write it, otherwise float32.
        """
        given, width = x.float(), self.matrix.width
        if by_token(self.inputs.encoding) and x.numel() > width:
            levels, scales, zero_points = token_levels(given.reshape(-1, width), self.inputs)
            codes = to_bytes(levels.contiguous(), 1.0, 128 if zero_points is None else 0)
            y = self.matrix.by_token(codes, scales, zero_points, post)
        else:
            # padding is known of the shape that the model has given it
            span = self.measured(given)
            codes = span.codes(given.reshape(-1, width).contiguous())
            y = self.matrix.one_range(codes, span.scale, span.zero, x.dtype, post)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def codes(self, x: Tensor, post: Post | None, span: Range) -> Tensor | None:
        """The codes of the result over a range, written by the operation itself.

        Args:
            x: ``(..., in)``, at least two axes.
            post: a function of the result.
            span: the range.

        Returns:
            ``(..., out)`` uint8; None if tokens have ranges of their own, or rows zero points.
        """
        if self.matrix.zeros is not None or by_token(self.inputs.encoding):
            return None
        given = x.float()
        own = self.measured(given)
        codes = own.codes(given.reshape(-1, self.matrix.width).contiguous())
        product, bias = self.matrix.product, self.matrix.bias
        y = product(codes, own.scale, own.zero, bias, torch.uint8, post, (span.scale, span.zero))
        if span.beyond:
            y.clamp_(span.low, span.high)
        return y.reshape(*x.shape[:-1], y.shape[-1])
