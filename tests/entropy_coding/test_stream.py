"""stream: every tensor comes back to the bit, small where it has structure; damage is an error that names it."""

import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file as save_safetensors

from lmcompress.entropy_coding import (
    CODERS,
    decode,
    describe,
    describe_file,
    encode,
    huffman,
    load_file,
    save_file,
    shannon_bits,
    stream_shape,
)
from lmcompress.entropy_coding.forms import DTYPES, FORMS, check_sizes, forms_for, join, patterns, split
from lmcompress.entropy_coding.symbols import index_width
from lmcompress.errors import CheckpointError, LmcompressError
from lmcompress.numerics.grids import Grid
from lmcompress.numerics.packing import pack


def same(one, other):
    """Equal to the bit, in type and in shape."""
    return one.dtype == other.dtype and one.shape == other.shape and np.array_equal(patterns(one), patterns(other))


@st.composite
def tensors(draw):
    """Tensors of every type, dense, sparse, of few values, with NaN, infinities and negative zeros."""
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    tensor = torch.randn(shape, generator=generator)
    if draw(st.booleans()):
        tensor = torch.where(torch.rand(shape, generator=generator) < 0.7, 0.0, tensor)
    if draw(st.booleans()):
        tensor = torch.round(tensor * 2) / 2
    if draw(st.booleans()) and tensor.numel() > 3:
        tensor.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 0.0])
    dtype = draw(st.sampled_from(DTYPES))
    return tensor.nan_to_num(0, 1, 0).abs().to(dtype) if not dtype.is_floating_point else tensor.to(dtype)


@pytest.mark.parametrize("coder", CODERS)
@given(tensor=tensors())
def test_every_tensor_comes_back_to_the_bit(coder, tensor):
    stream = encode(tensor, coder)
    assert same(decode(stream, shape=tuple(tensor.shape), dtype=tensor.dtype), tensor)
    assert len(stream) <= tensor.nbytes + 41 + 8 * tensor.dim()


@given(tensor=tensors())
def test_every_form_that_fits_gives_the_same_numbers(tensor):
    found = patterns(tensor)
    for form in forms_for(found):
        parts = split(found, form)
        check_sizes(form, [(len(part.symbols), part.width) for part in parts], found.itemsize, len(found))
        back = np.full_like(found, 7)
        join(parts, form, back)
        assert np.array_equal(back, found), form


def test_all_forms_are_used():
    torch.manual_seed(0)
    weight = torch.randn(300, 300)
    grid = torch.round(weight * 4) / 4 + 0.0
    cases = {
        "planes": weight,
        "codebook": grid + 10,
        "mask_planes": torch.where(weight.abs() > 0.8, weight, 0.0),
        "gaps_codebook": torch.where(weight.abs() > 2.5, grid, 0.0),
        "plain": torch.arange(200, dtype=torch.uint8).repeat(9),
        "gaps_planes": torch.where(weight.abs() > 2.5, weight, 0.0),
        "mask_codebook": torch.where(weight.abs() > 0.8, grid, 0.0),
    }
    assert {name: describe(encode(tensor)).form for name, tensor in cases.items()} == {name: name for name in cases}
    assert set(cases) == set(FORMS)


def test_gaps_longer_than_a_symbol_come_back():
    weight = torch.zeros(10_000)
    weight[[3, 254, 255, 600, 1110, 1111, 9_999]] = torch.arange(1.0, 8.0)
    assert same(decode(encode(weight)), weight)
    assert len(encode(weight)) < 300


@pytest.mark.parametrize("count, width", [(0, 1), (2, 1), (3, 2), (5, 4), (17, 8), (300, 16)])
def test_indices_have_the_least_width_that_fills_bytes(count, width):
    assert index_width(count) == width


TERNARY = Grid(low=-1, levels=3)


def ternary(weight):
    return (torch.sign(weight) * (weight.abs() > 0.7 * weight.abs().mean())).to(torch.int8)


