"""Exportable twins of packed modules with fewer than 8 bits, or with a scale for each group.

=================== ============================================ =======================================================
layout              ONNX Runtime                                 OpenVINO
=================== ============================================ =======================================================
weights alone       :class:`NBitsMatmul`, packed in memory       :class:`BlockedMatmul`, packed in memory
scales by row,      :class:`UnpackedByteMatmul`: packed in the   int8 codes (:mod:`lmcompress.export.eight_bit`),
quantized input     file, int8 codes in memory, integer product  integer product
scales by group,    rounded input, then as weights alone         rounded input, then as weights alone
quantized input
embeddings          :class:`PackedTable`, packed in memory       :class:`BlockedTable`, packed in memory
=================== ============================================ =======================================================

``MatMulNBits`` has blocks of a power of 2, at least 16; smaller groups are :class:`UnpackedMatmul`: packed in the file,
float32 in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmcompress.export import operators
from lmcompress.export.eight_bit import ByteMatmul, dynamic_input, operand, quantize_static
from lmcompress.kernels.matrix import Inputs, Matrix
from lmcompress.nn.packed import Layout, Packed
from lmcompress.numerics.grids import Grid, PerGroup
from lmcompress.numerics.packing import pack, unpack

_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 256


def matmul_twin(packed: Packed, bias: Tensor | None, to: str) -> nn.Module | None:
    """The twin of a matmul.

    Args:
        packed: the matrix.
        bias: ``(out,)``, or None.
        to: the runtime.

    Returns:
        None for layouts of :mod:`lmcompress.export.eight_bit`: signed bytes with a scale for each row.
    """
    grouped = isinstance(packed.layout.granularity, PerGroup)
    if not grouped and packed.layout.container == 8:
        return None
    if not grouped and packed.inputs is not None:
        # OpenVINO computes what unpacks codes again for every input
        return None if to == "openvino" else UnpackedByteMatmul(packed, bias)
    if to == "openvino":
        return BlockedMatmul(packed, bias, BlockedWeight(packed))
    block = _block(packed)
    if block is None:
        return UnpackedMatmul(packed, bias, PackedTable(packed))
    return NBitsMatmul(packed, bias, block)


def embedding_twin(packed: Packed, to: str) -> nn.Module | None:
    """The twin of an embedding.

    Args:
        packed: the table.
        to: the runtime.

    Returns:
        None for layouts of :mod:`lmcompress.export.eight_bit`.
    """
    if not isinstance(packed.layout.granularity, PerGroup) and packed.layout.container == 8:
        return None
    return BlockedTable(BlockedWeight(packed)) if to == "openvino" else PackedTable(packed)


def head_twin(packed: Packed, embedding: nn.Module, bias: Tensor | None) -> nn.Module:
    """The twin of a head that is tied to an embedding, with the very tensors of it.

    Args:
        packed: the table.
        embedding: its twin, of :func:`embedding_twin`.
        bias: ``(tokens,)``, or None.
    """
    if isinstance(embedding, BlockedTable):
        return BlockedMatmul(packed, bias, embedding.table)
    assert isinstance(embedding, PackedTable)
    grouped = isinstance(packed.layout.granularity, PerGroup)
    if grouped or packed.inputs is None:
        return UnpackedMatmul(packed, bias, embedding)
    head = UnpackedByteMatmul(packed, bias)
    head.register_buffer("bytes", embedding.bytes)
    return head


class UnpackedByteMatmul(ByteMatmul):
    """An integer product whose codes are unpacked in the graph, which ONNX Runtime does once, while loading.

    Args:
        packed: the matrix, with scales by tensor or row.
        bias: ``(out,)``, or None.
    """

    bytes: Tensor
    offsets: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor | None) -> None:
        signed = operand(packed, bias)
        super().__init__(signed)
        del self.codes
        self.layout: Layout = packed.layout
        self.matrix_shape = packed.shape
        # per row, so that a head shares them with an embedding
        self.register_buffer("bytes", packed.weight.view(packed.shape[0], -1))
        zeros = packed.weight_zero_points
        offsets = None if zeros is None else zeros.reshape(-1).expand(packed.shape[0]).to(torch.int8).contiguous()
        self.register_buffer("offsets", offsets)

    def stored(self) -> Tensor:
        """The codes, ``(in, out)`` int8, from their bytes."""
        codes = unpack(self.bytes, self.matrix_shape, self.layout.grid, self.layout.container, check=False)
        codes = codes.to(torch.int8)
        return (codes if self.offsets is None else codes - self.offsets.unsqueeze(1)).t()

    def static_weight(self) -> Tensor:
        """The weights dequantized by DequantizeLinear, ``(in, out)``."""
        return operators.dequantize(self.stored(), self.scales, self.zero_points, axis=1)


class InputValues(nn.Module):
    """An input rounded to its codes and back, in float32.

    Args:
        inputs: how it is quantized; None: not at all.
    """

    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(self, inputs: Inputs | None) -> None:
        super().__init__()
        self.inputs = inputs
        self.register_buffer("scale", None if inputs is None else inputs.scale)
        self.register_buffer("zero_point", None if inputs is None else inputs.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """The rounded input.

        Args:
            x: any shape, float32.

        Returns:
            The same shape.
        """
        if self.inputs is None:
            return x
        if self.inputs.encoding.range == "static":
            return quantize_static(x, Inputs(self.inputs.encoding, self.scale, self.zero_point))
        found = dynamic_input(x, self.inputs)
        codes = found.codes.to(torch.float32) - found.point.to(torch.float32)
        return (codes if found.shift is None else codes - found.shift) * found.scale


class _FloatMatmul(nn.Module, ABC):
    """A float32 matmul of dequantized weights; subclasses say how they are stored."""

    bias: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.input_values = InputValues(packed.matmul_inputs())
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """The matmul.

        Args:
            x: ``(..., in)`` float32.

        Returns:
            ``(..., out)`` float32.
        """
        y = self.product(self.input_values(x))
        return y if self.bias is None else y + self.bias

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """``x Wᵀ``.

        Args:
            x: ``(..., in)`` float32.
        """


class PackedTable(nn.Module):
    """Token embeddings of packed codes: only the rows that are looked up are unpacked.

    Args:
        packed: the table.
    """

    bytes: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = packed.shape
        self.layout: Layout = packed.layout
        self.register_buffer("bytes", packed.weight.view(packed.shape[0], -1))
        self.register_buffer("scales", packed.weight_scales)
        self.register_buffer("zero_points", packed.weight_zero_points)

    def matrix(self) -> Matrix:
        """The matrix, for operations that are recorded in a graph."""
        shape, layout = (self.num_embeddings, self.embedding_dim), self.layout
        return Matrix(
            self.bytes,
            self.scales,
            self.zero_points,
            shape,
            layout.grid,
            layout.container,
            layout.granularity,
            trusted=True,
        )

    def forward(self, ids: Tensor) -> Tensor:
        """The embeddings of tokens.

        Args:
            ids: any shape, int64.

        Returns:
            ``(*ids.shape, width)`` float32.
        """
        return self.matrix().rows(ids)


class UnpackedMatmul(_FloatMatmul):
    """Weights unpacked and dequantized in the graph; runtimes may do that once, and then hold float32.

    Args:
        packed: the matrix.
        bias: ``(out,)``, or None.
        table: the matrix, which may be an embedding's.
    """

    def __init__(self, packed: Packed, bias: Tensor | None, table: PackedTable) -> None:
        super().__init__(packed, bias)
        self.table = table

    def product(self, x: Tensor) -> Tensor:
        """``x Wᵀ``.

        Args:
            x: ``(..., in)`` float32.
        """
        return torch.matmul(x, self.table.matrix().values().t())


class NBitsMatmul(_FloatMatmul):
    """ONNX Runtime's matmul with 2-, 4- or 8-bit codes that stay packed in memory.

    Args:
        packed: the matrix.
        bias: ``(out,)``, or None.
        block: codes that share a scale.
    """

    bytes: Tensor
    scales: Tensor
    zero_points: Tensor

    def __init__(self, packed: Packed, bias: Tensor | None, block: int) -> None:
        super().__init__(packed, bias)
        self.block = block
        plain = unsigned(packed, halves=True)
        self.bits = plain.bits
        blocks = -(-self.in_features // block)
        padded = nn.functional.pad(plain.codes, (0, blocks * block - self.in_features))
        self.register_buffer("bytes", _bytes(padded.view(self.out_features, blocks, block), plain.bits))
        scales, points = (_spread(numbers, blocks) for numbers in (plain.scales, plain.zero_points))
        self.register_buffer("scales", scales)
        whole = bool((points == points.round()).all())
        self.register_buffer("zero_points", _bytes(points.to(torch.uint8), plain.bits) if whole else points)

    def product(self, x: Tensor) -> Tensor:
        """``x Wᵀ``.

        Args:
            x: ``(..., in)`` float32.
        """
        return operators.matmul_nbits(
            x, self.bytes, self.scales, self.zero_points, bits=self.bits, block=self.block, rows=self.out_features
        )


class BlockedWeight(nn.Module):
    """A matrix as DequantizeLinear has it, its codes in a byte each here; two in one as they are stored.

    Args:
        packed: the matrix.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        plain = unsigned(packed, halves=False)
        groups = plain.scales.shape[1]
        self.block = packed.shape[1] // groups if groups > 1 else None
        self.register_buffer("codes", plain.codes)
        for name, numbers in (("scales", plain.scales), ("zero_points", plain.zero_points.to(torch.uint8))):
            self.register_buffer(name, numbers if self.block else numbers.reshape(-1))

    def forward(self) -> Tensor:
        """The dequantized matrix, ``(out, in)`` float32."""
        axis = 0 if self.block is None else 1
        return operators.dequantize(self.codes, self.scales, self.zero_points, axis=axis, block=self.block)


