r"""Matmuls with weights of 1 to 8 bits and inputs in bfloat16, on a GPU: torch's ``_weight_int4pack_mm`` (tinygemm).

torchao multiplies 4-bit weights on CUDA with the same operation. It multiplies tensor-core tiles of

.. math:: (q - 8) \cdot scale + zero, \quad q \in \{0, \ldots, 15\}

with scale and zero in bfloat16, one of each for 32, 64, 128 or 256 neighbours of a row, and accumulates in float32.
:func:`nibbles` expresses any matrix of codes in that form:

- codes of at most 4 bits become one such matrix, longer ones become two, one below the other, whose results are added:
  :math:`c = (16 u + 8) + (c - 16 u - 8)` with :math:`u = \lfloor c / 16 \rfloor`;
- scales of rows (and the tensor's) stay in float32 and multiply the result, so that the operation only sees integers
  up to 256, which bfloat16 represents exactly. Scales of groups are rounded to bfloat16, as the reference rounds
  weights, and repeated if a group is longer than those of the operation;
- a row length that the operation's tiles do not divide is padded; the input is padded with zeros to match.

torch's ``_weight_int8pack_mm`` is not used: on CUDA it multiplies in float32 without tensor cores. Nor is gemlite: its
kernels read scales beyond their end in blocks that are partly masked (0 times arbitrary memory may be NaN), and each
new shape is tuned for seconds to minutes on first use (dropbox/gemlite#15).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from lmcompress.kernels.base import unavailable
from lmcompress.kernels.matrix import Inputs, Matrix, Prepacked
from lmcompress.numerics import packing
from lmcompress.numerics.grids import Granularity, Grid, PerGroup, PerRow, PerTensor

_GROUPS = (256, 128, 64, 32)
# tiles of a row that are stored together, each of 16: the widest loads
_INNER_TILES = 8
_COLUMNS = 16 * _INNER_TILES
# 8 are enough except on AMD's
_ROWS = 16
# blocks of 8 rows are an axis of a grid, and offsets are int32
_MOST_ROWS, _MOST_CODES = 8 * 65535, 2**31
# times planes; in torchao's own table (A6000, torchao/prototype/hqq) dequantizing in every call overtakes it
# between 128 and 256 tokens
_FEW_TOKENS = 256
_OLDEST = (8, 0)
_TOLERANCE = 2.0**-7


@dataclass(frozen=True, eq=False)
class Nibbles:
    """A matrix in the operation's form.

    Attributes:
        codes: ``(planes * rows, columns)`` uint8, 0 to 15.
        scales_and_zeros: ``(columns / group, planes * rows, 2)``.
        group: number of neighbours that share a scale.
        planes: number of matrices stored one below the other, whose results are added.
        rows: rows of each plane, padding included.
        row_scales: ``(out,)`` float32, factor of the result; ``None`` if scales are included above.
    """

    codes: Tensor
    scales_and_zeros: Tensor
    group: int
    planes: int
    rows: int
    row_scales: Tensor | None


def nibbles(matrix: Matrix, dtype: torch.dtype = torch.bfloat16) -> Nibbles:
    """A matrix in codes of 4 bits, padded to the operation's tiles.

    Args:
        matrix: any matrix that :meth:`Tinygemm.refusal` does not refuse.
        dtype: dtype of scales and zeros.

    Returns:
        The matrix, on the same device.

    Raises:
        CheckpointError: If bytes do not fit the matrix's shape and grid.

    Example:
        >>> codes = Matrix(torch.tensor([237, 81]).byte(), torch.ones(2, 1), None, (2, 5), Grid(-1, 3), "base3")
        >>> said = nibbles(codes)
        >>> said.codes.shape, said.codes[0, :5].int() - 8
        (torch.Size([16, 128]), tensor([-1,  0,  1,  1,  1], dtype=torch.int32))
    """
    out, width = matrix.shape
    group = _group(width, matrix.granularity)
    rows, columns = out + -out % _ROWS, width + -width % math.lcm(_COLUMNS, group)
    parts, zeros = _parts(matrix)
    device = matrix.packed.device
    if isinstance(matrix.granularity, PerGroup):
        times = matrix.granularity.size // group
        row_scales, scales = None, matrix.scales.to(dtype).float().repeat_interleave(times, dim=1)
        shift = torch.zeros_like(scales) if zeros is None else zeros.float().repeat_interleave(times, dim=1)
    else:
        row_scales = matrix.scales.float().reshape(-1).expand(out).contiguous()
        scales = torch.ones(out, columns // group, device=device)
        shift = (
            torch.zeros_like(scales) if zeros is None else zeros.float().reshape(-1, 1).expand(out, 1).expand_as(scales)
        )
    filled, pairs = [], []
    for codes, factor, base in parts:
        pair = torch.stack([factor * scales, (base - shift) * scales], dim=-1)
        pairs.append(pad(pair, (0, 0, 0, columns // group - pair.shape[1], 0, rows - out)))
        filled.append(pad((codes + 8).to(torch.uint8), (0, columns - width, 0, rows - out), value=8))
        # the first plane has them
        shift = torch.zeros_like(scales)
    scales_and_zeros = torch.cat(pairs).transpose(0, 1).to(dtype).contiguous()
    return Nibbles(torch.cat(filled), scales_and_zeros, group, len(parts), rows, row_scales)


@dataclass(frozen=True)
class Tinygemm:
    """torch's matmul of bfloat16 with codes of 4 bits, on CUDA.

    Attributes:
        name: its name.
    """

    name: str = "tinygemm"

    def refusal(self, matrix: Matrix, inputs: Inputs | None, dtype: torch.dtype, few: bool = False) -> str | None:
        """Why this kernel does not accept a matrix, or an input of this dtype; ``None`` if it does."""
        if inputs is not None:
            return "inputs are quantized, and it multiplies floats"
        if dtype != torch.bfloat16:
            return f"inputs are {dtype}, and it multiplies torch.bfloat16"
        planes = _planes(matrix)
        if isinstance(matrix.granularity, PerGroup):
            if matrix.granularity.size % _GROUPS[-1]:
                return f"scales belong to groups of {matrix.granularity.size}, no multiple of {_GROUPS[-1]}"
            if planes > 1 and matrix.zero_points is not None:
                return "scales and zero points of groups, for codes of more than 4 bits, are too coarse in bfloat16"
        # with more rows than padding can ever add
        rows, columns = planes * (matrix.shape[0] + _ROWS), matrix.shape[1] + 2 * _COLUMNS
        if rows > _MOST_ROWS or rows * columns > _MOST_CODES:
            return f"a matrix of {matrix.shape} is too large for it"
        return None

    def prepack(self, matrix: Matrix, bias: Tensor | None, inputs: Inputs | None, dtype: torch.dtype) -> Prepacked:
        """The codes in the operation's layout: half a byte for each weight of up to 4 bits, otherwise a byte."""
        said, (out, width) = nibbles(matrix), matrix.shape
        packed, scales = _pack(said.codes), said.row_scales
        columns, trusted = said.codes.shape[1], replace(matrix, trusted=True)
        own_bias = None if bias is None else bias.detach().float()

        def multiply(x: Tensor) -> Tensor:
            flat = x.reshape(-1, width)
            if flat.shape[0] * said.planes > _FEW_TOKENS:
                # every 16 tokens read all codes again
                return linear(x, trusted.values().to(x.dtype), None if bias is None else bias.to(x.dtype))
            flat = _laid_out(pad(flat, (0, columns - width)) if columns > width else flat)
            y = _multiply(flat, packed, said.group, said.scales_and_zeros)
            y = y[:, :out] if said.planes == 1 else y[:, :out].float() + y[:, said.rows : said.rows + out]
            y = y if scales is None else y * scales
            y = y if own_bias is None else y + own_bias
            return y.reshape(*x.shape[:-1], out)

        return multiply

    def trouble(self, device: torch.device) -> str | None:
        """The reason why it does not work on a device: unsupported, failing, or wrong results.

        Args:
            device: the device.

        Returns:
            ``None`` if it works.
        """
        try:
            reason = _unfit(device)
            if reason is None:
                with torch.inference_mode():
                    right = all(self._right(matrix) for matrix in _specimens(device))
                reason = None if right else "its results are wrong on this device"
        # whatever the error, there is the reference
        except Exception as error:
            reason = unavailable(error)
        return reason

    def _right(self, matrix: Matrix) -> bool:
        """Whether every weight ends up in its place, from one token to more than a tile has."""
        device, (out, width) = matrix.packed.device, matrix.shape
        bias = torch.arange(out, device=device) % 4.0
        multiply, values = self.prepack(matrix, bias, None, torch.bfloat16), matrix.values().double().cpu()
        largest = values.abs().amax(dim=1) + bias.cpu().double()
        several = torch.arange(5 * width).reshape(5, width) % 5 - 2.0
        for x in (several[:1], several, *torch.eye(width).split(64)):
            given = multiply(x.to(device, torch.bfloat16)).cpu().double()
            x = x.double()
            allowed = _TOLERANCE * largest * x.abs().sum(dim=1, keepdim=True)
            # not "> allowed": NaN is wrong too
            if not bool(((given - (x @ values.t() + bias.cpu().double())).abs() <= allowed).all()):
                return False
        return True


