"""A tensor as a self-describing stream of bytes, and a file of such streams.

======= ============================================================
bytes   what
======= ============================================================
4       ``LMCS``
4       CRC-32 of all that follows
1       version
1       form (:mod:`lmcompress.entropy_coding.forms`)
1       type of the numbers
1       axes, each of which follows
8 each  the shape
1       arrays of symbols, each of which follows
18 each symbols, their width, their coder, bytes
…       the bytes of the arrays
======= ============================================================

All numbers are little-endian. The checksum is compared before anything else is read, and what a stream says of itself
is checked all the same: whoever changes one can compute a checksum.
"""

from __future__ import annotations

import math
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import zstandard
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file as save_safetensors
from torch import Tensor

from lmcompress.entropy_coding import huffman
from lmcompress.entropy_coding.forms import (
    DTYPES,
    FORMS,
    Form,
    Part,
    check_sizes,
    distinct,
    forms_for,
    join,
    packed,
    packed_size,
    patterns,
    split,
    unpacked,
)
from lmcompress.errors import CheckpointError, LmcompressError

Coder = Literal["auto", "zstd", "huffman"]
CODERS: tuple[Coder, ...] = ("auto", "zstd", "huffman")
"""``zstd`` and ``huffman`` use that one where it is smaller than a fixed-width code, ``auto`` the smaller of both."""

MAGIC, VERSION = b"LMCS", 1
_PREFIX, _FIXED, _PART = struct.Struct("<4sI"), struct.Struct("<BBBB"), struct.Struct("<QBBQ")
_METHODS = ("fixed", "zstd", "huffman")
_WIDTHS = (1, 2, 4, 8, 16)
_MAX_AXES, _MAX_PARTS = 8, 32
MAX_BYTES, MIN_BYTES, MAX_RATIO = 1 << 36, 1 << 30, 4096
"""Of a tensor whose shape nobody has said beforehand: never more bytes than the first; more than the second only as
many as this ratio allows to the bytes of its stream."""
# zstd takes symbols for repeated text where there is none; the less it looks for it, the smaller the streams
_ZSTD = zstandard.ZstdCompressionParameters.from_level(3, strategy=zstandard.STRATEGY_FAST, min_match=7)
# of another's size that Huffman data may have: the others are decoded ten times as fast
_WORTH_IT = 0.995


def encode(tensor: Tensor, coder: Coder = "auto") -> bytes:
    """The tensor as a stream, in the smallest of the forms that fit it.

    Args:
        tensor: any shape, on any device; of a type in :data:`~lmcompress.entropy_coding.forms.DTYPES`.
        coder: one of :data:`CODERS`.

    Returns:
        The stream; at most a head longer than the bytes of the tensor.

    Raises:
        LmcompressError: no such coder, or a type or number of axes that no stream has.

    Example:
        >>> weight = torch.zeros(100, 100)
        >>> weight[0, :3] = torch.tensor([1.0, -1.0, 1.0])
        >>> len(encode(weight)), bool((decode(encode(weight)) == weight).all())
        (78, True)
    """
    if coder not in CODERS:
        raise LmcompressError(f"coder must be one of {', '.join(CODERS)}, got {coder!r}")
    if tensor.dim() > _MAX_AXES:
        raise LmcompressError(f"a tensor must have at most {_MAX_AXES} axes to be a stream, got {tensor.dim()}")
    found = patterns(tensor)
    best: tuple[Form, list[_Coded]] | None = None
    for form in forms_for(found):
        coded = [_coded(part, coder) for part in split(found, form)]
        if best is None or _cost(coded) < _cost(best[1]):
            best = form, coded
    assert best is not None, "plain always fits"
    form, coded = best
    head = _FIXED.pack(VERSION, FORMS.index(form), DTYPES.index(tensor.dtype), tensor.dim())
    head += struct.pack(f"<{tensor.dim()}QB", *tensor.shape, len(coded))
    head += b"".join(_PART.pack(one.symbols, one.width, _METHODS.index(one.method), len(one.data)) for one in coded)
    body = head + b"".join(one.data for one in coded)
    return _PREFIX.pack(MAGIC, zlib.crc32(body)) + body


