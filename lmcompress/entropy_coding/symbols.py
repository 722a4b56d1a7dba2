"""Arrays of symbols: small integers, and their fixed-width code in bytes."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmcompress.errors import CheckpointError

Symbols = NDArray[np.unsignedinteger]


class Part(NamedTuple):
    """An array of symbols.

    Attributes:
        symbols: ``(n,)`` unsigned.
        width: bits of a symbol in a fixed-width code: 1, 2, 4, 8 or 16.
    """

    symbols: Symbols
    width: int


def index_width(values: int) -> int:
    """Bits of an index into a codebook, rounded up to a width that fills bytes.

    Args:
        values: size of the codebook.

    Returns:
        1, 2, 4, 8 or 16.

    Example:
        >>> [index_width(n) for n in (1, 2, 3, 16, 17, 256, 257)]
        [1, 1, 2, 4, 8, 8, 16]
    """
    return next(width for width in (1, 2, 4, 8, 16) if values <= 1 << width)


def packed(part: Part) -> bytes:
    """The symbols in a fixed-width code, those below 8 bits packed into bytes, the first in the low bits.

    Args:
        part: an array of symbols.
    """
    symbols, width = part
    if width == 16:
        return symbols.astype("<u2").tobytes()
    if width < 8:
        many = 8 // width
        padded = np.zeros(-(-len(symbols) // many) * many, np.uint8)
        padded[: len(symbols)] = symbols
        lanes = padded.reshape(-1, many)
        symbols = np.zeros(len(lanes), np.uint8)
        for lane in range(many):
            symbols |= lanes[:, lane] << np.uint8(width * lane)
    return symbols.astype(np.uint8).tobytes()


def packed_size(count: int, width: int) -> int:
    """Bytes that n symbols take in a fixed-width code.

    Args:
        count: number of symbols.
        width: bits of a symbol.
    """
    return math.ceil(count * width / 8)


def unpacked(data: bytes | memoryview, count: int, width: int) -> Symbols:
    """The unpacked symbols.

    Args:
        data: :func:`packed_size` bytes.
        count: number of symbols.
        width: bits of each.

    Returns:
        ``(count,)`` uint8, or uint16 where they have 16 bits.

    Raises:
        CheckpointError: If the data have another length.
    """
    if len(data) != packed_size(count, width):
        raise CheckpointError(
            f"{count} symbols of {width} bits must lie in {packed_size(count, width)} bytes, got {len(data)}: the data "
            "is cut off or was changed"
        )
    if width == 16:
        return np.frombuffer(data, "<u2").astype(np.uint16)
    symbols = np.frombuffer(data, np.uint8)
    if width == 8:
        return symbols
    many, mask = 8 // width, np.uint8((1 << width) - 1)
    lanes = np.empty((len(symbols), many), np.uint8)
    for lane in range(many):
        lanes[:, lane] = (symbols >> np.uint8(width * lane)) & mask
    return lanes.reshape(-1)[:count]