def _unfit(device: torch.device) -> str | None:
    """Known reasons, without a test: on older devices the attempt would end the process's use of the device."""
    if device.type != "cuda":
        return "for CUDA devices"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return f"for compute capability {_OLDEST} and later, this device has {capability}"
    return None


def _pack(codes: Tensor) -> Tensor:
    """The operation's layout of ``(rows, columns)`` uint8 codes."""
    return torch._convert_weight_to_int4pack((codes[:, ::2] << 4) | codes[:, 1::2], _INNER_TILES)


def _multiply(x: Tensor, packed: Tensor, group: int, scales_and_zeros: Tensor) -> Tensor:
    return torch._weight_int4pack_mm(x, packed, group, scales_and_zeros)


def _laid_out(x: Tensor) -> Tensor:
    """Contiguous, from an aligned address."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _group(width: int, granularity: Granularity) -> int:
    """The operation's group size; each group of the matrix is one of these or several."""
    if isinstance(granularity, PerGroup):
        return next(group for group in _GROUPS if granularity.size % group == 0)
    # if all scales are equal, the smallest size for which the row is not padded further
    return next(group for group in _GROUPS[:2] if (width + -width % _COLUMNS) % group == 0)


def _planes(matrix: Matrix) -> int:
    return 1 if matrix.grid.high - matrix.grid.low <= 15 else 2