class BlockedMatmul(_FloatMatmul):
    """A matmul whose weights are dequantized by DequantizeLinear; OpenVINO keeps them packed in memory.

    Args:
        packed: the matrix.
        bias: ``(out,)``, or None.
        weight: the matrix, which an embedding may read too.
    """

    def __init__(self, packed: Packed, bias: Tensor | None, weight: BlockedWeight) -> None:
        super().__init__(packed, bias)
        self.weight = weight

    def product(self, x: Tensor) -> Tensor:
        """``x Wᵀ``.

        Args:
            x: ``(..., in)`` float32.
        """
        return torch.matmul(x, self.weight().t())


class BlockedTable(nn.Module):
    """Token embeddings looked up in a matrix that DequantizeLinear gives; OpenVINO dequantizes only those rows.

    Args:
        table: the matrix, which a head may read too.
    """

    def __init__(self, table: BlockedWeight) -> None:
        super().__init__()
        self.table = table
        self.num_embeddings, self.embedding_dim = table.codes.shape

    def forward(self, ids: Tensor) -> Tensor:
        """The embeddings of tokens.

        Args:
            ids: any shape, int64.

        Returns:
            ``(*ids.shape, width)`` float32.
        """
        return self.table()[ids]


@dataclass(frozen=True, eq=False)
class Unsigned:
    """A matrix as runtimes have it: a weight is ``scale * (code - zero point)``, exactly as in the packed module.

    Attributes:
        bits: 2, 4 or 8.
        codes: ``(out, in)`` uint8, from 0.
        scales: ``(out, groups)`` float32; one group by row.
        zero_points: the same, float32: whole numbers, or also halves.
    """

    bits: int
    codes: Tensor
    scales: Tensor
    zero_points: Tensor


