"""The coders of one array of symbols: a fixed-width code, zstd, or Huffman's code."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from lmcompress.entropy_coding import huffman
from lmcompress.entropy_coding.symbols import Part, Symbols, packed, packed_size, unpacked
from lmcompress.errors import CheckpointError, LmcompressError

Coder = Literal["auto", "zstd", "huffman"]
CODERS: tuple[Coder, ...] = ("auto", "zstd", "huffman")
"""``zstd`` and ``huffman`` use that one where it is smaller than a fixed-width code, ``auto`` the smaller of both."""

METHODS = ("fixed", "zstd", "huffman")
"""By the number that a stream has for each."""

# of another's size that Huffman data may have: the others are decoded ten times as fast
_WORTH_IT = 0.995


class Coded(NamedTuple):
    """An array of symbols as bytes.

    Attributes:
        symbols: how many.
        width: bits of a symbol in a fixed-width code.
        method: one of :data:`METHODS`.
        data: the bytes.
    """

    symbols: int
    width: int
    method: str
    data: bytes

    @property
    def cost(self) -> float:
        """Bytes, those that are slow to decode counted for a little more."""
        return len(self.data) / (_WORTH_IT if self.method == "huffman" else 1)


def encode_symbols(part: Part, coder: Coder) -> Coded:
    """An array of symbols as the coder has it, or in a fixed-width code where that is not longer.

    Args:
        part: the array.
        coder: one of :data:`CODERS`.

    Raises:
        LmcompressError: If zstd is needed and the package zstandard is not installed.
    """
    plain = packed(part)
    found = {"fixed": plain}
    if coder != "huffman":
        zstd = _zstandard()
        # zstd takes symbols for repeated text where there is none; the less it looks for it, the smaller the streams
        options = zstd.ZstdCompressionParameters.from_level(3, strategy=zstd.STRATEGY_FAST, min_match=7)
        found["zstd"] = zstd.ZstdCompressor(compression_params=options).compress(plain)
    # below the entropy of single symbols is only what sees how they depend on one another, as zstd does
    if coder != "zstd" and entropy_bits(symbol_counts(part)) < _WORTH_IT * 8 * min(map(len, found.values())):
        found["huffman"] = huffman.encode(part.symbols)
    coded = [Coded(len(part.symbols), part.width, method, data) for method, data in found.items()]
    return min(coded, key=lambda one: one.cost)


def decode_symbols(method: str, data: memoryview, count: int, width: int) -> Symbols:
    """The symbols again; nothing is allocated beyond what ``count`` and the length of ``data`` allow.

    Args:
        method: one of :data:`METHODS`.
        data: of :func:`encode_symbols`, of which nothing has been believed yet.
        count: how many symbols.
        width: bits of each in a fixed-width code.

    Raises:
        CheckpointError: If the data are not those of ``count`` such symbols.
        LmcompressError: If zstd is needed and the package zstandard is not installed.
    """
    if method == "fixed":
        return unpacked(data, count, width)
    if method == "zstd":
        return unpacked(_decompressed(data, packed_size(count, width)), count, width)
    # a bit stands for a group of symbols at least
    if count > 8 * huffman.MAX_DIGITS * len(data):
        raise CheckpointError(f"{count} symbols cannot lie in {len(data)} bytes: the data was changed")
    symbols = huffman.decode(data, count)
    if count and int(symbols.max()) >> width:
        raise CheckpointError(f"symbols must have {width} bits, got {int(symbols.max())}: the data was changed")
    return symbols


def symbol_counts(part: Part) -> np.ndarray:
    """How often each symbol occurs, ``(alphabet,)`` int64.

    Args:
        part: an array of symbols.
    """
    return np.bincount(part.symbols) if len(part.symbols) else np.zeros(0, np.int64)


def entropy_bits(counts: np.ndarray) -> float:
    """Zero-order entropy of symbols, summed over all, in bits.

    Args:
        counts: how often each occurs.
    """
    counts = counts[counts > 0]
    total = counts.sum()
    return float((counts * np.log2(total / counts)).sum()) if len(counts) else 0.0


def _decompressed(data: memoryview, size: int) -> bytes:
    zstd = _zstandard()
    try:
        # the library allocates what the frame says, whatever limit it is given
        if zstd.frame_content_size(data) != size:
            raise CheckpointError(f"compressed symbols must have {size} bytes, and do not: the data was changed")
        return zstd.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except zstd.ZstdError as error:
        raise CheckpointError(f"its symbols cannot be decompressed ({error}): the data was changed") from error


def _zstandard() -> Any:
    # imported here: a packed model without streams is loaded without it
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise LmcompressError("zstd streams need the package zstandard: pip install zstandard") from error
    return zstandard