def _parts(matrix: Matrix) -> tuple[list[tuple[Tensor, int, int]], Tensor | None]:
    """Codes ``(out, in)`` from -8 to 7, factor and base, whose sum is the codes; and remaining zero points."""
    codes, zeros = matrix.codes().to(torch.int16), matrix.zero_points
    low, high = matrix.grid.low, matrix.grid.high
    if zeros is not None and high - low <= 7:
        # zero points are codes, so that differences fit 4 bits, and 0 stays 0 however the scale is rounded
        spread = matrix.granularity.spread(zeros.to(torch.int16), codes.shape)
        codes = (matrix.granularity.split(codes) - spread).reshape(codes.shape)
        low, high, zeros = low - high, high - low, None
    if _planes(matrix) == 1:
        base = 0 if low >= -8 and high <= 7 else low + 8
        return [(codes - base, 1, base)], zeros
    base = 128 if high > 127 else 0
    codes = codes - base
    upper = codes >> 4
    return [(upper, 16, base + 8), (codes - 16 * upper - 8, 1, 0)], zeros


def _specimens(device: torch.device) -> Iterator[Matrix]:
    """Matrices of every kind, of sizes that need padding: codes without an order that a mistake could preserve."""
    generator = torch.Generator().manual_seed(0)
    kinds: list[tuple[Grid, Granularity, bool, tuple[int, int]]] = [
        (Grid(-8, 16), PerRow(), False, (40, 96)),
        (Grid(0, 16), PerRow(), True, (20, 200)),
        (Grid(0, 16), PerGroup(32), True, (24, 160)),
        (Grid(-1, 3), PerGroup(192), False, (16, 192)),
        (Grid(-127, 255), PerTensor(), False, (24, 96)),
        (Grid(0, 256), PerRow(), True, (24, 256)),
    ]
    for grid, granularity, asymmetric, shape in kinds:
        codes = torch.randint(grid.low, grid.high + 1, shape, generator=generator)
        container = packing.container_for(grid)
        scales = granularity.scale_shape(shape)
        zeros = torch.randint(grid.high + 1, scales, generator=generator).to(torch.uint8) if asymmetric else None
        yield Matrix(
            packing.pack(codes.to(grid.dtype), grid, container).flatten().to(device),
            (torch.rand(scales, generator=generator) + 0.5).to(device),
            None if zeros is None else zeros.to(device),
            shape,
            grid,
            container,
            granularity,
        )