def unsigned(packed: Packed, *, halves: bool) -> Unsigned:
    """The form of a packed matrix that runtimes have.

    Args:
        packed: the matrix.
        halves: whether codes 2 apart, which have no 0 among them, may become neighbours with half a zero point, in half
            the bits.
    """
    grid = packed.layout.grid
    stride = grid.stride if halves else 1
    codes = (packed.matrix().codes().to(torch.int16) - grid.low) // stride
    scales = packed.weight_scales.float().expand(packed.shape[0], -1)
    zeros = torch.zeros_like(scales) if packed.weight_zero_points is None else packed.weight_zero_points.float()
    levels = (grid.high - grid.low) // stride + 1
    return Unsigned(
        bits=next(bits for bits in ((2, 4, 8) if halves else (4, 8)) if levels <= 2**bits),
        codes=codes.to(torch.uint8),
        scales=(scales * stride).contiguous(),
        zero_points=((zeros - grid.low) / stride).expand(packed.shape[0], -1).contiguous(),
    )


def _bytes(codes: Tensor, bits: int) -> Tensor:
    return pack(codes, Grid(low=0, levels=2**bits), bits)  # type: ignore[arg-type]


def _block(packed: Packed) -> int | None:
    """The largest block of MatMulNBits of which groups are multiples, or None if it is too small."""
    columns = packed.shape[1]
    size = packed.layout.granularity.size if isinstance(packed.layout.granularity, PerGroup) else columns
    block = min(size & -size, _LARGEST_BLOCK)
    if block >= _SMALLEST_BLOCK:
        return block
    # a row may be padded, a group within it may not
    return None if size < columns else 2 * _SMALLEST_BLOCK


def _spread(numbers: Tensor, blocks: int) -> Tensor:
    """Numbers of groups as numbers of the blocks that they are divided into."""
    return numbers.repeat_interleave(-(-blocks // numbers.shape[1]), dim=1).contiguous()