@pytest.mark.parametrize(
    "make",
    [
        lambda w: pack(ternary(w), TERNARY),
        lambda w: pack(ternary(w), TERNARY, 2),
        lambda w: pack((w * 2.8).round().clamp(-7, 7).to(torch.int8), Grid(low=-7, levels=15)),
        lambda w: pack((w / w.abs().max() * 127).round().to(torch.int8), Grid(low=-127, levels=255)),
        lambda w: torch.where(w.abs() > 0.84, torch.round(w * 2.5) / 2.5, 0.0),
        lambda w: torch.round(w * 4) / 4 + 0.0,
    ],
    ids=["base 3", "2 bits", "4 bits", "8 bits", "pruned and shared", "shared"],
)
def test_stored_within_a_hundredth_of_shannon(make):
    torch.manual_seed(0)
    tensor = make(torch.randn(512, 1024))
    assert 8 * len(encode(tensor)) <= 1.01 * shannon_bits(tensor) + 8 * 300


def test_shannon_is_the_entropy_of_an_independent_implementation():
    stats = pytest.importorskip("scipy.stats")
    torch.manual_seed(0)
    tensor = torch.randint(0, 9, (5000,)).float()
    _, counts = np.unique(tensor.numpy(), return_counts=True)
    assert shannon_bits(tensor) == pytest.approx(5000 * stats.entropy(counts, base=2))


def test_no_larger_than_an_ans_coder_by_much():
    constriction = pytest.importorskip("constriction")
    torch.manual_seed(0)
    codes = ternary(torch.randn(300, 1000)).flatten() + 1
    counts = np.bincount(codes.numpy())
    coder = constriction.stream.stack.AnsCoder()
    model = constriction.stream.model.Categorical(counts / counts.sum(), perfect=False)
    coder.encode_reverse(codes.numpy().astype(np.int32), model)
    ans = 4 * len(coder.get_compressed())
    assert len(encode(pack(codes - 1, TERNARY, 2))) < 1.01 * ans + 300


def test_a_description_adds_up():
    torch.manual_seed(0)
    weight = torch.where(torch.randn(400, 100).abs() > 1, torch.round(torch.randn(400, 100)), 0.0) + 0.0
    told = describe(encode(weight))
    assert told.numbers == 40_000 and told.dense_bytes == 160_000 and told.shape == (400, 100)
    assert told.bytes == len(encode(weight))
    assert told.huffman_bits <= told.fixed_bits
    assert told.shannon_bits <= 8 * told.bytes <= told.fixed_bits


@pytest.mark.parametrize("coder", CODERS)
def test_only_the_wanted_coder_is_used(coder):
    torch.manual_seed(0)
    told = describe(encode(torch.round(torch.randn(200, 200)) + 0.0, coder))
    assert set(told.coders) <= ({"fixed", coder} if coder != "auto" else {"fixed", "zstd", "huffman"})
    assert told.coders[-1] != "fixed"


CHOICES = {
    "8 bits": lambda w: (w / w.abs().max() * 127).round().to(torch.int8),
    "base 3": lambda w: pack(ternary(w), TERNARY),
    "pruned": lambda w: torch.where(w.abs() > 1.2, w, 0.0),
    "pruned and shared": lambda w: torch.where(w.abs() > 0.84, torch.round(w * 2.5) / 2.5, 0.0),
    "shared": lambda w: torch.round(w * 4) / 4 + 0.0,
    "repeated": lambda w: w[:8].repeat(32, 1),
    "float": lambda w: w,
}


