"""Matmuls in the graphs of ``torch.compile``: operations whose shapes the compiler knows, and not their kernels.

A graph holds tensors, numbers and strings: what describes a matrix is a string there, and the
:class:`~lmcompress.kernels.matmul.Matmul` that holds its prepacked form is found by number when the graph runs. The
input is quantized in the graph, where the compiler fuses that with the operations before it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from lmcompress.kernels.integers import no_infinity
from lmcompress.kernels.matrix import Encoding, Inputs, Matrix
from lmcompress.kernels.posts import Post
from lmcompress.kernels.ranges import by_token
from lmcompress.kernels.stack import Operand, Stack
from lmcompress.numerics.grids import Granularity, Grid, PerGroup, PerRow, PerTensor
from lmcompress.numerics.padding import Tokens, begin, current, end

_LIBRARY = torch.library.Library("lmcompress", "DEF")
# one of each, or as many as there are matrices in a stack
_MATRIX = "Tensor[] packed, Tensor[] scales, Tensor[] zeros, Tensor[] biases"
_NAMES = "int holder, str layout, str post"
_LIBRARY.define(
    f"matmul(Tensor x, {_MATRIX}, Tensor? scale, Tensor? zero, Tensor? real, Tensor? keys, {_NAMES}) -> Tensor"
)
_LIBRARY.define(
    f"matmul_of_codes(Tensor codes, Tensor ranges, Tensor? starts, {_MATRIX}, {_NAMES}, ScalarType dtype) -> Tensor"
)


class Holder(Protocol):
    """What holds a prepacked matrix: a :class:`~lmcompress.kernels.matmul.Matmul`."""

    def now(self, x: Tensor, matrix: Operand, bias: Tensor | None, inputs: Inputs | None, post: Post | None) -> Tensor:
        """The matmul of an input."""

    def of_codes(
        self,
        codes: Tensor,
        scales: Tensor,
        zero_points: Tensor | None,
        matrix: Operand,
        bias: Tensor | None,
        dtype: torch.dtype,
        post: Post | None,
    ) -> Tensor:
        """The matmul of codes ``(tokens, in)`` uint8, whose scales and zero points are ``(tokens or 1, 1)``."""


def whole(
    holder: int, x: Tensor, matrix: Operand, bias: Tensor | None, inputs: Inputs | None, post: Post | None
) -> Tensor:
    """The matmul as one operation, which quantizes as well.

    Args:
        holder: number of the holder.
        x: ``(..., in)``.
        matrix: the weights.
        bias: ``(out,)``.
        inputs: quantization of the input.
        post: a function of the result.

    Returns:
        ``(..., out)`` of ``x``'s dtype.
    """
    scale, zero = (None, None) if inputs is None else (inputs.scale, inputs.zero_point)
    tokens, real, keys = current(), None, None
    if tokens is not None:
        # the encoder's output is known by being that object, which it is not within the operator
        real, keys = tokens.keys if x is tokens.source else tokens.now, tokens.keys
    return torch.ops.lmcompress.matmul(
        x, *_tensors(matrix, bias), scale, zero, real, keys, holder,
        _written(matrix, inputs), post or "",
    )  # fmt: skip


def quantized_before(
    holder: int, x: Tensor, matrix: Operand, bias: Tensor | None, inputs: Inputs, post: Post | None
) -> Tensor:
    """The matmul of integers as the quantizer, in operations that a compiler fuses, and one operation after it.

    Args:
        holder: number of the holder.
        x: ``(..., in)``.
        matrix: the weights, with scales of rows or the tensor.
        bias: ``(out,)``.
        inputs: quantization of the input.
        post: a function of the result.

    Returns:
        ``(..., out)`` of ``x``'s dtype.
    """
    quantized, written = inputs.quantized(x), _written(matrix, inputs)
    levels, scales = quantized.levels.reshape(-1, x.shape[-1]), no_infinity(quantized.scales)
    # oneDNN's GELU takes less time than the compiler's, and comes last
    if by_token(inputs.encoding) and post is None:
        y = _of_tokens(holder, levels, scales, quantized.zero_points, matrix, bias, written).to(x.dtype)
    else:
        zero_points = quantized.zero_points
        codes = (levels + 128 if zero_points is None else levels).to(torch.uint8)
        y = torch.ops.lmcompress.matmul_of_codes(
            codes, scales, zero_points, *_tensors(matrix, bias), holder, written, post or "", x.dtype
        )
    return y.reshape(*x.shape[:-1], matrix.shape[0])


def _of_tokens(
    holder: int,
    levels: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    matrix: Operand,
    bias: Tensor | None,
    written: str,
) -> Tensor:
    """``(tokens, out)`` float32; what differs between tokens is left to the compiler to fuse with what follows."""
    packed, weight_scales, zeros, biases = _tensors(matrix, bias)
    one = scales.new_ones(1, 1)
    if zero_points is None:
        codes, start = levels + 128, None
    else:
        # the first row of the result are the sums by which zero points count
        codes, start = torch.cat([levels.new_ones(1, levels.shape[1]), levels]), torch.zeros_like(one)
    y = torch.ops.lmcompress.matmul_of_codes(
        codes.to(torch.uint8), one, start, packed, weight_scales, zeros, [], holder, written, "", torch.float32
    )
    if zero_points is not None:
        y = y[1:] - zero_points.float() * y[:1]
    y = y * scales
    if not biases:
        return y
    return y + (biases[0] if len(biases) == 1 else torch.cat(biases)).float()


def serve(held: Callable[[int], Holder]) -> None:
    """Define what the operations do.

    Args:
        held: the holder of a number.
    """

    def matmul(
        x: Tensor, packed: _Parts, scales: _Parts, zeros: _Parts, biases: _Parts, scale: Tensor | None,
        zero: Tensor | None, real: Tensor | None, keys: Tensor | None, holder: int, layout: str, post: str,
    ) -> Tensor:  # fmt: skip
        encoding = _read(layout)[1]
        matrix, bias = _operand(packed, scales, zeros, biases, layout)
        inputs = None if encoding is None else Inputs(encoding, scale, zero)
        begin(None if real is None or keys is None else Tokens(real, keys))
        try:
            return held(holder).now(x, matrix, bias, inputs, cast(Post, post) or None)
        finally:
            end()

    def matmul_of_codes(
        codes: Tensor, ranges: Tensor, starts: Tensor | None, packed: _Parts, scales: _Parts, zeros: _Parts,
        biases: _Parts, holder: int, layout: str, post: str, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        matrix, bias = _operand(packed, scales, zeros, biases, layout)
        return held(holder).of_codes(codes, ranges, starts, matrix, bias, dtype, cast(Post, post) or None)

    _LIBRARY.impl("matmul", matmul, "CompositeExplicitAutograd")
    _LIBRARY.impl("matmul_of_codes", matmul_of_codes, "CompositeExplicitAutograd")


@torch.library.register_fake("lmcompress::matmul", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _shape(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(_read(arguments[-2])[0][0]))


@torch.library.register_fake("lmcompress::matmul_of_codes", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _shape_of_codes(codes: Tensor, *arguments: Any) -> Tensor:
    return codes.new_empty(codes.shape[0], sum(_read(arguments[-3])[0][0]), dtype=arguments[-1])


_Parts = list[Tensor]


def _tensors(matrix: Operand, bias: Tensor | None) -> tuple[_Parts, _Parts, _Parts, _Parts]:
    """The tensors of an operand as the operations take them: bytes, scales, zero points and biases."""
    parts = matrix.parts if isinstance(matrix, Stack) else (matrix,)
    biases = list(matrix.biases) if isinstance(matrix, Stack) else [bias] if bias is not None else []
    zeros = [part.zero_points for part in parts if part.zero_points is not None]
    return [part.packed for part in parts], [part.scales for part in parts], zeros, biases


def _operand(
    packed: _Parts, scales: _Parts, zeros: _Parts, biases: _Parts, layout: str
) -> tuple[Operand, Tensor | None]:
    """The inverse of :func:`_tensors`."""
    (outs, width, *rest), _ = _read(layout)
    points: list[Tensor | None] = list(zeros) if zeros else [None] * len(packed)
    parts = tuple(
        Matrix(one, scale, zero, (out, width), *rest)
        for one, scale, zero, out in zip(packed, scales, points, outs, strict=True)
    )
    if len(parts) > 1:
        return Stack(parts, tuple(biases)), None
    return parts[0], biases[0] if biases else None


def _written(matrix: Operand, inputs: Inputs | None) -> str:
    """What describes a matrix and its input besides their tensors."""
    parts = matrix.parts if isinstance(matrix, Stack) else (matrix,)
    outs = ",".join(str(part.shape[0]) for part in parts)
    width, grid, granularity = matrix.shape[1], parts[0].grid, parts[0].granularity
    scope = "tensor" if isinstance(granularity, PerTensor) else "row"
    scope = f"{granularity.size}" if isinstance(granularity, PerGroup) else scope
    said = f"{outs};{width};{grid.low};{grid.levels};{grid.stride};{parts[0].container};{scope}"
    if inputs is None:
        return said
    e = inputs.encoding
    clip = "" if e.clip is None else e.clip
    return f"{said};{e.bits};{int(e.symmetric)};{e.granularity};{e.range};{clip};{int(e.full)}"


_Layout = tuple[tuple[int, ...], int, Grid, Any, Granularity]


@cache
def _read(said: str) -> tuple[_Layout, Encoding | None]:
    """The inverse of :func:`_written`: rows of each part, columns and so on; and the input."""
    outs, width, low, levels, stride, container, scope, *rest = said.split(";")
    known: dict[str, Granularity] = {"tensor": PerTensor(), "row": PerRow()}
    granularity = known[scope] if scope in known else PerGroup(int(scope))
    layout: _Layout = (
        tuple(map(int, outs.split(","))),
        int(width),
        Grid(int(low), int(levels), int(stride)),
        int(container) if container.isdigit() else container,
        granularity,
    )
    if not rest:
        return layout, None
    bits, symmetric, ranges, source, clip, full = rest
    encoding = Encoding(
        cast(Any, int(bits)),
        symmetric == "1",
        cast(Any, ranges),
        cast(Any, source),
        float(clip) if clip else None,
        full == "1",
    )
    return layout, encoding
