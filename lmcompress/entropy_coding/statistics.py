"""How tensors are stored as streams, and their theoretical minimum size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from lmcompress.entropy_coding import huffman
from lmcompress.entropy_coding.coders import entropy_bits, symbol_counts
from lmcompress.entropy_coding.forms import Form, distinct, patterns, split
from lmcompress.entropy_coding.header import read_head
from lmcompress.entropy_coding.stream import as_bytes, decode, file_streams


@dataclass(frozen=True)
class StreamInfo:
    """The storage of a tensor, and its theoretical minimum size.

    Attributes:
        shape: shape of the tensor.
        form: see :mod:`lmcompress.entropy_coding.forms`.
        coders: coders of its arrays of symbols, in order.
        numbers: number of elements of the tensor.
        bytes: size of the stream.
        dense_bytes: size of the tensor.
        fixed_bits: bits of all symbols in a fixed-width code, codebooks included.
        huffman_bits: bits of all symbols in a Huffman code, without tables.
        shannon_bits: zero-order entropy of the tensor's numbers (of its bytes, if a codebook is too large), summed
            over all; a form that codes zeros and numbers separately can be slightly smaller.
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
    """The storage of a tensor, and its theoretical minimum size.

    Args:
        stream: a stream, as for :func:`decode`.
        name: name of the tensor in messages.

    Raises:
        CheckpointError: If :func:`decode` refuses it.
    """
    data = as_bytes(stream)
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
        huffman_bits=sum(huffman.encoded_bits(symbol_counts(part)) for part in parts),
        shannon_bits=shannon_bits(tensor),
    )


def shannon_bits(tensor: Tensor) -> float:
    """Zero-order entropy of a tensor's numbers, summed over all: no code of single numbers takes fewer bits.

    Args:
        tensor: any shape. If its numbers are nearly all different, so that a table of them would be as long as the
            tensor, the entropy is that of their bytes, position by position.

    Returns:
        Bits.

    Example:
        >>> shannon_bits(Tensor([1.0, 2.0, 1.0, 2.0]))
        4.0
    """
    found = patterns(tensor)
    values = distinct(found)
    if values is not None and 2 * len(values) <= len(found):
        return entropy_bits(np.unique(found, return_counts=True)[1])
    return sum(entropy_bits(symbol_counts(part)) for part in split(found, "planes"))


def describe_file(path: str | Path) -> dict[str, StreamInfo]:
    """:func:`describe` of every tensor in a file of streams.

    Args:
        path: from :func:`save_file`.

    Raises:
        CheckpointError: If :func:`load_file` refuses it.
    """
    return {name: describe(stream, name) for name, stream in file_streams(path).items()}