@pytest.mark.parametrize("make", CHOICES.values(), ids=CHOICES.keys())
def test_auto_takes_the_smaller_of_both_and_encodes_by_huffman_only_what_is_stored(make, monkeypatch):
    torch.manual_seed(0)
    tensor = make(torch.randn(256, 300))
    alone = {coder: len(encode(tensor, coder)) for coder in ("zstd", "huffman")}
    encoded = []
    monkeypatch.setattr(huffman, "encode", lambda *args, do=huffman.encode: encoded.append(1) or do(*args))
    told = describe(encode(tensor))
    # arrays of one stream may have different coders; Huffman's must save half a per cent, for it is slow to decode
    assert told.bytes <= 1.006 * min(alone.values()) + 16
    assert len(encoded) == told.coders.count("huffman")


def test_files_hold_any_network_and_are_replaced_whole(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(50, 20), torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    with torch.no_grad():
        net[0].weight[net[0].weight.abs() < 0.1] = 0
    size = save_file(net.state_dict(), tmp_path / "net.safetensors")
    assert size == (tmp_path / "net.safetensors").stat().st_size
    assert os.listdir(tmp_path) == ["net.safetensors"]
    back = load_file(tmp_path / "net.safetensors")
    assert back.keys() == net.state_dict().keys()
    assert all(same(back[name], tensor) for name, tensor in net.state_dict().items())
    assert set(describe_file(tmp_path / "net.safetensors")) == set(back)
    before = (tmp_path / "net.safetensors").read_bytes()
    with pytest.raises(LmcompressError, match="must be of one of"):
        save_file({"a": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "net.safetensors")
    assert (tmp_path / "net.safetensors").read_bytes() == before and len(os.listdir(tmp_path)) == 1
    with pytest.raises(LmcompressError, match="could not write .*nowhere"):
        save_file({"a": torch.zeros(2)}, tmp_path / "nowhere/net.safetensors")


def test_other_files_are_refused(tmp_path):
    save_safetensors({"a": torch.zeros(3)}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="must be a stream"):
        load_file(tmp_path / "plain.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"\xff" * 50)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_file(tmp_path / "junk.safetensors")


def test_bad_requests_are_named():
    with pytest.raises(LmcompressError, match="coder must be one of auto, zstd, huffman, got 'rar'"):
        encode(torch.zeros(2), "rar")
    with pytest.raises(LmcompressError, match="must have values to be coded"):
        encode(torch.zeros(2, device="meta"))
    with pytest.raises(LmcompressError, match="at most 8 axes"):
        encode(torch.zeros((1,) * 9))


def reseal(stream):
    """The stream with a checksum that fits, as somebody who means harm would write it."""
    return stream[:4] + struct.pack("<I", zlib.crc32(stream[8:])) + stream[8:]


WEIGHT = torch.where(torch.arange(3000).remainder(7) > 4, torch.arange(3000).remainder(5) + 1.0, 0.0).reshape(30, 100)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s[:5], "no stream"),
        (lambda s: b"XXXX" + s[4:], "no stream"),
        (lambda s: s[:-1], "checksum"),
        (lambda s: s + b"\0", "checksum"),
        (lambda s: s[:20] + bytes([s[20] ^ 1]) + s[21:], "checksum"),
        (lambda s: reseal(s[:8] + b"\x09" + s[9:]), "version 9, this lmcompress reads up to 1"),
        (lambda s: reseal(s[:9] + b"\x77" + s[10:]), "a head that none has"),
        (lambda s: reseal(s[:14]), "cut off"),
        (lambda s: reseal(s + b"\0"), "must have"),
    ],
)
def test_damage_names_the_tensor(change, message):
    with pytest.raises(CheckpointError, match=f"tensor encoder.weight cannot be decoded: .*{message}"):
        decode(change(encode(WEIGHT)), "encoder.weight")


def test_the_shape_is_read_without_decoding():
    assert stream_shape(encode(WEIGHT)) == tuple(WEIGHT.shape)
    with pytest.raises(CheckpointError, match="tensor head.weight cannot be decoded: .*checksum"):
        stream_shape(encode(WEIGHT)[:-1], "head.weight")


