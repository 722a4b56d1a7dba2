"""How a tensor becomes arrays of symbols, to the bit: what is coded is its bit patterns, so NaN and -0.0 come back.

============ ====================================================== ===============================================
form         arrays of symbols                                      for
============ ====================================================== ===============================================
``plain``    the bytes as they lie                                  packed codes, which are bytes
``planes``   one array for each byte of a number                    floats, whose exponents are alike
``codebook`` the distinct patterns, and an index for each number    shared weights, quantized and dequantized ones
``mask_…``   which numbers are not 0, as bits; the numbers          pruned weights
``gaps_…``   how many zeros lie before each number; the numbers     weights that are pruned to the bone
============ ====================================================== ===============================================

``…`` is ``planes`` or ``codebook``. Gaps are Deep Compression's relative indices (section 2, figure 2); where one is
longer than a symbol can say, the paper stores a zero weight, and we a symbol that says "so many more", which needs no
weight.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmcompress.errors import CheckpointError, LmcompressError

Form = Literal["plain", "planes", "codebook", "mask_planes", "mask_codebook", "gaps_planes", "gaps_codebook"]
FORMS: tuple[Form, ...] = get_args(Form)
DTYPES: tuple[torch.dtype, ...] = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.bool,
)  # fmt: skip
MAX_CODEBOOK = 1 << 16
# a gap that is longer: this symbol, again and again
LONG_GAP = 255
# numbers of which the distinct ones are counted first: whoever has many among these has too many
_SAMPLE = 1 << 17
_PATTERN = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

Symbols = NDArray[np.unsignedinteger]


class Part(NamedTuple):
    """An array of symbols.

    Attributes:
        symbols: ``(n,)`` unsigned.
        width: bits of a symbol in a fixed-width code: 1, 2, 4, 8 or 16.
    """

    symbols: Symbols
    width: int


def patterns(tensor: Tensor) -> Symbols:
    """The bit patterns of a tensor's numbers.

    Args:
        tensor: any shape, of one of :data:`DTYPES`.

    Returns:
        ``(numel,)`` unsigned integers of the same width, row by row.

    Raises:
        LmcompressError: a type that is not among them.
    """
    if tensor.dtype not in DTYPES:
        raise LmcompressError(f"a tensor must be of one of {', '.join(map(str, DTYPES))}, got {tensor.dtype}")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().view(_PATTERN[tensor.element_size()])


def tensor_of(found: Symbols, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor of such bit patterns.

    Args:
        found: ``(numel,)`` unsigned integers of the width of ``dtype``.
        dtype: of the tensor.
        shape: of the tensor.

    Returns:
        The tensor, on the CPU, with memory of its own.

    Raises:
        CheckpointError: booleans that are neither 0 nor 1.
    """
    if dtype is torch.bool and len(found) and int(found.max()) > 1:
        raise CheckpointError(f"booleans must be 0 or 1, got {int(found.max())}: the data was changed")
    tensor = torch.empty(shape, dtype=dtype)
    if len(found):
        tensor.reshape(-1).view(torch.uint8).numpy()[:] = found.view(np.uint8)
    return tensor


