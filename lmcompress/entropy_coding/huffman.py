"""Huffman's code for the symbols of one array, as Deep Compression stores indices and gaps (section 4).

The code is canonical: a table holds only the number of bits of each symbol. Symbols are coded in chunks
of :data:`CHUNK`, with a table of their offsets, so that NumPy decodes all chunks in parallel, one symbol of
each at a time; the table costs 16 bits per chunk.

A code has a whole number of bits, which is inefficient for short codes. So if the alphabet is small, several
consecutive symbols are combined into one of a larger alphabet, as digits of a number; Huffman's paper codes single
ones.
"""

from __future__ import annotations

import heapq
import struct
import zlib
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lmcompress.errors import CheckpointError

CHUNK = 2048
MAX_LENGTH = 20
MAX_ALPHABET = 1 << 16
# maximum size of an alphabet of groups
_MAX_GROUPS = 4096
# chunks decoded in parallel: enough for NumPy, and their data stay in the cache
_LANES = 2048
MAX_DIGITS = 12
"""Maximum number of symbols that one code stands for."""
# base and digits of a group, alphabet, symbols, bytes of the table of lengths, bytes of bits
_HEAD = struct.Struct("<IBIQII")


def code_lengths(counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The number of bits of each symbol in an optimal prefix code.

    Args:
        counts: number of occurrences of each symbol of the alphabet, ``(alphabet,)``.

    Returns:
        ``(alphabet,)`` uint8, 0 for symbols that do not occur and 1 for a single one. None is greater than
        :data:`MAX_LENGTH`: if Huffman's algorithm goes deeper, which takes counts that grow like Fibonacci
        numbers, rare symbols are treated as more frequent.

    Example:
        >>> code_lengths(np.array([5, 0, 2, 1])).tolist()
        [1, 0, 2, 2]
    """
    counts = counts.astype(np.int64)
    lengths = np.zeros(len(counts), np.uint8)
    (present,) = np.nonzero(counts)
    if len(present) == 1:
        lengths[present] = 1
    if len(present) < 2:
        return lengths
    while True:
        found = _depths(counts[present])
        if found.max() <= MAX_LENGTH:
            lengths[present] = found
            return lengths
        counts = np.where(counts > 0, counts // 2 + 1, 0)


def canonical_codes(lengths: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """The code of each symbol, shortest codes first and, among equal lengths, in the order of the alphabet.

    Args:
        lengths: :func:`code_lengths`.

    Returns:
        ``(alphabet,)`` uint32, right-aligned.

    Example:
        >>> canonical_codes(np.array([1, 0, 2, 2], np.uint8)).tolist()
        [0, 0, 2, 3]
    """
    codes = np.zeros(len(lengths), np.uint32)
    order = _canonical_order(lengths)
    if len(order):
        # a code of length l stands for 2^(MAX_LENGTH - l) of the finest cells
        cells = 1 << (MAX_LENGTH - lengths[order].astype(np.int64))
        starts = np.cumsum(cells) - cells
        codes[order] = starts >> (MAX_LENGTH - lengths[order].astype(np.int64))
    return codes


def encoded_bits(counts: NDArray[np.int64]) -> int:
    """Total bits of symbols with these counts, without tables.

    Args:
        counts: ``(alphabet,)``.
    """
    return int((counts * code_lengths(counts)).sum())


class Code(NamedTuple):
    """The code of an array of symbols.

    Attributes:
        base: size of the alphabet of single symbols.
        digits: number of symbols that one code stands for.
        lengths: :func:`code_lengths` of the groups.
        size: bytes of the encoded array, exactly.
    """

    base: int
    digits: int
    lengths: NDArray[np.uint8]
    size: int


def best_code(symbols: NDArray[np.unsignedinteger]) -> Code:
    """The code that :func:`encode` uses, and the size it gives, from counts alone.

    Args:
        symbols: ``(n,)``, each less than :data:`MAX_ALPHABET`.
    """
    base = int(symbols.max()) + 1 if len(symbols) else 1
    digits, lengths, bits = _best_groups(symbols, base)
    chunks = -(-len(symbols) // (digits * CHUNK))
    return Code(base, digits, lengths, _HEAD.size + len(_table_bytes(lengths)) + 2 * chunks + -(-bits // 8))


def counts_of(symbols: NDArray[np.unsignedinteger]) -> NDArray[np.int64]:
    """The number of occurrences of each symbol up to the greatest.

    Args:
        symbols: ``(n,)``; bytes are counted without a copy of eight bytes for each.
    """
    if symbols.dtype == np.uint8 and len(symbols):
        # torch's has a loop for bytes, NumPy's has not
        symbols = np.require(symbols, requirements=["C", "W"])
        if symbols.strides[0] < 0:
            # one number counts as contiguous whatever its stride
            symbols = symbols.copy()
        return torch.bincount(torch.from_numpy(symbols)).numpy()
    return np.bincount(symbols) if len(symbols) else np.zeros(0, np.int64)


def encode(symbols: NDArray[np.unsignedinteger], code: Code | None = None) -> bytes:
    """Symbols as bytes, with everything :func:`decode` needs.

    Args:
        symbols: ``(n,)``, each less than :data:`MAX_ALPHABET`.
        code: :func:`best_code` of them, if it is known.

    Returns:
        Header, code lengths, bits of each chunk, and the bits.
    """
    total = len(symbols)
    base, digits, lengths, _ = best_code(symbols) if code is None else code
    symbols = _grouped(symbols, base, digits)
    codes = canonical_codes(lengths)
    sizes = np.zeros(-(-len(symbols) // CHUNK), np.int64)
    blocks: list[NDArray[np.uint8]] = []
    # a bit takes a byte until it is packed: the symbols are processed in parts
    step = CHUNK * 512
    rest = np.zeros(0, np.uint8)
    for start in range(0, len(symbols), step):
        part = symbols[start : start + step]
        width = lengths[part].astype(np.int64)
        at = np.arange(start, start + len(part)) // CHUNK
        sizes += np.bincount(at, weights=width, minlength=len(sizes)).astype(np.int64)
        bits = np.zeros(int(width.sum()), np.uint8)
        offset = np.cumsum(width) - width
        code = codes[part]
        for k in range(int(width.max())):
            has = width > k
            bits[offset[has] + k] = (code[has] >> (width[has] - 1 - k).astype(np.uint32)) & 1
        bits = np.concatenate([rest, bits])
        whole = len(bits) // 8 * 8
        blocks.append(np.packbits(bits[:whole]))
        rest = bits[whole:]
    blocks.append(np.packbits(rest))
    payload = np.concatenate(blocks).tobytes()
    table = _table_bytes(lengths)
    head = _HEAD.pack(base, digits, len(lengths), total, len(table), len(payload))
    return head + table + sizes.astype("<u2").tobytes() + payload


def decode(data: bytes | memoryview, count: int) -> NDArray[np.unsignedinteger]:
    """The decoded symbols.

    Args:
        data: from :func:`encode`; anything else is refused, and nothing is allocated beyond what ``count`` and the
            length of ``data`` allow.
        count: expected number of symbols.

    Returns:
        ``(count,)`` uint8 where every symbol fits, otherwise uint16.

    Raises:
        CheckpointError: If the data are cut off or too long, the table is not a prefix code, or the bits are not those
            ``count`` symbols.
    """
    data = memoryview(data)
    if len(data) < _HEAD.size:
        raise CheckpointError(f"Huffman data must have at least {_HEAD.size} bytes, got {len(data)}: it is cut off")
    base, digits, alphabet, stated, table, payload = _HEAD.unpack_from(data)
    if not 1 <= digits <= MAX_DIGITS or not 1 <= base <= MAX_ALPHABET or base**digits > max(base, _MAX_GROUPS):
        raise CheckpointError(f"Huffman data cannot be of groups of {digits} symbols of {base}: it was changed")
    total, count = count, -(-count // digits)
    chunks = -(-count // CHUNK)
    if alphabet > base**digits or stated != total or len(data) != _HEAD.size + table + 2 * chunks + payload:
        raise CheckpointError(
            f"Huffman data must be of {total} symbols and as long as its head says, got {stated} symbols of "
            f"{alphabet} and {len(data)} bytes: it is cut off or was changed"
        )
    lengths = _lengths(data[_HEAD.size : _HEAD.size + table], alphabet)
    sizes = np.frombuffer(data, "<u2", chunks, _HEAD.size + table).astype(np.int64)
    bits = np.frombuffer(data, np.uint8, payload, _HEAD.size + table + 2 * chunks)
    if -(-int(sizes.sum()) // 8) != payload:
        raise CheckpointError(f"Huffman chunks must fill {payload} bytes, got {int(sizes.sum())} bits: it was changed")
    out: NDArray[np.unsignedinteger] = np.empty(total, np.uint8 if base <= 256 else np.uint16)
    if count == 0:
        return out
    table_of_codes = _table(lengths)
    digits_of = (np.arange(base**digits)[:, None] // _places(base, digits) % base).astype(out.dtype)
    # the four bytes from each position, also past the end
    words = np.ndarray(payload + 1, ">u4", np.concatenate([bits, np.zeros(4, np.uint8)]), strides=(1,))
    ends = np.cumsum(sizes)
    for first in range(0, chunks, _LANES):
        lanes = slice(first, first + _LANES)
        groups = _groups(words, (ends - sizes)[lanes], ends[lanes], count - first * CHUNK, table_of_codes)
        found = digits_of[groups].reshape(-1) if digits > 1 else groups
        start = first * CHUNK * digits
        out[start : start + len(found)] = found[: total - start]
    return out


def _groups(
    words: NDArray[np.unsignedinteger], starts: NDArray[np.int64], ends: NDArray[np.int64], count: int, table: _Table
) -> NDArray[np.uint16]:
    """Chunks decoded in parallel: the first ``count`` symbols, or as many as the chunks have."""
    at, chunks = starts.copy(), len(starts)
    found = np.empty((min(CHUNK, count), chunks), np.uint16)
    last = count - (chunks - 1) * CHUNK
    for step in range(len(found)):
        here = at[: chunks if step < last else chunks - 1]
        cell = (words[here >> 3].astype(np.uint32) << (here & 7).astype(np.uint32)) >> np.uint32(32 - table.window)
        found[step, : len(here)] = table.symbol_of[cell]
        # damaged data must not lead past the end
        np.minimum(here + table.length_of[cell], ends[-1], out=here)
    if not np.array_equal(at, ends):
        raise CheckpointError("Huffman chunks must end where their table says, and do not: the data was changed")
    return found.T.reshape(-1)[:count]


def _best_groups(symbols: NDArray[np.unsignedinteger], base: int) -> tuple[int, NDArray[np.uint8], int]:
    """The number of symbols per code, the code lengths, and the bits of all codes: larger groups lose fewer bits to
    rounding of code lengths, but make the table longer."""
    best: tuple[float, int, NDArray[np.uint8], int] = (np.inf, 1, np.zeros(0, np.uint8), 0)
    if not len(symbols):
        return best[1:]
    most = min(_MAX_GROUPS, len(symbols))
    fitting = [digits for digits in range(1, MAX_DIGITS + 1) if base > 1 and base**digits <= most]
    for digits in reversed(fitting or [1]):
        groups = _grouped(symbols, base, digits)
        counts = counts_of(groups)
        lengths = code_lengths(counts)
        bits = int((counts * lengths).sum())
        cost = bits + 16 * len(groups) / CHUNK + 8 * len(_table_bytes(lengths))
        if cost >= best[0]:
            break
        best = cost, digits, lengths, bits
    return best[1:]


def _grouped(symbols: NDArray[np.unsignedinteger], base: int, digits: int) -> NDArray[np.unsignedinteger]:
    if digits == 1:
        return symbols
    padded = np.zeros(-(-len(symbols) // digits) * digits, np.uint16)
    padded[: len(symbols)] = symbols
    return (padded.reshape(-1, digits) @ _places(base, digits)).astype(np.uint16)


def _places(base: int, digits: int) -> NDArray[np.int64]:
    return base ** np.arange(digits, dtype=np.int64)


def _table_bytes(lengths: NDArray[np.uint8]) -> bytes:
    return zlib.compress(lengths.tobytes(), 9)


def _lengths(table: memoryview, alphabet: int) -> NDArray[np.uint8]:
    """The table of lengths, of which no more is unpacked than allowed."""
    try:
        unpacker = zlib.decompressobj()
        found = unpacker.decompress(table, alphabet + 1)
    except zlib.error as error:
        raise CheckpointError(f"Huffman's table cannot be unpacked ({error}): it was changed") from error
    if len(found) != alphabet or not unpacker.eof or unpacker.unused_data:
        raise CheckpointError(f"Huffman's table must be of {alphabet} symbols, and is not: it was changed")
    return np.frombuffer(found, np.uint8)


def _depths(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Depth of each leaf in the tree of Huffman's algorithm."""
    leaves = len(counts)
    parent = np.zeros(2 * leaves - 1, np.int64)
    heap = [(int(count), leaf) for leaf, count in enumerate(counts)]
    heapq.heapify(heap)
    for node in range(leaves, 2 * leaves - 1):
        (one, first), (two, second) = heapq.heappop(heap), heapq.heappop(heap)
        parent[first] = parent[second] = node
        heapq.heappush(heap, (one + two, node))
    depth = np.zeros(2 * leaves - 1, np.int64)
    for node in range(2 * leaves - 3, -1, -1):
        depth[node] = depth[parent[node]] + 1
    return depth[:leaves]


def _canonical_order(lengths: NDArray[np.uint8]) -> NDArray[np.int64]:
    order = np.argsort(lengths, kind="stable")
    return order[lengths[order] > 0]


class _Table(NamedTuple):
    """For every pattern of ``window`` bits: the symbol it begins with, and the length of its code."""

    symbol_of: NDArray[np.uint16]
    length_of: NDArray[np.uint8]
    window: int


def _table(lengths: NDArray[np.uint8]) -> _Table:
    """The decoding tables of these code lengths, after checking that they form a prefix code."""
    order = _canonical_order(lengths)
    if not len(order) or lengths.max() > MAX_LENGTH:
        raise CheckpointError(f"Huffman codes must have 1 to {MAX_LENGTH} bits, got a table of others: it was changed")
    used = lengths[order]
    window = int(used.max())
    cells = 1 << (window - used.astype(np.int64))
    # Kraft's equality, except for a single symbol of one bit
    if cells.sum() != 1 << window and not (len(order) == 1 and window == 1):
        raise CheckpointError("Huffman codes must be a complete prefix code, got a table of another: it was changed")
    symbol_of = np.zeros(1 << window, np.uint16)
    length_of = np.ones(1 << window, np.uint8)
    total = int(cells.sum())
    symbol_of[:total] = np.repeat(order, cells)
    length_of[:total] = np.repeat(used, cells)
    return _Table(symbol_of, length_of, window)
