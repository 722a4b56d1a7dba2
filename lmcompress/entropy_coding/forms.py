"""Bit-exact decompositions of a tensor into arrays of symbols, which code its bit patterns (NaN and -0.0 included).

============ ====================================================== ===============================================
form         arrays of symbols                                      for
============ ====================================================== ===============================================
``plain``    the bytes as stored                                    packed codes, which are bytes
``planes``   one array for each byte of a number                    floats, whose exponents are similar
``codebook`` the distinct patterns, and an index for each number    clustered, quantized and dequantized weights
``mask_…``   a bit for each number that is not 0; the numbers       pruned weights
``gaps_…``   the zeros before each number; the numbers              very sparse weights
============ ====================================================== ===============================================

``…`` is ``planes`` or ``codebook``. Gaps are Deep Compression's relative indices (section 2, figure 2); where one is
longer than a symbol can express, the paper stores a zero weight, and we a symbol that means "255 more", which needs no
weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmcompress.entropy_coding.symbols import Part, Symbols, index_width
from lmcompress.errors import CheckpointError, LmcompressError

Form = Literal["plain", "planes", "codebook", "mask_planes", "mask_codebook", "gaps_planes", "gaps_codebook"]
FORMS: tuple[Form, ...] = get_args(Form)
DTYPES: tuple[torch.dtype, ...] = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.bool,
)  # fmt: skip
MAX_CODEBOOK = 1 << 16
# for longer gaps this symbol is repeated
LONG_GAP = 255
# size of the sample whose distinct numbers are counted first: many in it means too many overall
_SAMPLE = 1 << 17
_PATTERN = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

# numbers processed at a time: an index into an array has 8 bytes
_BLOCK = 1 << 16


def patterns(tensor: Tensor) -> Symbols:
    """The bit patterns of a tensor's numbers.

    Args:
        tensor: any shape, with a dtype in :data:`DTYPES`.

    Returns:
        ``(numel,)`` unsigned integers of the same width, row by row; shares the tensor's memory if it is contiguous and
        on the CPU.

    Raises:
        LmcompressError: If its type is not supported, it is sparse, or it is on ``meta``, without values.
    """
    if tensor.is_meta:
        raise LmcompressError("a tensor must have values to be coded, got one on the meta device")
    if tensor.dtype not in DTYPES:
        raise LmcompressError(f"a tensor must be of one of {', '.join(map(str, DTYPES))}, got {tensor.dtype}")
    if tensor.layout is not torch.strided:
        raise LmcompressError(f"a tensor must be dense (torch.strided) to be coded, got {tensor.layout}; to_dense() it")
    # tensors of at most one number are contiguous whatever their strides, which views of bytes do not accept
    flat = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().view(_PATTERN[tensor.element_size()])


def distinct(found: Symbols) -> Symbols | None:
    """The distinct patterns in ascending order, or None if there are too many for a codebook.

    Args:
        found: :func:`patterns`.
    """
    if len(found) > 2 * _SAMPLE and len(np.unique(found[:: len(found) // _SAMPLE])) > MAX_CODEBOOK // 2:
        return None
    values: Symbols = np.unique(found)
    return values if len(values) <= MAX_CODEBOOK else None


def forms_for(found: Symbols) -> list[Form]:
    """The forms that may be smaller than the plain bytes.

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
        # a table nearly as long as the data saves nothing
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


def check_sizes(form: Form, sizes: Sequence[tuple[int, int]], size: int, count: int) -> None:
    """Refuse arrays that :func:`split` never produces, before any is decoded.

    Args:
        form: form of the arrays.
        sizes: number of symbols and width of each.
        size: bytes per number.
        count: number of elements of the tensor.

    Raises:
        CheckpointError: If there are too many or too few, or they are too long or of another width.
    """
    where, _, what = form.rpartition("_")
    places, numbers = (sizes[:1], sizes[1:]) if where else ([], sizes)
    # a sparse tensor has as many nonzero numbers as its last array has symbols
    many = count if not where else numbers[-1][0] if numbers else 0
    values = numbers[0][0] if numbers else 0
    expected = {
        "plain": [(size * count, 8)],
        "planes": [(many, 8)] * size,
        "codebook": [(values, 8)] * size + [(many, index_width(min(values, MAX_CODEBOOK)))],
    }[what]
    fits = list(numbers) == expected and (what != "codebook" or values <= min(many, MAX_CODEBOOK))
    if where == "mask":
        fits &= list(places) == [(count, 1)] and many <= count
    elif where == "gaps":
        # except those that end at a number, each gap symbol covers the maximum number of zeros
        long = sum(symbols for symbols, _ in places) - many
        fits &= [width for _, width in places] == [8] and long >= 0 and many + LONG_GAP * long <= count
    if not fits:
        raise CheckpointError(f"arrays of {list(sizes)} symbols are none of {count} numbers ({form}): it was changed")


