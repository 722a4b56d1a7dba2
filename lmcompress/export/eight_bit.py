"""Exportable twins of packed modules whose codes are, or fit, one signed byte with a scale for each row.

Codes are int8 with zero points that are 0 wherever the grid allows it: every runtime multiplies these in integers as
they are, and none has to move them into another range, where they could saturate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lmcompress.export import operators
from lmcompress.kernels.integers import by_row, row_sums, signed_codes
from lmcompress.kernels.matrix import Inputs
from lmcompress.nn.packed import Packed
from lmcompress.numerics.grids import PerGroup, symmetric_grid, unsigned_grid
from lmcompress.numerics.inputs import input_grid
from lmcompress.numerics.padding import real


@dataclass(frozen=True, eq=False)
class Operand:
    """A matrix of signed bytes, and the quantization of what it is multiplied with.

    Attributes:
        codes: ``(out, in)`` int8.
        zero_points: ``(out,)`` int8, or None for 0.
        scales: ``(out,)`` float32.
        bias: ``(out,)`` float32, or None.
        inputs: quantization of the input; None leaves it unquantized.
    """

    codes: Tensor
    zero_points: Tensor | None
    scales: Tensor
    bias: Tensor | None
    inputs: Inputs | None


def fits(packed: Packed) -> bool:
    """Whether the codes of a matrix can be signed bytes with one scale for each row.

    Args:
        packed: any packed module.
    """
    return not isinstance(packed.layout.granularity, PerGroup)


def operand(packed: Packed, bias: Tensor | None) -> Operand:
    """The operand of a packed matrix that :func:`fits`.

    Args:
        packed: the matrix.
        bias: ``(out,)``, or None.
    """
    matrix = packed.matrix()
    codes, zeros = signed_codes(matrix)
    zeros = None if zeros is None or not bool(zeros.any()) else zeros.to(torch.int8)
    scales = by_row(packed.weight_scales, matrix).float()
    return Operand(codes, zeros, scales, None if bias is None else bias.detach().float(), packed.matmul_inputs())


def joined(operands: list[Operand]) -> Operand | None:
    """One operand of several that read the same input: their outputs side by side, each exactly as before.

    Args:
        operands: of one input width.

    Returns:
        None if they quantize their input differently.
    """
    first = operands[0]
    if not all(_same_inputs(first.inputs, other.inputs) for other in operands[1:]):
        return None
    zeros, bias = None, None
    if any(one.zero_points is not None for one in operands):
        zeros = torch.cat(
            [torch.zeros_like(o.codes[:, 0]) if o.zero_points is None else o.zero_points for o in operands]
        )
    if any(one.bias is not None for one in operands):
        bias = torch.cat([torch.zeros_like(one.scales) if one.bias is None else one.bias for one in operands])
    codes, scales = torch.cat([one.codes for one in operands]), torch.cat([one.scales for one in operands])
    return replace(first, codes=codes, zero_points=zeros, scales=scales, bias=bias)


def _same_inputs(one: Inputs | None, other: Inputs | None) -> bool:
    if one is None or other is None:
        return one is other
    pairs = ((one.scale, other.scale), (one.zero_point, other.zero_point))
    same = all((a is None) == (b is None) and (a is None or b is None or torch.equal(a, b)) for a, b in pairs)
    return one.encoding == other.encoding and same


class ByteMatmul(nn.Module):
    """``x Wᵀ + b`` of signed bytes, in operators of ONNX.

    Args:
        operand: the matrix.
        shared: whether the codes belong to another module, which reads them by row; they are then transposed in the
            graph, and stored once.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    sums: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(self, operand: Operand, *, shared: bool = False) -> None:
        super().__init__()
        self.inputs, self.shared = operand.inputs, shared
        self.out_features, self.in_features = operand.codes.shape
        self.register_buffer("codes", operand.codes if shared else operand.codes.t().contiguous())
        self.register_buffer("scales", operand.scales)
        self.register_buffer("zero_points", operand.zero_points)
        self.register_buffer("bias", operand.bias)
        inputs = operand.inputs
        asymmetric = inputs is not None and inputs.encoding.range == "dynamic" and not inputs.encoding.symmetric
        sums = row_sums(operand.codes, None if operand.zero_points is None else operand.zero_points.int())
        self.register_buffer("sums", sums.float() if asymmetric else None)
        self.register_buffer("input_scale", None if inputs is None else inputs.scale)
        self.register_buffer("input_zero_point", None if inputs is None else inputs.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """The matmul.

        Args:
            x: ``(..., in)`` float32.

        Returns:
            ``(..., out)`` float32.
        """
        if self.inputs is None:
            # not as DequantizeLinear: ONNX Runtime makes matmuls of these that quantize the input as well
            weight = self.stored().to(torch.float32)
            weight = weight if self.zero_points is None else weight - self.zero_points.to(torch.float32)
            y = torch.matmul(x, weight * self.scales)
        elif self.inputs.encoding.range == "static":
            given = Inputs(self.inputs.encoding, self.input_scale, self.input_zero_point)
            y = torch.matmul(quantize_static(x, given), self.static_weight())
        else:
            y = self._integer(dynamic_input(x, self.inputs))
        return y if self.bias is None else y + self.bias

    def stored(self) -> Tensor:
        """The codes, ``(in, out)`` int8."""
        return self.codes.t() if self.shared else self.codes

    def static_weight(self) -> Tensor:
        """The weights dequantized by DequantizeLinear, ``(in, out)``."""
        # transposed last: OpenVINO multiplies dequantized codes in integers, transposed or not, but no others
        axis = 0 if self.shared else 1
        weight = operators.dequantize(self.codes, self.scales, self.zero_points, axis=axis)
        return weight.t() if self.shared else weight

    def _integer(self, quantized: DynamicInput) -> Tensor:
        product = operators.matmul_integer(quantized.codes, self.stored(), quantized.point, self.zero_points)
        product = product.to(torch.float32)
        if quantized.shift is not None:
            product = product - quantized.shift * self.sums
        # in this order: ONNX Runtime fuses `product * (scale * scales)` as if there were one scale for all tokens
        return product * self.scales * quantized.scale


@dataclass(frozen=True, eq=False)
class DynamicInput:
    """An input quantized over its current range, in a graph.

    Attributes:
        codes: of the input's shape, uint8.
        point: the code that counts as 0 in the integer matmul, one number.
        scale: one number, or ``(..., 1)``.
        shift: zero points less ``point``, of the scale's shape, or None for 0.
    """

    codes: Tensor
    point: Tensor
    scale: Tensor
    shift: Tensor | None


def dynamic_input(x: Tensor, inputs: Inputs) -> DynamicInput:
    """Quantize as :func:`~lmcompress.numerics.inputs.quantize_input` does, in few operators.

    Args:
        x: float32.
        inputs: with a dynamic range; padding does not widen ranges of whole tensors.
    """
    encoding = inputs.encoding
    if encoding.clip is not None:
        x = x.clamp(-encoding.clip, encoding.clip)
    by_token = encoding.granularity == "token"
    mask = None if by_token else real(x)
    seen = x if mask is None else x.masked_fill(~mask, 0.0)
    if encoding.symmetric:
        high = symmetric_grid(encoding.bits).high
        most = seen.abs().amax(dim=-1, keepdim=True) if by_token else seen.abs().max()
        if mask is not None:
            # padding may lie beyond the range of the others
            x = torch.minimum(torch.maximum(x, -most), most)
        # zeros only: their codes are 0 whatever the scale
        scale = torch.where(most > 0, most, 1.0) / high
        codes, point = _codes(x / scale, 128), torch.full((), 128, dtype=torch.uint8)
        return DynamicInput(codes, point, scale, None)
    low = seen.amin(dim=-1, keepdim=True) if by_token else seen.min()
    top = seen.amax(dim=-1, keepdim=True) if by_token else seen.max()
    low, top = low.clamp(max=0.0), top.clamp(min=0.0)
    if mask is not None:
        x = torch.minimum(torch.maximum(x, low), top)
    levels = unsigned_grid(encoding.bits).high
    # in the order of the quantizer: where a zero point lies between two, the last bit of the scale decides
    scale = torch.where(top > low, top / levels - low / levels, 1.0 / levels)
    zero = (-low / scale).round()
    codes = _codes(x / scale + zero, 0)
    return DynamicInput(codes, torch.zeros((), dtype=torch.uint8), scale, zero)


def _codes(x: Tensor, zero: int) -> Tensor:
    return operators.quantize(x, torch.ones(()), torch.full((), zero, dtype=torch.uint8))


def quantize_static(x: Tensor, inputs: Inputs) -> Tensor:
    """Q/DQ over a static range.

    Args:
        x: float32.
        inputs: with a static range, of one number each.
    """
    assert inputs.scale is not None
    encoding, grid = inputs.encoding, input_grid(inputs.encoding)
    scale = inputs.scale.reshape(())
    if encoding.bits == 8 and encoding.symmetric:
        # these codes end at -127, those of a byte at -128
        x = torch.maximum(x, grid.low * scale)
    elif encoding.bits < 8:
        # the codes of fewer bits end before those of a byte
        start = 0.0 if inputs.zero_point is None else inputs.zero_point.reshape(()).to(torch.float32)
        # not by minimum and maximum: onnxscript's rule for these names the ends alike for all that read one input
        x = operators.clip(x, (grid.low - start) * scale, (grid.high - start) * scale)
    if inputs.zero_point is None:
        # unsigned bytes: ONNX Runtime turns signed ones into these, and fails where it has moved them past a transpose
        zero = torch.full((), 128, dtype=torch.uint8)
    else:
        zero = inputs.zero_point.reshape(())
    return operators.dequantize(operators.quantize(x, scale, zero), scale, zero)


class ByteEmbedding(nn.Module):
    """Token embeddings of signed bytes: only the rows that are looked up are dequantized.

    Args:
        operand: the table, ``(tokens, width)``.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def __init__(self, operand: Operand) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = operand.codes.shape
        self.register_buffer("codes", operand.codes)
        self.register_buffer("scales", operand.scales)
        self.register_buffer("zero_points", operand.zero_points)

    def forward(self, ids: Tensor) -> Tensor:
        """The embeddings of tokens.

        Args:
            ids: any shape, int64.

        Returns:
            ``(*ids.shape, width)`` float32.
        """
        values = self.codes[ids].to(torch.float32)
        if self.zero_points is not None:
            values = values - self.zero_points[ids].to(torch.float32).unsqueeze(-1)
        return values * self.scales[ids].unsqueeze(-1)
