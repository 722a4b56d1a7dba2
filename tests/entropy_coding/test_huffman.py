"""huffman: an optimal prefix code that round-trips, and refuses what is none."""

import heapq
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lmcompress.entropy_coding import huffman
from lmcompress.errors import CheckpointError

SYMBOLS = st.one_of(
    arrays(np.uint8, st.integers(0, 300), elements=st.integers(0, 255)),
    arrays(np.uint16, st.integers(0, 6000), elements=st.integers(0, 3)),
    arrays(np.uint16, st.integers(0, 50), elements=st.integers(0, huffman.MAX_ALPHABET - 1)),
)


@given(SYMBOLS)
def test_what_is_decoded_is_what_was_encoded(symbols):
    assert np.array_equal(huffman.decode(huffman.encode(symbols), len(symbols)), symbols)


@given(SYMBOLS)
def test_the_size_is_known_before_anything_is_encoded(symbols):
    code = huffman.best_code(symbols)
    assert code.size == len(huffman.encode(symbols)) == len(huffman.encode(symbols, code))


@given(SYMBOLS)
def test_counts_are_numpys(symbols):
    for found in (symbols, symbols[::2], symbols.astype(np.uint8)[::-1]):
        assert np.array_equal(huffman.counts_of(found), np.bincount(found) if len(found) else [])


@pytest.mark.parametrize("count", [0, 1, huffman.CHUNK - 1, huffman.CHUNK, huffman.CHUNK + 1, 5 * huffman.CHUNK + 7])
@pytest.mark.parametrize("base", [1, 2, 3, 40, 256])
def test_chunks_and_groups_of_every_length_come_back(count, base):
    symbols = np.random.default_rng(count).integers(0, base, count).astype(np.uint16)
    assert np.array_equal(huffman.decode(huffman.encode(symbols), count), symbols)


@pytest.mark.parametrize("base", [2, 5, 300])
def test_chunks_that_are_read_in_several_blocks_come_back(base, monkeypatch):
    monkeypatch.setattr(huffman, "_LANES", 2)
    symbols = np.random.default_rng(base).integers(0, base, 9 * huffman.CHUNK + 5).astype(np.uint16)
    decoded = huffman.decode(huffman.encode(symbols), len(symbols))
    assert np.array_equal(decoded, symbols)
    assert decoded.dtype == (np.uint8 if base <= 256 else np.uint16)


@pytest.mark.parametrize("count", [300, 40_000, 1_000_000])
def test_groups_are_no_larger_than_pays(count):
    # 12 values, most of them rare: with too many to a code, the table costs more than it saves
    symbols = np.random.default_rng(0).geometric(0.4, count).clip(max=12).astype(np.uint16) - 1
    sizes = [len(huffman.encode(symbols))]
    for digits in (1, 2, 3):
        lengths = huffman.code_lengths(np.bincount(huffman._grouped(symbols, 12, digits)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(huffman, "_best_groups", lambda *_, d=digits, n=lengths: (d, n, 0))
            sizes.append(len(huffman.encode(symbols)))
            assert np.array_equal(huffman.decode(huffman.encode(symbols), count), symbols)
    assert sizes[0] <= 1.002 * min(sizes[1:])


def textbook_cost(counts):
    """Bits of Huffman's code by its definition: the sum of all merged weights."""
    heap = [count for count in counts if count]
    if len(heap) == 1:
        return heap[0]
    heapq.heapify(heap)
    cost = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        cost += merged
        heapq.heappush(heap, merged)
    return cost


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60).filter(any))
def test_lengths_cost_what_the_textbook_says_and_fill_kraft(counts):
    counts = np.array(counts, np.int64)
    lengths = huffman.code_lengths(counts)
    assert huffman.encoded_bits(counts) == textbook_cost(counts)
    used = lengths[lengths > 0].astype(float)
    assert sum(2.0**-used) == (0.5 if len(used) == 1 else 1.0)


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=40).filter(any))
def test_no_code_begins_with_another(counts):
    lengths = huffman.code_lengths(np.array(counts, np.int64))
    codes = huffman.canonical_codes(lengths)
    words = [f"{code:0{length}b}" for code, length in zip(codes, lengths, strict=True) if length]
    assert not any(a != b and b.startswith(a) for a in words for b in words)
    assert len(set(words)) == len(words)


def test_counts_like_fibonacci_stay_within_the_greatest_length():
    counts = np.array([1, 1] + [0] * 38, np.int64)
    for i in range(2, 40):
        counts[i] = counts[i - 1] + counts[i - 2]
    lengths = huffman.code_lengths(counts)
    assert lengths.max() <= huffman.MAX_LENGTH
    assert sum(2.0 ** -lengths.astype(float)) == 1.0


@pytest.mark.parametrize("p", [0.06, 0.1, 0.3, 0.5])
def test_small_alphabets_are_coded_in_groups_close_to_their_entropy(p):
    symbols = (np.random.default_rng(0).random(400_000) < p).astype(np.uint16)
    entropy = -len(symbols) * (p * np.log2(p) + (1 - p) * np.log2(1 - p))
    assert 8 * len(huffman.encode(symbols)) < 1.02 * entropy + 8 * 700


def test_no_shorter_than_the_optimum_of_another_implementation():
    constriction = pytest.importorskip("constriction")
    symbols = np.random.default_rng(0).geometric(0.2, 20_000).clip(max=40).astype(np.int32)
    counts = np.bincount(symbols).astype(np.float64)
    book = constriction.symbol.huffman.EncoderHuffmanTree(counts[1:])
    coder = constriction.symbol.QueueEncoder()
    for symbol in symbols:
        coder.encode_symbol(int(symbol) - 1, book)
    _, bits = coder.get_compressed()
    # its queue ends with a bit of its own
    assert bits - 1 <= huffman.encoded_bits(np.bincount(symbols)) <= bits


SMALL = np.array([0, 1, 2, 0, 0, 1] * 5, np.uint16)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d[:10], "at least"),
        (lambda d: d[:-1], "as long as its head says"),
        (lambda d: d + b"\0", "as long as its head says"),
        (lambda d: struct.pack("<I", 1 << 20) + d[4:], "groups of"),
        (lambda d: d[:4] + b"\xff" + d[5:], "groups of"),
        (lambda d: d[:25] + b"\0\0" + d[27:], "table cannot be unpacked"),
    ],
)
def test_damage_is_named(change, message):
    with pytest.raises(CheckpointError, match=message):
        huffman.decode(change(huffman.encode(SMALL)), len(SMALL))


def test_another_number_of_symbols_is_refused():
    with pytest.raises(CheckpointError, match="must be of 7 symbols"):
        huffman.decode(huffman.encode(SMALL), 7)


@given(st.data())
def test_changed_bytes_are_refused_or_are_symbols(data):
    encoded = bytearray(huffman.encode(np.random.default_rng(0).integers(0, 5, 500).astype(np.uint16)))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert huffman.decode(bytes(encoded), 500).shape == (500,)
    except CheckpointError:
        pass