def test_a_stream_of_another_tensor_is_refused_before_anything_is_decoded():
    stream = encode(torch.zeros(10_000, 1000))
    assert len(stream) < 20_000
    with pytest.raises(CheckpointError, match=r"must have shape \(2, 2\)"):
        decode(stream, shape=(2, 2))
    with pytest.raises(CheckpointError, match=r"type torch.float16"):
        decode(stream, dtype=torch.float16)


def test_an_absurd_shape_is_refused_without_allocating():
    head = struct.pack("<BBBB2QB", 1, 0, 0, 2, 1 << 40, 1 << 20, 0)
    with pytest.raises(CheckpointError, match="at most"):
        decode(b"LMCS" + struct.pack("<I", zlib.crc32(head)) + head)


def test_a_short_stream_that_says_it_is_long_is_refused_without_allocating():
    """All zeros in gaps and a codebook take no bytes: only the length of the stream tells how much that may be."""
    form = FORMS.index("gaps_codebook")
    head = struct.pack("<BBBBQB", 1, form, DTYPES.index(torch.float32), 1, 1 << 33, 6)
    head += b"".join(struct.pack("<QBBQ", 0, width, 0, 0) for width in (8, 8, 8, 8, 8, 1))
    stream = b"LMCS" + struct.pack("<I", zlib.crc32(head)) + head
    for read in (decode, describe):
        with pytest.raises(CheckpointError, match=r"at most 1073741824 bytes, as its stream has \d+, .* with shape"):
            read(stream)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(1).expand(1), torch.ones(1).expand(5, 4), torch.zeros(3, 0, 2), torch.arange(10.0)[4::10],
        torch.arange(20.0).view(5, 4)[:, :1].t()[:, :1], torch.arange(10.0)[3:7], torch.from_numpy(np.zeros((0,))),
    ],
)  # fmt: skip
def test_strides_that_mean_nothing_do_not_matter(tensor):
    assert torch.equal(decode(encode(tensor)), tensor) and decode(encode(tensor)).shape == tensor.shape


def test_sparse_tensors_are_refused():
    with pytest.raises(LmcompressError, match=r"must be dense \(torch.strided\) to be coded, got torch.sparse_coo"):
        encode(torch.eye(3).to_sparse())


@pytest.mark.parametrize(
    "tensor", [torch.randn(1000, 2000), torch.randn(1000, 2000).relu(), torch.ones(1000, 2000, dtype=torch.uint8)]
)
@pytest.mark.parametrize("coder", CODERS)
def test_decoding_takes_little_more_than_the_tensor(tensor, coder):
    stream = encode(torch.where(tensor > 1, torch.ones(()), tensor.float()).to(tensor.dtype), coder)
    decode(stream)
    tracemalloc.start()
    decode(stream)
    # the tensor itself is of torch, which this does not see; what Huffman's decoder needs at once is the same for all
    assert tracemalloc.get_traced_memory()[1] <= tensor.nbytes + (20 << 20)
    tracemalloc.stop()


HEAD = 8 + 4 + 8 * WEIGHT.dim() + 1


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_hostile_head_is_refused_before_anything_is_allocated(data):
    stream = bytearray(encode(WEIGHT, data.draw(st.sampled_from(CODERS))))
    sizes = st.one_of(st.integers(0, 4000), st.integers(0, 2**64 - 1))
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.integers(0, stream[HEAD - 1] - 1))
        symbols, width, method, size = struct.unpack_from("<QBBQ", stream, HEAD + 18 * part)
        changed = data.draw(
            st.one_of(
                st.tuples(sizes, st.just(width), st.just(method), st.just(size)),
                st.tuples(st.just(symbols), st.sampled_from([1, 2, 4, 8, 16]), st.integers(0, 2), st.just(size)),
                st.tuples(st.just(symbols), st.just(width), st.just(method), sizes),
            )
        )
        struct.pack_into("<QBBQ", stream, HEAD + 18 * part, *changed)
    if data.draw(st.booleans()):
        stream[9] = data.draw(st.integers(0, len(FORMS) - 1))
    tracemalloc.start()
    try:
        found = decode(reseal(bytes(stream)), "weight", shape=tuple(WEIGHT.shape), dtype=WEIGHT.dtype)
        assert found.shape == WEIGHT.shape
    except CheckpointError as error:
        assert "tensor weight cannot be decoded" in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20


