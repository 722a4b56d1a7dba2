"""The header of a stream and its validation.

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

All numbers are little-endian. The checksum is compared first, and the contents of the header
are validated all the same: an attacker can compute a checksum.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch

from lmcompress.entropy_coding.coders import METHODS, Coded
from lmcompress.entropy_coding.forms import DTYPES, FORMS, Form
from lmcompress.errors import CheckpointError

MAGIC, VERSION = b"LMCS", 1
MAX_AXES = 8
_PREFIX, _FIXED, _PART = struct.Struct("<4sI"), struct.Struct("<BBBB"), struct.Struct("<QBBQ")
PART_BYTES = _PART.size
"""The header fields of each array of symbols."""
_WIDTHS = (1, 2, 4, 8, 16)
_MAX_PARTS = 32


class PartInfo(NamedTuple):
    """The header entry of one array of symbols.

    Attributes:
        symbols: number of symbols.
        width: bits of a symbol in a fixed-width code.
        method: ``fixed``, ``zstd`` or ``huffman``.
        start: offset of its bytes.
        bytes: number of bytes.
    """

    symbols: int
    width: int
    method: str
    start: int
    bytes: int

    @property
    def end(self) -> int:
        """Offset of the end of its bytes."""
        return self.start + self.bytes


class Head(NamedTuple):
    """The header of a stream.

    Attributes:
        form: see :mod:`lmcompress.entropy_coding.forms`.
        dtype: dtype of the tensor.
        shape: shape of the tensor.
        parts: its arrays of symbols.
    """

    form: Form
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[PartInfo, ...]


def read_head(data: bytes | memoryview) -> Head:
    """The header of a stream, after its checksum was compared.

    Args:
        data: the whole stream.

    Raises:
        CheckpointError: If it is not a stream, is cut off or was changed.
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
    if version < 1 or form >= len(FORMS) or dtype >= len(DTYPES) or axes > MAX_AXES:
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
        if width not in _WIDTHS or method >= len(METHODS):
            raise CheckpointError("its stream has an array of symbols that none has: it was changed")
        parts.append(PartInfo(symbols, width, METHODS[method], at, size))
        at += size
    if at != len(data):
        raise CheckpointError(f"its stream must have {at} bytes, got {len(data)}: it is cut off or was changed")
    return Head(FORMS[form], DTYPES[dtype], tuple(shape), tuple(parts))


def with_head(form: Form, dtype: torch.dtype, shape: Sequence[int], coded: Sequence[Coded]) -> bytes:
    """A whole stream: header, checksum and the bytes of its arrays.

    Args:
        form: one of :data:`~lmcompress.entropy_coding.forms.FORMS`.
        dtype: dtype of the tensor.
        shape: shape of the tensor.
        coded: its arrays of symbols.
    """
    head = _FIXED.pack(VERSION, FORMS.index(form), DTYPES.index(dtype), len(shape))
    head += struct.pack(f"<{len(shape)}QB", *shape, len(coded))
    head += b"".join(_PART.pack(one.symbols, one.width, METHODS.index(one.method), len(one.data)) for one in coded)
    body = head + b"".join(one.data for one in coded)
    return _PREFIX.pack(MAGIC, zlib.crc32(body)) + body
