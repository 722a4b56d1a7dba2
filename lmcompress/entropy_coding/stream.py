"""A tensor as a self-describing stream of bytes (see :mod:`lmcompress.entropy_coding.header`); files of them."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file as save_safetensors
from torch import Tensor

from lmcompress.entropy_coding.coders import CODERS, Coder, choose_code, decode_symbols
from lmcompress.entropy_coding.forms import check_sizes, forms_for, join, patterns, split
from lmcompress.entropy_coding.header import MAX_AXES, PART_BYTES, read_head, with_head
from lmcompress.entropy_coding.symbols import Part
from lmcompress.errors import CheckpointError, LmcompressError

MAX_BYTES, MIN_BYTES, MAX_RATIO = 1 << 36, 1 << 30, 4096
"""Limits for a tensor of unknown shape: never more bytes than the first; more than the second only up to
this ratio to the bytes of its stream."""


def encode(tensor: Tensor, coder: Coder = "auto") -> bytes:
    """The tensor as a stream, in the smallest suitable form.

    Args:
        tensor: any shape, on any device; with a dtype in :data:`~lmcompress.entropy_coding.forms.DTYPES`.
        coder: one of :data:`CODERS`.

    Returns:
        The stream; at most a header longer than the bytes of the tensor.

    Raises:
        LmcompressError: If the coder is unknown, or the type or number of axes is not supported.

    Example:
        >>> weight = torch.zeros(100, 100)
        >>> weight[0, :3] = torch.tensor([1.0, -1.0, 1.0])
        >>> len(encode(weight)), bool((decode(encode(weight)) == weight).all())
        (78, True)
    """
    if coder not in CODERS:
        raise LmcompressError(f"coder must be one of {', '.join(CODERS)}, got {coder!r}")
    if tensor.dim() > MAX_AXES:
        raise LmcompressError(f"a tensor must have at most {MAX_AXES} axes to be a stream, got {tensor.dim()}")
    found = patterns(tensor)
    # a generator: memory holds the best form so far and one more
    options = ((form, [choose_code(part, coder) for part in split(found, form)]) for form in forms_for(found))
    form, choices = min(options, key=lambda option: sum(PART_BYTES + one.cost for one in option[1]))
    return with_head(form, tensor.dtype, tensor.shape, [one.coded() for one in choices])


def decode(
    stream: bytes | memoryview | Tensor,
    name: str = "of a stream",
    *,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The decoded tensor, bit-exact.

    Args:
        stream: from :func:`encode`; as a tensor, ``(n,)`` uint8.
        name: name of the tensor in messages.
        shape: its expected shape, if known: nothing larger is allocated. If None, at most
            :data:`MIN_BYTES`, or than :data:`MAX_RATIO` times the stream.
        dtype: its expected dtype, if known.

    Returns:
        The tensor, on the CPU.

    Raises:
        CheckpointError: If the stream is cut off, changed, of a later version, or of another tensor.
    """
    data = as_bytes(stream)
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
        # one array at a time: each is as long as the tensor, in a small integer type
        parts = (
            Part(decode_symbols(one.method, data[one.start : one.end], one.symbols, one.width), one.width)
            for one in head.parts
        )
        join(parts, head.form, patterns(tensor))
        if head.dtype is torch.bool and count and int(tensor.view(torch.uint8).max()) > 1:
            raise CheckpointError("booleans must be 0 or 1, got others: it was changed")
        return tensor


def stream_shape(stream: bytes | memoryview | Tensor, name: str = "of a stream") -> tuple[int, ...]:
    """The shape of the tensor in a stream, without decoding it.

    Args:
        stream: a stream, as for :func:`decode`.
        name: name of the tensor in messages.

    Raises:
        CheckpointError: If it is not a stream, or its checksum is wrong.
    """
    with _named(name):
        return read_head(as_bytes(stream)).shape


def stream_tensor(tensor: Tensor, coder: Coder = "auto") -> Tensor:
    """A tensor's stream as a tensor, ``(n,)`` uint8.

    Args:
        tensor: a tensor, as for :func:`encode`.
        coder: one of :data:`CODERS`.
    """
    return torch.frombuffer(bytearray(encode(tensor, coder)), dtype=torch.uint8)


def save_file(tensors: Mapping[str, Tensor], path: str | Path, coder: Coder = "auto") -> int:
    """Write tensors as a safetensors file of streams; an existing file is replaced once the new one is complete.

    Args:
        tensors: by name, from any network.
        path: path of the file.
        coder: one of :data:`CODERS`.

    Returns:
        Size of the file in bytes.

    Raises:
        LmcompressError: If :func:`encode` refuses a tensor, or the file cannot be written (full disk, no such folder).
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
        CheckpointError: If it is not a safetensors file, or :func:`decode` refuses a stream.
    """
    return {name: decode(stream, name) for name, stream in file_streams(path).items()}


def file_streams(path: str | Path) -> dict[str, Tensor]:
    """The streams in a file, ``(n,)`` uint8 by name, not decoded.

    Args:
        path: from :func:`save_file`.

    Raises:
        CheckpointError: If it is not a safetensors file, is cut off, or holds something other than streams.
    """
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


def as_bytes(stream: bytes | memoryview | Tensor) -> memoryview:
    """The bytes of a stream.

    Args:
        stream: a stream, as for :func:`decode`.
    """
    if isinstance(stream, Tensor):
        return memoryview(stream.detach().cpu().contiguous().numpy().data).cast("B")
    return memoryview(stream)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Within the block, add the tensor's name to errors of a stream."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"tensor {name} cannot be decoded: {error}; fetch or copy the file again") from error
