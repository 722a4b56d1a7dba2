r"""Packing codes into bytes, unpacking and dequantizing them; sizes are known before anything is packed.

=========== ============== ================ ==================================================================
container   levels up to   bits per code    layout of a row
=========== ============== ================ ==================================================================
``8``       256            8                one code per byte
``4``       16             4                two per byte, the first in the low bits
``3``       8              3                eight in three bytes, little-endian: code i in bits 3i to 3i + 2
``2``       4              2                four per byte, the first in the low bits
``1``       2              1                eight per byte, the first in the lowest bit
``base3``   3              1.6              five per byte, :math:`\sum_i d_i 3^i`, so bytes are at most 242
=========== ============== ================ ==================================================================

The *index* of a code in its grid is packed, ``(code - low) / stride``.

**Padding.** Every row (last axis) starts at a new byte, so that rows of an embedding can be unpacked alone; the
unused bits of a row's last byte are 0. A tensor ``(..., n)`` becomes ``(..., bytes of n codes)`` uint8. To pack without
padding, flatten first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lmcompress.errors import CheckpointError, LmcompressError
from lmcompress.numerics.graphs import recording
from lmcompress.numerics.grids import Granularity, Grid
from lmcompress.numerics.quantizers.base import Quantized

Container = Literal[1, 2, 3, 4, 8, "base3"]
"""Storage of codes in bytes: bits per code, or five ternary digits per byte."""

CONTAINERS: tuple[Container, ...] = (1, "base3", 2, 3, 4, 8)
"""From the smallest to the largest."""


def container_for(grid: Grid) -> Container:
    """The smallest container that holds a grid.

    Args:
        grid: the codes.

    Returns:
        ``"base3"`` for ternary, else bits for each code.

    Example:
        >>> container_for(Grid(low=-1, levels=3)), container_for(Grid(low=-7, levels=15))
        ('base3', 4)
    """
    return next(container for container in CONTAINERS if grid.levels <= _levels(container))


def packed_shape(shape: Sequence[int], container: Container) -> tuple[int, ...]:
    """Shape of the packed bytes of codes of ``shape``: the same except for the last axis; a scalar gets one axis.

    Args:
        shape: shape of the codes.
        container: storage of codes in bytes.

    Returns:
        The shape of the uint8 tensor returned by :func:`pack`.

    Raises:
        LmcompressError: If the container does not exist.

    Example:
        >>> packed_shape((10, 768), "base3"), packed_shape((10, 768), 2), packed_shape((), 4)
        ((10, 154), (10, 192), (1,))
    """
    *leading, row = shape or (1,)
    if container == "base3":
        return (*leading, -(-row // 5))
    _levels(container)
    return (*leading, -(-row * container // 8))


def stored_bytes(quantized: Quantized) -> int:
    """Bytes of codes, scales and zero points once they are packed.

    Args:
        quantized: a quantized tensor.
    """
    zero_points = 0 if quantized.zero_points is None else quantized.zero_points.numel()
    codes = packed_bytes(tuple(quantized.values.shape), container_for(quantized.grid))
    return codes + 4 * quantized.scales.numel() + zero_points


def packed_bytes(shape: Sequence[int], container: Container) -> int:
    """Bytes of the packed codes of ``shape``, without their scales.

    Args:
        shape: shape of the codes.
        container: storage of codes in bytes.

    Returns:
        The number of bytes.

    Raises:
        LmcompressError: If the container does not exist.

    Example:
        >>> packed_bytes((768, 768), 4), packed_bytes((768, 768), "base3")
        (294912, 118272)
    """
    return math.prod(packed_shape(shape, container))


def pack(codes: Tensor, grid: Grid, container: Container | None = None) -> Tensor:
    """Codes as bytes.

    Args:
        codes: any shape, integers of ``grid``.
        grid: possible codes.
        container: storage of codes in bytes; ``None`` is the smallest that fits.

    Returns:
        :func:`packed_shape` uint8 on the same device.

    Raises:
        LmcompressError: If the container does not exist or is too small for the grid, or codes are not integers of the
            grid.

    Example:
        >>> pack(torch.tensor([[-1, 0, 1, 1, 1], [-1, -1, -1, -1, 0]]), Grid(low=-1, levels=3)).tolist()
        [[237], [81]]
    """
    container = _fitting(grid, container)
    index = _index(codes, grid)
    index = index.reshape(1) if index.dim() == 0 else index
    if container == 8:
        return index.contiguous()
    each, size = _layout(container)
    row_bytes = packed_shape(index.shape, container)[-1]
    if index.numel() == 0:
        return index.new_zeros(packed_shape(index.shape, container))
    chunks = -(-index.shape[-1] // each)
    index = torch.nn.functional.pad(index, (0, chunks * each - index.shape[-1]))
    index = index.reshape(*index.shape[:-1], chunks, each)
    # 24 bits need more than a byte to accumulate in
    words = torch.zeros(index.shape[:-1], dtype=torch.int32 if size > 1 else torch.uint8, device=index.device)
    for place in range(each):
        words += index[..., place].to(words.dtype) * _place_value(container, place)
    if size == 1:
        return words
    parts = torch.stack([(words >> (8 * byte)) & 0xFF for byte in range(size)], dim=-1)
    return parts.to(torch.uint8).reshape(*words.shape[:-1], chunks * size)[..., :row_bytes].contiguous()


def unpack(
    packed: Tensor, shape: Sequence[int], grid: Grid, container: Container | None = None, *, check: bool = True
) -> Tensor:
    """Codes from bytes: the inverse of :func:`pack`.

    Args:
        packed: :func:`packed_shape` uint8, or those bytes flattened.
        shape: shape of the codes.
        grid: possible codes.
        container: as for :func:`pack`.
        check: whether to check for codes outside the grid, for which the host waits for a GPU; without it, they
            become numbers beyond the grid.

    Returns:
        ``shape``, int8 for grids with negative codes, else uint8, on the same device.

    Raises:
        CheckpointError: If the bytes are too few or too many for the shape, have another shape, or cannot come from
            :func:`pack`.
        LmcompressError: If the container does not exist, or is too small for the grid.

    Example:
        >>> unpack(torch.tensor([[237]], dtype=torch.uint8), (1, 5), Grid(low=-1, levels=3)).tolist()
        [[-1, 0, 1, 1, 1]]
    """
    container = _fitting(grid, container)
    index, padding = _checked_digits(packed, shape, container)
    if check:
        _check_index(index, padding, grid, container)
    # in 16 bits: bytes that count modulo 256 are torch's alone, other runtimes saturate
    codes = index if grid.low == 0 and grid.stride == 1 else index.to(torch.int16) * grid.stride + grid.low
    return codes.to(grid.dtype).reshape(tuple(shape))


def check_packed(packed: Tensor, shape: Sequence[int], grid: Grid, container: Container | None = None) -> None:
    """Refuse bytes that :func:`unpack` would, in half its time.

    Args:
        packed: as for :func:`unpack`.
        shape: shape of the codes.
        grid: possible codes.
        container: as for :func:`pack`.

    Raises:
        CheckpointError: If the bytes are too few or too many for the shape, have another shape, or cannot come from
            :func:`pack`.
        LmcompressError: If the container does not exist, or is too small for the grid.
    """
    container = _fitting(grid, container)
    _check_index(*_checked_digits(packed, shape, container), grid, container)


def _checked_digits(packed: Tensor, shape: Sequence[int], container: Container) -> tuple[Tensor, Tensor]:
    """Indices and those of the padding, as :func:`_digits`, from bytes of the right number and shape."""
    expected = packed_shape(shape, container)
    if packed.dtype != torch.uint8:
        raise CheckpointError(f"packed codes must be uint8, got {packed.dtype}")
    if packed.numel() != math.prod(expected):
        longer = "longer" if packed.numel() > math.prod(expected) else "shorter"
        raise CheckpointError(
            f"packed codes of shape {tuple(shape)} must have {math.prod(expected)} bytes ({_named(container)}), got "
            f"{packed.numel()}: the stream is {longer} than the shape says; was it packed with other bits, or cut off?"
        )
    if packed.dim() != 1 and tuple(packed.shape) != expected:
        raise CheckpointError(
            f"packed codes of shape {tuple(shape)} must have shape {expected} ({_named(container)}) or lie in one row, "
            f"got {tuple(packed.shape)}"
        )
    return _digits(packed.reshape(expected), (shape[-1] if shape else 1), container)


def dequantize(
    codes: Tensor, scales: Tensor, *, granularity: Granularity, zero_points: Tensor | None = None, check: bool = True
) -> Tensor:
    r"""Dequantized numbers.

    .. math:: w = s \cdot c \quad \text{or} \quad w = s \cdot (c - z)

    in float32: bit-exactly the quantizer's ``values``.

    Args:
        codes: any shape, integers.
        scales: ``granularity.scale_shape(codes.shape)``, >= 0.
        granularity: which codes share a scale.
        zero_points: same shape as ``scales``, integers in any dtype, or ``None``.
        check: whether to check scales and zero points, for which the host waits for a GPU.

    Returns:
        ``codes``'s shape, float32.

    Raises:
        LmcompressError: If the group size does not divide the rows.
        CheckpointError: If scales or zero points have another shape, are negative, or not finite.

    Example:
        >>> from lmcompress.numerics.grids import PerRow
        >>> dequantize(torch.tensor([[-1, 2], [1, 0]]), torch.tensor([[0.5], [3.0]]), granularity=PerRow())
        tensor([[-0.5000,  1.0000],
                [ 3.0000,  0.0000]])
    """
    if check:
        check_scales(scales, codes.shape, granularity)
    split = granularity.split(codes).float()
    if zero_points is not None:
        if check:
            check_scales(zero_points, codes.shape, granularity, name="zero points")
        split = split - granularity.spread(zero_points.float(), codes.shape)
    return (split * granularity.spread(scales.float(), codes.shape)).reshape(codes.shape)


def check_scales(scales: Tensor, shape: Sequence[int], granularity: Granularity, *, name: str = "scales") -> None:
    """Refuses scales that no quantizer produces.

    Args:
        scales: scales, such as from a checkpoint.
        shape: shape of the codes.
        granularity: which codes share a scale.
        name: their name in the error.

    Raises:
        LmcompressError: If the group size does not divide the rows.
        CheckpointError: If they have another shape, are negative, or not finite.
    """
    expected = granularity.scale_shape(shape)
    if tuple(scales.shape) != expected:
        raise CheckpointError(
            f"{name} of codes of shape {tuple(shape)} must have shape {expected} ({granularity}), "
            f"got {tuple(scales.shape)}"
        )
    # not `< 0`: NaN must fail too
    wrong = ~((scales >= 0) & (scales < torch.inf))
    if bool(wrong.any()):
        place = tuple(int(i) for i in wrong.nonzero()[0])
        raise CheckpointError(
            f"{name} must be finite and not negative, got {float(scales[place])} at {place}; "
            "the checkpoint is damaged or its training diverged"
        )


def _levels(container: Container) -> int:
    """The number of levels of a container, checked."""
    if container == "base3":
        return 3
    if isinstance(container, (bool, float)) or container not in CONTAINERS:
        raise LmcompressError(
            f"no packing has {container!r} bits per code; it must be one of {', '.join(map(str, CONTAINERS))}"
        )
    return 2**container


def _fitting(grid: Grid, container: Container | None) -> Container:
    if container is None:
        return container_for(grid)
    if grid.levels > _levels(container):
        raise LmcompressError(
            f"the container {container!r} holds {_levels(container)} levels, the codes have {grid.levels}; "
            f"use {container_for(grid)!r}"
        )
    return container


def _layout(container: Container) -> tuple[int, int]:
    """Codes and bytes of a chunk."""
    if container == "base3":
        return 5, 1
    return (8, 3) if container == 3 else (8 // container, 1)


def _place_value(container: Container, place: int) -> int:
    return 3**place if container == "base3" else 1 << (container * place)


def _named(container: Container) -> str:
    return "base-3, five codes per byte" if container == "base3" else f"{container} bits per code"


def _index(codes: Tensor, grid: Grid) -> Tensor:
    """Index of each code in its grid, uint8, checked."""
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise LmcompressError(f"codes must be integers, got {codes.dtype}")
    if codes.numel():
        low, high = (int(end) for end in torch.aminmax(codes))
        if low < grid.low or high > grid.high:
            raise LmcompressError(f"codes must lie in [{grid.low}, {grid.high}], got {low if low < grid.low else high}")
    if grid.stride == 1 and codes.element_size() == 1:
        # bytes count modulo 256
        return codes.view(torch.uint8) + (-grid.low) % 256
    offset = codes.to(torch.int16) - grid.low
    if grid.stride == 1:
        return offset.to(torch.uint8)
    wrong = offset % grid.stride != 0
    if bool(wrong.any()):
        raise LmcompressError(
            f"codes must be {grid.low} and steps of {grid.stride} from there, got {int(codes[wrong].flatten()[0])}"
        )
    return (offset // grid.stride).to(torch.uint8)


def _digits(packed: Tensor, row: int, container: Container) -> tuple[Tensor, Tensor]:
    """Indices ``(..., row)`` and those of the padding, uint8, from bytes ``(..., bytes)``."""
    if container == 8:
        return packed, packed[..., :0]
    each, size = _layout(container)
    leading = packed.shape[:-1]
    if packed.numel() == 0:
        return packed.new_zeros((*leading, row)), packed
    if size == 1:
        # in a recorded graph in 32 bits: the exporter of ONNX shifts bytes as signed ones
        words = packed.to(torch.int32) if recording() else packed
    else:
        packed = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % size))
        three = packed.reshape(*leading, -1, size).to(torch.int32)
        words = three[..., 0] + (three[..., 1] << 8) + (three[..., 2] << 16)
    if container == "base3":
        parts, rest = [], words.to(torch.int32)
        for _ in range(each):
            # division by 3 that is exact for a byte
            quotient = (rest * 171) >> 9
            parts.append((rest - 3 * quotient).to(torch.uint8))
            rest = quotient
        # bytes above 242 leave a remainder; the last digit is then one that no grid has
        parts[-1] = parts[-1] + (3 * rest).to(torch.uint8)
    else:
        parts = [((words >> (container * place)) & (2**container - 1)).to(torch.uint8) for place in range(each)]
    # not written in place: a graph would hold the empty tensor as a constant
    digits = torch.stack(parts, dim=-1)
    digits = digits.reshape(*leading, -1)
    return digits[..., :row], digits[..., row:]


def _check_index(index: Tensor, padding: Tensor, grid: Grid, container: Container) -> None:
    # a full container has no invalid code
    if grid.levels < 2 ** (2 if container == "base3" else container) and index.numel():
        greatest = int(index.max())
        if greatest >= grid.levels:
            what = "a byte above 242" if container == "base3" and greatest > 2 else f"a code of {greatest}"
            raise CheckpointError(
                f"packed codes must be below {grid.levels} ({_named(container)}), got {what}; the stream is damaged "
                "or was packed with another grid"
            )
    if bool(padding.any()):
        raise CheckpointError(
            f"the unused bits of a row's last byte must be 0 ({_named(container)}), got something else; the stream is "
            "damaged, or rows have another length"
        )