def join(parts: Iterable[Part], form: Form, found: Symbols) -> None:
    """Reassemble the patterns, one array after the other.

    Args:
        parts: from :func:`split`, of sizes accepted by :func:`check_sizes`; each is requested when it is needed.
        form: the same.
        found: ``(count,)`` unsigned integers, the output.

    Raises:
        CheckpointError: If the arrays contradict one another.
    """
    arrays = (part.symbols for part in parts)
    where, _, what = form.rpartition("_")
    if not where:
        _fill(found, arrays, what)
        return
    places = next(arrays)
    at = (places != 0) if where == "mask" else places != LONG_GAP
    numbers = np.empty(np.count_nonzero(at), found.dtype)
    _fill(numbers, arrays, what)
    if where == "mask":
        found[:] = 0
        found[at] = numbers
    else:
        _spread(found, places, at, numbers)


def _numbers(found: Symbols, what: str) -> list[Part]:
    if what == "codebook":
        values, index = np.unique(found, return_inverse=True)
        return [*_byte_planes(values), Part(index.astype(np.uint16), index_width(len(values)))]
    return _byte_planes(found) if what == "planes" else [Part(found.view(np.uint8), 8)]


def _byte_planes(found: Symbols) -> list[Part]:
    """One array for each byte of a number, the lowest first."""
    return [Part(plane, 8) for plane in found.view(np.uint8).reshape(len(found), found.itemsize).T]


def _fill(found: Symbols, arrays: Iterator[Symbols], what: str) -> None:
    size = found.itemsize
    if what == "plain":
        found.view(np.uint8)[:] = next(arrays)
    elif what == "planes":
        _fill_planes(found, arrays)
    else:
        planes = [next(arrays) for _ in range(size)]
        values = np.empty(len(planes[0]), found.dtype)
        _fill_planes(values, iter(planes))
        index = _of_length(next(arrays), len(found))
        for start in range(0, len(found), _BLOCK):
            block = index[start : start + _BLOCK]
            if int(block.max()) >= len(values):
                raise CheckpointError(
                    f"an index must be below {len(values)}, the length of its codebook, got {int(block.max())}: the "
                    "data was changed"
                )
            found[start : start + _BLOCK] = values[block]


def _fill_planes(found: Symbols, arrays: Iterator[Symbols]) -> None:
    planes = found.view(np.uint8).reshape(len(found), found.itemsize)
    for place in range(found.itemsize):
        planes[:, place] = _of_length(next(arrays), len(found))


def _of_length(symbols: Symbols, count: int) -> Symbols:
    if len(symbols) != count:
        raise CheckpointError(f"there must be {count} symbols, got {len(symbols)}: the data was changed")
    return symbols


def _spread(found: Symbols, gaps: Symbols, ends: NDArray[np.bool_], numbers: Symbols) -> None:
    """Place numbers after gaps of zeros."""
    found[:] = 0
    at, taken = -1, 0
    for start in range(0, len(gaps), _BLOCK):
        block = ends[start : start + _BLOCK]
        # a long gap consists only of zeros, any other symbol ends with a number that is not 0
        places = at + np.cumsum(gaps[start : start + _BLOCK] + block.astype(np.int64))
        at = int(places[-1])
        if at >= len(found):
            raise CheckpointError(f"gaps must stay within {len(found)} numbers, got {at + 1}: the data was changed")
        places = places[block]
        found[places] = numbers[taken : taken + len(places)]
        taken += len(places)


def _positions(keep: NDArray[np.bool_], where: str) -> Part:
    if where == "mask":
        return Part(keep.view(np.uint8), 1)
    gaps = np.diff(np.flatnonzero(keep), prepend=-1) - 1
    long, short = np.divmod(gaps, LONG_GAP)
    symbols = np.full(int(long.sum()) + len(gaps), LONG_GAP, np.uint8)
    symbols[np.cumsum(long + 1) - 1] = short
    return Part(symbols, 8)