def decode(
    stream: bytes | memoryview | Tensor,
    name: str = "of a stream",
    *,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The tensor again, to the bit.

    Args:
        stream: from :func:`encode`; as a tensor, ``(n,)`` uint8.
        name: of the tensor, for messages.
        shape: what it must be, where that is known: nothing greater is allocated. Where it is not, no more than
            :data:`MIN_BYTES`, or than :data:`MAX_RATIO` times the stream.
        dtype: the same.

    Returns:
        The tensor, on the CPU.

    Raises:
        CheckpointError: a stream that is cut, changed, of a later version, or of another tensor.
    """
    data = _bytes(stream)
    with _named(name):
        head = read_head(data)
        expected = (head.shape if shape is None else tuple(shape), dtype or head.dtype)
        if (head.shape, head.dtype) != expected:
            raise CheckpointError(
                f"it must have shape {expected[0]} and type {expected[1]}, its stream says {head.shape} and "
                f"{head.dtype}: config.json and the weights do not belong together"
            )
        count = math.prod(head.shape)
        most = min(MAX_BYTES, max(MIN_BYTES, MAX_RATIO * len(data)))
        if shape is None and count * head.dtype.itemsize > most:
            raise CheckpointError(
                f"it must have at most {most} bytes, as its stream has {len(data)}, which says {head.shape}; if that "
                "is true, say so with shape"
            )
        check_sizes(head.form, [(one.symbols, one.width) for one in head.parts], head.dtype.itemsize, count)
        tensor = torch.empty(head.shape, dtype=head.dtype)
        # one array after the other: each is as long as the tensor, in small numbers
        parts = (Part(_symbols(one, data[one.start : one.start + one.bytes]), one.width) for one in head.parts)
        join(parts, head.form, patterns(tensor))
        if head.dtype is torch.bool and count and int(tensor.view(torch.uint8).max()) > 1:
            raise CheckpointError("booleans must be 0 or 1, got others: it was changed")
        return tensor


def stream_shape(stream: bytes | memoryview | Tensor, name: str = "of a stream") -> tuple[int, ...]:
    """The shape of the tensor in a stream, which is not decoded for it.

    Args:
        stream: as for :func:`decode`.
        name: of the tensor, for messages.

    Raises:
        CheckpointError: it is no stream, or its checksum is wrong.
    """
    with _named(name):
        return read_head(_bytes(stream)).shape


class PartInfo(NamedTuple):
    """What a stream says of one of its arrays of symbols.

    Attributes:
        symbols: how many.
        width: bits of a symbol in a fixed-width code.
        method: ``fixed``, ``zstd`` or ``huffman``.
        start: where its bytes begin.
        bytes: how many it has.
    """

    symbols: int
    width: int
    method: str
    start: int
    bytes: int


class Head(NamedTuple):
    """What a stream says of itself.

    Attributes:
        form: see :mod:`lmcompress.entropy_coding.forms`.
        dtype: of the tensor.
        shape: of the tensor.
        parts: its arrays of symbols.
    """

    form: Form
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[PartInfo, ...]


def read_head(data: bytes | memoryview) -> Head:
    """What a stream says of itself, after its checksum was compared.

    Args:
        data: the whole stream.

    Raises:
        CheckpointError: it is none, or is cut off or changed.
    """
    if len(data) < _PREFIX.size + _FIXED.size or bytes(data[:4]) != MAGIC:
        raise CheckpointError("it is no stream of lmcompress, or is cut off")
    _, checksum = _PREFIX.unpack_from(data)
    if zlib.crc32(data[_PREFIX.size :]) != checksum:
        raise CheckpointError("the checksum of its stream is wrong: it is cut off or was changed")
    version, form, dtype, axes = _FIXED.unpack_from(data, _PREFIX.size)
    if version > VERSION:
        raise CheckpointError(
            f"its stream has version {version}, this lmcompress reads up to {VERSION}: pip install --upgrade lmcompress"
        )
    if version < 1 or form >= len(FORMS) or dtype >= len(DTYPES) or axes > _MAX_AXES:
        raise CheckpointError("its stream has a head that none has: it was changed")
    at = _PREFIX.size + _FIXED.size
    try:
        *shape, count = struct.unpack_from(f"<{axes}QB", data, at)
        at += 8 * axes + 1
        if count > _MAX_PARTS:
            raise CheckpointError(f"its stream must have at most {_MAX_PARTS} arrays, got {count}: it was changed")
        entries = [_PART.unpack_from(data, at + _PART.size * i) for i in range(count)]
    except struct.error as error:
        raise CheckpointError("the head of its stream is cut off") from error
    at += _PART.size * count
    parts = []
    for symbols, width, method, size in entries:
        if width not in _WIDTHS or method >= len(_METHODS):
            raise CheckpointError("its stream has an array of symbols that none has: it was changed")
        parts.append(PartInfo(symbols, width, _METHODS[method], at, size))
        at += size
    if at != len(data):
        raise CheckpointError(f"its stream must have {at} bytes, got {len(data)}: it is cut off or was changed")
    return Head(FORMS[form], DTYPES[dtype], tuple(shape), tuple(parts))


@dataclass(frozen=True)
class StreamInfo:
    """How a tensor is stored, and how small it could be.

    Attributes:
        shape: of the tensor.
        form: see :mod:`lmcompress.entropy_coding.forms`.
        coders: of its arrays of symbols, in order.
        numbers: of the tensor.
        bytes: of the stream.
        dense_bytes: of the tensor.
        fixed_bits: of all symbols in a fixed-width code, codebooks included.
        huffman_bits: of all symbols in Huffman's, without tables.
        shannon_bits: zero-order entropy of the tensor's numbers (of its bytes, where a codebook would not do), over all
            of them; a form that looks at zeros and numbers apart can be a little smaller.
    """

    shape: tuple[int, ...]
    form: Form
    coders: tuple[str, ...]
    numbers: int
    bytes: int
    dense_bytes: int
    fixed_bits: int
    huffman_bits: int
    shannon_bits: float


def describe(stream: bytes | memoryview | Tensor, name: str = "of a stream") -> StreamInfo:
    """How a tensor is stored, and how small it could be.

    Args:
        stream: as for :func:`decode`.
        name: of the tensor, for messages.

    Raises:
        CheckpointError: as :func:`decode`.
    """
    data = _bytes(stream)
    tensor = decode(data, name)
    head, found = read_head(data), patterns(tensor)
    parts = split(found, head.form)
    return StreamInfo(
        shape=head.shape,
        form=head.form,
        coders=tuple(one.method for one in head.parts),
        numbers=tensor.numel(),
        bytes=len(data),
        dense_bytes=found.nbytes,
        fixed_bits=sum(len(part.symbols) * part.width for part in parts),
        huffman_bits=sum(huffman.encoded_bits(_counts(part)) for part in parts),
        shannon_bits=shannon_bits(tensor),
    )


def shannon_bits(tensor: Tensor) -> float:
    """Zero-order entropy of a tensor's numbers, summed over all: no code of single numbers takes fewer bits.

    Args:
        tensor: any shape. Where its numbers are nearly all different, so that a table of them would be as long as the
            tensor, the entropy is of their bytes, place by place.

    Returns:
        Bits.

    Example:
        >>> shannon_bits(torch.tensor([1.0, 2.0, 1.0, 2.0]))
        4.0
    """
    found = patterns(tensor)
    values = distinct(found)
    if values is not None and 2 * len(values) <= len(found):
        return _entropy(np.unique(found, return_counts=True)[1])
    return sum(_entropy(_counts(part)) for part in split(found, "planes"))


def save_file(tensors: Mapping[str, Tensor], path: str | Path, coder: Coder = "auto") -> int:
    """Write tensors as a safetensors file of streams; what was there before is replaced once the new one is whole.

    Args:
        tensors: by name; of any network.
        path: of the file.
        coder: one of :data:`CODERS`.

    Returns:
        Bytes of the file.

    Raises:
        LmcompressError: as :func:`encode`, or the file cannot be written: a full disk, no such folder.
    """
    path = Path(path)
    streams = {name: stream_tensor(tensor, coder) for name, tensor in tensors.items()}
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            save_safetensors(streams, Path(scratch) / path.name, metadata={"format": "lmcompress-streams"})
            os.replace(Path(scratch) / path.name, path)
    except (OSError, SafetensorError) as error:
        raise LmcompressError(f"could not write {path}: {error}. Nothing was changed there") from error
    return path.stat().st_size


def load_file(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file of streams.

    Args:
        path: from :func:`save_file`.

    Returns:
        By name, on the CPU.

    Raises:
        CheckpointError: no safetensors file, or as :func:`decode`.
    """
    return {name: decode(stream, name) for name, stream in _streams(path).items()}


def describe_file(path: str | Path) -> dict[str, StreamInfo]:
    """:func:`describe` of every tensor in a file of streams.

    Args:
        path: from :func:`save_file`.

    Raises:
        CheckpointError: as :func:`load_file`.
    """
    return {name: describe(stream, name) for name, stream in _streams(path).items()}


def stream_tensor(tensor: Tensor, coder: Coder = "auto") -> Tensor:
    """A tensor's stream as a tensor, ``(n,)`` uint8.

    Args:
        tensor: as for :func:`encode`.
        coder: one of :data:`CODERS`.
    """
    return torch.frombuffer(bytearray(encode(tensor, coder)), dtype=torch.uint8)


class _Coded(NamedTuple):
    symbols: int
    width: int
    method: str
    data: bytes


def _coded(part: Part, coder: Coder) -> _Coded:
    """An array of symbols as the coder has it, or in a fixed-width code where that is not longer."""
    plain = packed(part)
    found = {"fixed": plain}
    if coder != "huffman":
        found["zstd"] = zstandard.ZstdCompressor(compression_params=_ZSTD).compress(plain)
    # below the entropy of single symbols is only what sees how they depend on one another, as zstd does
    if coder != "zstd" and _entropy(_counts(part)) < _WORTH_IT * 8 * min(map(len, found.values())):
        found["huffman"] = huffman.encode(part.symbols)
    coded = [_Coded(len(part.symbols), part.width, method, data) for method, data in found.items()]
    return min(coded, key=lambda one: _cost([one]))


def _cost(coded: list[_Coded]) -> float:
    """Bytes of arrays, those that are slow to decode counted for a little more."""
    return sum(_PART.size + len(one.data) / (_WORTH_IT if one.method == "huffman" else 1) for one in coded)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Let what is wrong with a stream say of which tensor it is."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"tensor {name} cannot be decoded: {error}; fetch or copy the file again") from error


def _symbols(one: PartInfo, data: memoryview) -> np.ndarray:
    """The symbols of a part, of which nothing has been believed yet."""
    if one.method == "fixed":
        return unpacked(data, one.symbols, one.width)
    if one.method == "zstd":
        return unpacked(_decompressed(data, packed_size(one.symbols, one.width)), one.symbols, one.width)
    # a bit stands for a group of symbols at least
    if one.symbols > 8 * huffman.MAX_DIGITS * len(data):
        raise CheckpointError(f"{one.symbols} symbols cannot lie in {len(data)} bytes: the data was changed")
    symbols = huffman.decode(data, one.symbols)
    if one.symbols and int(symbols.max()) >> one.width:
        raise CheckpointError(f"symbols must have {one.width} bits, got {int(symbols.max())}: the data was changed")
    return symbols


def _decompressed(data: memoryview, size: int) -> bytes:
    try:
        # the library allocates what the frame says, whatever limit it is given
        if zstandard.frame_content_size(data) != size:
            raise CheckpointError(f"compressed symbols must have {size} bytes, and do not: the data was changed")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CheckpointError(f"its symbols cannot be decompressed ({error}): the data was changed") from error


def _streams(path: str | Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file, or is cut off ({error})") from error
    for name, stream in found.items():
        if stream.dtype is not torch.uint8 or stream.dim() != 1:
            raise CheckpointError(
                f"tensor {name} of {path} must be a stream, (n,) uint8, got {tuple(stream.shape)} {stream.dtype}; "
                "the file was not written by lmcompress.entropy_coding.save_file"
            )
    return found


def _bytes(stream: bytes | memoryview | Tensor) -> memoryview:
    if isinstance(stream, Tensor):
        return memoryview(stream.detach().cpu().contiguous().numpy().data).cast("B")
    return memoryview(stream)


def _counts(part: Part) -> np.ndarray:
    return np.bincount(part.symbols) if len(part.symbols) else np.zeros(0, np.int64)


def _entropy(counts: np.ndarray) -> float:
    counts = counts[counts > 0]
    total = counts.sum()
    return float((counts * np.log2(total / counts)).sum()) if len(counts) else 0.0