def test_a_long_code_takes_no_more_memory_than_a_table():
    # the deepest table that there may be, in a stream of a few bytes
    lengths = np.array([*range(1, huffman.MAX_LENGTH + 1), huffman.MAX_LENGTH], np.uint8)
    table = zlib.compress(lengths.tobytes())
    data = struct.pack("<IBIQII", len(lengths), 1, len(lengths), 4, len(table), 1) + table + b"\4\0" + b"\0"
    tracemalloc.start()
    assert huffman.decode(data, 4).tolist() == [0, 0, 0, 0]
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_compressed_symbols_that_would_not_stop_are_refused():
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 26))
    head = struct.pack("<BBBB2QB", 1, FORMS.index("plain"), DTYPES.index(torch.uint8), 2, 10, 10, 1)
    body = head + struct.pack("<QBBQ", 100, 8, 1, len(bomb)) + bomb
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="must have 100 bytes"):
        decode(b"LMCS" + struct.pack("<I", zlib.crc32(body)) + body)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def mutated(stream, random, others):
    """The stream, changed in one of the ways in which files are."""
    data = bytearray(stream)
    way = random.integers(7)
    at = int(random.integers(len(data)))
    if way == 0:
        data[at] ^= 1 << int(random.integers(8))
    elif way == 1:
        del data[at:]
    elif way == 2:
        other = int(random.integers(len(data)))
        data[at : at + 8] = data[other : other + 8]
    elif way == 3:
        data[at : at + 4] = random.bytes(4)
    elif way == 4:
        # what is before this place, and what is after one of another stream
        other = others[int(random.integers(len(others)))]
        data[at:] = other[int(random.integers(len(other))) :]
    elif way == 5:
        # the head: its numbers are where decoders are led astray
        at = int(random.integers(8, min(len(data), 150)))
        data[at : at + 1] = random.bytes(1)
    else:
        del data[at : at + int(random.integers(1, 9))]
    return bytes(data)


def hammer(count):
    """Change streams of all kinds; whatever is decoded must be the tensor, or refused; with the checksum made right, a
    tensor of the right shape, or refused."""
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    noise = torch.randn(40, 60)
    cases = [WEIGHT, noise, noise.bfloat16(), torch.round(noise * 3) / 3, pack(ternary(noise), TERNARY)]
    cases += [torch.where(noise.abs() > 1, noise, 0.0), torch.where(noise.abs() > 2, torch.round(noise), 0.0)]
    streams = [(tensor, encode(tensor, coder)) for tensor in cases for coder in CODERS]
    others = [stream for _, stream in streams]
    for number in range(count):
        tensor, stream = streams[number % len(streams)]
        changed = mutated(stream, random, others)
        for data, sealed in ((changed, False), (reseal(changed) if len(changed) > 8 else changed, True)):
            try:
                found = decode(data, "weight", shape=tuple(tensor.shape), dtype=tensor.dtype)
            except CheckpointError as error:
                assert "tensor weight" in str(error)
                continue
            assert found.shape == tensor.shape and found.dtype == tensor.dtype
            assert sealed or same(found, tensor)


def test_changed_streams_never_give_other_weights():
    hammer(600)


@pytest.mark.slow
def test_a_hundred_thousand_changed_streams():
    hammer(100_000)


@settings(max_examples=50)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data):
    with pytest.raises(CheckpointError):
        decode(data, "weight")
    with pytest.raises(CheckpointError):
        decode(reseal(b"LMCS0000\x01" + data))