def distinct(found: Symbols) -> Symbols | None:
    """The distinct patterns in ascending order, or None where there are too many for a codebook.

    Args:
        found: :func:`patterns`.
    """
    if len(found) > 2 * _SAMPLE and len(np.unique(found[:: len(found) // _SAMPLE])) > MAX_CODEBOOK // 2:
        return None
    values: Symbols = np.unique(found)
    return values if len(values) <= MAX_CODEBOOK else None


def forms_for(found: Symbols) -> list[Form]:
    """What may be smaller than all bytes as they lie.

    Args:
        found: :func:`patterns`.

    Returns:
        Forms to try; ``plain`` is always the first.
    """
    forms: list[Form] = ["plain"]
    if not len(found):
        return forms
    if found.itemsize > 1:
        forms.append("planes")
        # a table that is nearly as long as what it describes describes nothing
        values = distinct(found)
        numbers = np.count_nonzero(found)
        if values is not None and 2 * len(values) <= len(found):
            forms.append("codebook")
        if (len(found) - numbers) * 8 >= len(found):
            few = values is not None and 2 * len(values) <= numbers
            forms += ["mask_codebook", "gaps_codebook"] if few else ["mask_planes", "gaps_planes"]
    return forms


def split(found: Symbols, form: Form) -> list[Part]:
    """A tensor's patterns as arrays of symbols.

    Args:
        found: :func:`patterns`.
        form: one of :func:`forms_for`.

    Returns:
        The arrays, in the order that :func:`join` expects.

    Example:
        >>> [part.symbols.tolist() for part in split(np.array([0, 7, 0, 0, 9, 7], np.uint16), "gaps_codebook")]
        [[1, 2, 0], [7, 9], [0, 0], [0, 1, 0]]
    """
    where, _, what = form.rpartition("_")
    if where:
        keep = found != 0
        return [_positions(keep, where), *_numbers(found[keep], what)]
    return _numbers(found, what)


def join(parts: list[Part], form: Form, dtype: torch.dtype, count: int) -> Symbols:
    """The patterns again.

    Args:
        parts: from :func:`split`.
        form: the same.
        dtype: of the tensor.
        count: how many numbers it has.

    Returns:
        ``(count,)`` unsigned integers.

    Raises:
        CheckpointError: the arrays do not fit one another, or ``count``.
    """
    size = dtype.itemsize
    where, _, what = form.rpartition("_")
    if not where:
        return _joined(parts, what, size, count)
    if not parts:
        raise CheckpointError("a sparse tensor must say where its numbers are, and does not: the data was changed")
    at = _at(parts[0], where, count)
    found = np.zeros(count, _PATTERN[size])
    found[at] = _joined(parts[1:], what, size, len(at))
    return found


def index_width(values: int) -> int:
    """Bits of an index in a codebook, of the widths that fill bytes.

    Args:
        values: how many the codebook has.

    Returns:
        1, 2, 4, 8 or 16.

    Example:
        >>> [index_width(n) for n in (1, 2, 3, 16, 17, 256, 257)]
        [1, 1, 2, 4, 8, 8, 16]
    """
    return next(width for width in (1, 2, 4, 8, 16) if values <= 1 << width)


def packed(part: Part) -> bytes:
    """The symbols in a fixed-width code, those below 8 bits several to a byte, the first in the low bits.

    Args:
        part: an array of symbols.
    """
    symbols, width = part
    if width == 16:
        return symbols.astype("<u2").tobytes()
    if width < 8:
        many = 8 // width
        padded = np.zeros(-(-len(symbols) // many) * many, np.uint8)
        padded[: len(symbols)] = symbols
        lanes = padded.reshape(-1, many)
        symbols = np.zeros(len(lanes), np.uint8)
        for lane in range(many):
            symbols |= lanes[:, lane] << np.uint8(width * lane)
    return symbols.astype(np.uint8).tobytes()


def packed_size(count: int, width: int) -> int:
    """Bytes that so many symbols take in a fixed-width code.

    Args:
        count: of symbols.
        width: bits of a symbol.
    """
    return math.ceil(count * width / 8)


def unpacked(data: bytes | memoryview, count: int, width: int) -> Symbols:
    """The symbols again.

    Args:
        data: :func:`packed_size` bytes.
        count: how many symbols.
        width: bits of each.

    Returns:
        ``(count,)`` uint8, or uint16 where they have 16 bits.

    Raises:
        CheckpointError: data of another length.
    """
    if len(data) != packed_size(count, width):
        raise CheckpointError(
            f"{count} symbols of {width} bits must lie in {packed_size(count, width)} bytes, got {len(data)}: the data "
            "is cut off or was changed"
        )
    if width == 16:
        return np.frombuffer(data, "<u2").astype(np.uint16)
    symbols = np.frombuffer(data, np.uint8)
    if width == 8:
        return symbols
    many, mask = 8 // width, np.uint8((1 << width) - 1)
    lanes = np.empty((len(symbols), many), np.uint8)
    for lane in range(many):
        lanes[:, lane] = (symbols >> np.uint8(width * lane)) & mask
    return lanes.reshape(-1)[:count]


def _numbers(found: Symbols, what: str) -> list[Part]:
    if what == "codebook":
        values, index = np.unique(found, return_inverse=True)
        return [*_byte_planes(values), Part(index.astype(np.uint16), index_width(len(values)))]
    return _byte_planes(found) if what == "planes" else [Part(found.view(np.uint8), 8)]


def _byte_planes(found: Symbols) -> list[Part]:
    """One array for each byte of a number, the lowest first."""
    return [Part(plane, 8) for plane in found.view(np.uint8).reshape(len(found), found.itemsize).T]


def _joined(parts: list[Part], what: str, size: int, count: int) -> Symbols:
    expected = {"plain": 1, "planes": size, "codebook": size + 1}[what]
    if len(parts) != expected:
        raise CheckpointError(f"there must be {expected} arrays of symbols, got {len(parts)}: the data was changed")
    if what == "plain":
        return _of_length(parts[0].symbols, size * count).astype(np.uint8, copy=False).view(_PATTERN[size])
    planes = [part.symbols for part in parts[:size]]
    lengths = {len(plane) for plane in planes}
    if len(lengths) != 1:
        raise CheckpointError("the bytes of numbers must be as many for each of their places: the data was changed")
    values = np.stack(planes, 1).astype(np.uint8).reshape(-1).view(_PATTERN[size])
    if what == "planes":
        return _of_length(values, count)
    index = _of_length(parts[-1].symbols, count)
    if count and int(index.max()) >= len(values):
        raise CheckpointError(
            f"an index must be below {len(values)}, the length of its codebook, got {int(index.max())}: the data was "
            "changed"
        )
    return values[index]


def _of_length(symbols: Symbols, count: int) -> Symbols:
    if len(symbols) != count:
        raise CheckpointError(f"there must be {count} symbols, got {len(symbols)}: the data was changed")
    return symbols


def _positions(keep: NDArray[np.bool_], where: str) -> Part:
    if where == "mask":
        return Part(keep.view(np.uint8), 1)
    gaps = np.diff(np.flatnonzero(keep), prepend=-1) - 1
    long, short = np.divmod(gaps, LONG_GAP)
    symbols = np.full(int(long.sum()) + len(gaps), LONG_GAP, np.uint8)
    symbols[np.cumsum(long + 1) - 1] = short
    return Part(symbols, 8)


def _at(part: Part, where: str, count: int) -> NDArray[np.int64]:
    """Where the numbers of a sparse tensor are."""
    if where == "mask":
        return np.flatnonzero(_of_length(part.symbols, count))
    # a long gap is of numbers that are all 0, any other symbol ends with one that is not
    ends = part.symbols != LONG_GAP
    at = (np.cumsum(part.symbols.astype(np.int64) + ends) - 1)[ends]
    if len(at) and int(at[-1]) >= count:
        raise CheckpointError(f"gaps must stay within {count} numbers, got {int(at[-1]) + 1}: the data was changed")
    return at
