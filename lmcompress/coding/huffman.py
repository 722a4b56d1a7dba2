"""Huffman's code for the symbols of one array, as Deep Compression stores indices and gaps (section 4).

The code is canonical: a table says for each symbol how many bits it has, and nothing else. Symbols are coded in chunks
of :data:`CHUNK`, each of which starts where a table says, so that NumPy decodes all chunks side by side, one symbol of
each at a time; the table costs 16 bits a chunk.

A code has whole bits, which is much for symbols that have few. So where the alphabet is small, several symbols in a row
are one of a larger alphabet, the digits of a number; Huffman's paper codes single ones.
"""

from __future__ import annotations

import heapq
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from lmcompress.errors import CheckpointError

CHUNK = 2048
MAX_LENGTH = 20
MAX_ALPHABET = 1 << 16
# an alphabet of groups is this large at most, and so many times smaller than the groups are many
_MAX_GROUPS, _GROUPS_SHARE = 4096, 32
MAX_DIGITS = 12
"""Symbols that one code stands for, at most."""
# base and digits of a group, alphabet, symbols, bytes of the table of lengths, bytes of bits
_HEAD = struct.Struct("<IBIQII")


def code_lengths(counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """How many bits each symbol has in an optimal prefix code.

    Args:
        counts: how often each symbol of the alphabet occurs, ``(alphabet,)``.

    Returns:
        ``(alphabet,)`` uint8, 0 for symbols that do not occur and 1 for one that is alone. None is greater than
        :data:`MAX_LENGTH`: where Huffman's algorithm goes deeper, which takes counts that grow like Fibonacci's
        numbers, rare symbols are taken for more frequent ones.

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
    """The bits of each symbol, the shortest codes first and, among equals, in the order of the alphabet.

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
    """Bits that symbols of such counts take, without tables.

    Args:
        counts: ``(alphabet,)``.
    """
    return int((counts * code_lengths(counts)).sum())


def encode(symbols: NDArray[np.unsignedinteger]) -> bytes:
    """Symbols as bytes, with all that :func:`decode` needs.

    Args:
        symbols: ``(n,)``, each less than :data:`MAX_ALPHABET`.

    Returns:
        Head, lengths of codes, bits of each chunk, and the bits.
    """
    base = int(symbols.max()) + 1 if len(symbols) else 1
    digits, total = _digits(base, len(symbols)), len(symbols)
    symbols = _grouped(symbols, base, digits)
    counts = np.bincount(symbols) if len(symbols) else np.zeros(0, np.int64)
    lengths = code_lengths(counts)
    codes = canonical_codes(lengths)
    sizes = np.zeros(-(-len(symbols) // CHUNK), np.int64)
    blocks: list[NDArray[np.uint8]] = []
    # a bit takes a byte until it is packed: so many symbols at a time
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
    table = zlib.compress(lengths.tobytes(), 9)
    head = _HEAD.pack(base, digits, len(counts), total, len(table), len(payload))
    return head + table + sizes.astype("<u2").tobytes() + payload


def decode(data: bytes | memoryview, count: int) -> NDArray[np.uint16]:
    """The symbols again.

    Args:
        data: from :func:`encode`; anything else is refused, and nothing is allocated beyond what ``count`` and the
            length of ``data`` allow.
        count: how many symbols there must be.

    Returns:
        ``(count,)`` uint16.

    Raises:
        CheckpointError: cut, longer than it should be, with a table that is no prefix code, or with bits that are not
            those of ``count`` symbols.
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
    if count == 0:
        return np.zeros(0, np.uint16)
    symbol_of, length_of, window = _table(lengths)
    # four bytes are read at a time, past the end too
    bits = np.concatenate([bits, np.zeros(4, np.uint8)]).astype(np.uint32)
    ends = np.cumsum(sizes)
    at = ends - sizes
    out = np.zeros((CHUNK, chunks), np.uint16)
    last = count - (chunks - 1) * CHUNK
    for step in range(CHUNK):
        lanes = chunks if step < last else chunks - 1
        if not lanes:
            break
        here = at[:lanes]
        byte = here >> 3
        word = (bits[byte] << 24) | (bits[byte + 1] << 16) | (bits[byte + 2] << 8) | bits[byte + 3]
        cell = (word << (here & 7).astype(np.uint32)) >> np.uint32(32 - window)
        out[step, :lanes] = symbol_of[cell]
        # damaged data must not lead past the end
        np.minimum(here + length_of[cell], ends[-1], out=at[:lanes])
    if not np.array_equal(at, ends):
        raise CheckpointError("Huffman chunks must end where their table says, and do not: the data was changed")
    return _ungrouped(out.T.reshape(-1)[:count], base, digits, total)


def _digits(base: int, count: int) -> int:
    """How many symbols are one of the alphabet that is coded."""
    most = min(_MAX_GROUPS, count // _GROUPS_SHARE)
    digits = 1
    while base > 1 and base ** (digits + 1) <= most:
        digits += 1
    return digits


def _grouped(symbols: NDArray[np.unsignedinteger], base: int, digits: int) -> NDArray[np.unsignedinteger]:
    if digits == 1:
        return symbols
    padded = np.zeros(-(-len(symbols) // digits) * digits, np.uint16)
    padded[: len(symbols)] = symbols
    return (padded.reshape(-1, digits) @ _places(base, digits)).astype(np.uint16)


def _ungrouped(groups: NDArray[np.uint16], base: int, digits: int, count: int) -> NDArray[np.uint16]:
    if digits == 1:
        return groups
    digit = np.arange(base**digits)[:, None] // _places(base, digits) % base
    return digit.astype(np.uint16)[groups].reshape(-1)[:count]


def _places(base: int, digits: int) -> NDArray[np.int64]:
    return base ** np.arange(digits, dtype=np.int64)


def _lengths(table: memoryview, alphabet: int) -> NDArray[np.uint8]:
    """The table of lengths, of which no more is unpacked than there may be."""
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


def _table(lengths: NDArray[np.uint8]) -> tuple[NDArray[np.uint16], NDArray[np.int64], int]:
    """For every pattern of so many bits: which symbol it begins with, and how many bits that has."""
    order = _canonical_order(lengths)
    if not len(order) or lengths.max() > MAX_LENGTH:
        raise CheckpointError(f"Huffman codes must have 1 to {MAX_LENGTH} bits, got a table of others: it was changed")
    used = lengths[order].astype(np.int64)
    window = int(used.max())
    cells = 1 << (window - used)
    # Kraft's equality, but for a symbol that is alone and has one bit
    if cells.sum() != 1 << window and not (len(order) == 1 and window == 1):
        raise CheckpointError("Huffman codes must be a complete prefix code, got a table of another: it was changed")
    symbol_of = np.zeros(1 << window, np.uint16)
    length_of = np.ones(1 << window, np.int64)
    total = int(cells.sum())
    symbol_of[:total] = np.repeat(order, cells)
    length_of[:total] = np.repeat(used, cells)
    return symbol_of, length_of, window
