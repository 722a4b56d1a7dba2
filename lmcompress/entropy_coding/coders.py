"""The coders of one array of symbols: a fixed-width code, zstd, or Huffman's code."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from lmcompress.entropy_coding import huffman
from lmcompress.entropy_coding.symbols import Part, Symbols, packed, packed_size, unpacked
from lmcompress.errors import CheckpointError, LmcompressError

Coder = Literal["auto", "zstd", "huffman"]
CODERS: tuple[Coder, ...] = ("auto", "zstd", "huffman")
"""``zstd`` and ``huffman`` are used where smaller than a fixed-width code; ``auto`` uses the smaller of both."""

METHODS = ("fixed", "zstd", "huffman")
"""Methods in the order of their numbers in a stream."""

# maximum share of the other's size for Huffman data to be used: the others are decoded ten times as fast
_WORTH_IT = 0.995


class Coded(NamedTuple):
    """An array of symbols as bytes.

    Attributes:
        symbols: number of symbols.
        width: bits of a symbol in a fixed-width code.
        method: one of :data:`METHODS`.
        data: the bytes.
    """

    symbols: int
    width: int
    method: str
    data: bytes


class Choice(NamedTuple):
    """The smallest code of an array of symbols, which is encoded when it is decided that it is stored.

    Attributes:
        part: the array.
        method: one of :data:`METHODS`.
        cost: size in bytes, with a small penalty for methods that are slow to decode.
        content: the bytes, or Huffman's code for them, whose size is known without encoding.
    """

    part: Part
    method: str
    cost: float
    content: bytes | huffman.Code

    def coded(self) -> Coded:
        """The array as bytes."""
        symbols, width = self.part
        done = self.content if isinstance(self.content, bytes) else huffman.encode(symbols, self.content)
        return Coded(len(symbols), width, self.method, done)


def choose_code(part: Part, coder: Coder) -> Choice:
    """The smallest code of an array that the coder has, a fixed-width code if that is not longer.

    Huffman's is not encoded for that: zstd is an order of magnitude faster, and usually chosen.

    Args:
        part: the array.
        coder: one of :data:`CODERS`.

    Raises:
        LmcompressError: If zstd is needed and the package zstandard is not installed.
    """
    plain = packed(part)
    found: dict[str, bytes] = {"fixed": plain}
    if coder != "huffman":
        zstd = _zstandard()
        # zstd sees repeated text where there is none; the less it searches for it, the smaller the streams
        options = zstd.ZstdCompressionParameters.from_level(3, strategy=zstd.STRATEGY_FAST, min_match=7)
        found["zstd"] = zstd.ZstdCompressor(compression_params=options).compress(plain)
    method = min(found, key=lambda name: len(found[name]))
    best = Choice(part, method, len(found[method]), found[method])
    # only a coder of the dependence between symbols, such as zstd, gets below the entropy of single symbols
    if coder == "zstd" or entropy_bits(symbol_counts(part)) >= _WORTH_IT * 8 * best.cost:
        return best
    code = huffman.best_code(part.symbols)
    other = Choice(part, "huffman", code.size / _WORTH_IT, code)
    return min(best, other, key=lambda one: one.cost)


def decode_symbols(method: str, data: memoryview, count: int, width: int) -> Symbols:
    """The decoded symbols; nothing is allocated beyond what ``count`` and the length of ``data`` allow.

    Args:
        method: one of :data:`METHODS`.
        data: of a :class:`Coded`, not trusted.
        count: number of symbols.
        width: bits of each in a fixed-width code.

    Raises:
        CheckpointError: If the data are not those of ``count`` such symbols.
        LmcompressError: If zstd is needed and the package zstandard is not installed.
    """
    if method == "fixed":
        return unpacked(data, count, width)
    if method == "zstd":
        return unpacked(_decompressed(data, packed_size(count, width)), count, width)
    # each bit stands for at least one group of symbols
    if count > 8 * huffman.MAX_DIGITS * len(data):
        raise CheckpointError(f"{count} symbols cannot lie in {len(data)} bytes: the data was changed")
    symbols = huffman.decode(data, count)
    if count and int(symbols.max()) >> width:
        raise CheckpointError(f"symbols must have {width} bits, got {int(symbols.max())}: the data was changed")
    return symbols


def symbol_counts(part: Part) -> np.ndarray:
    """The number of occurrences of each symbol, ``(alphabet,)`` int64.

    Args:
        part: an array of symbols.
    """
    return huffman.counts_of(part.symbols)


def entropy_bits(counts: np.ndarray) -> float:
    """Zero-order entropy of symbols, summed over all, in bits.

    Args:
        counts: number of occurrences of each symbol.
    """
    counts = counts[counts > 0]
    total = counts.sum()
    return float((counts * np.log2(total / counts)).sum()) if len(counts) else 0.0


def _decompressed(data: memoryview, size: int) -> bytes:
    zstd = _zstandard()
    try:
        # the library allocates what the frame states, whatever limit it is given
        if zstd.frame_content_size(data) != size:
            raise CheckpointError(f"compressed symbols must have {size} bytes, and do not: the data was changed")
        return zstd.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except zstd.ZstdError as error:
        raise CheckpointError(f"its symbols cannot be decompressed ({error}): the data was changed") from error


def _zstandard() -> Any:
    # imported here: loading a packed model without streams does not need it
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise LmcompressError("zstd streams need the package zstandard: pip install zstandard") from error
    return zstandard
