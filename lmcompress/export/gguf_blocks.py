r"""The blocks of GGUF for packed matrices: 32 neighbours of a row with a scale of half precision.

===== ========================================== =====================================
block bytes                                      a weight
===== ========================================== =====================================
Q8_0  scale d (float16), 32 codes q (int8)       :math:`d q`
Q4_0  scale d, 16 bytes with codes q of 0 … 15   :math:`d (q - 8)`
Q4_1  scale d, minimum m (float16), 16 bytes     :math:`d q + m`
===== ========================================== =====================================

In the last two, byte j holds code j in its lower and code j + 16 in its upper half. The codes of a packed matrix are
kept as they are; its scales, float32 in memory, are rounded to half precision, by at most 2⁻¹¹ of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError
from lmcompress.export.pack_quantized import signed_codes
from lmcompress.nn.packed import Packed

BLOCK = 32
"""Weights of a block."""

Kind = Literal["Q8_0", "Q4_0", "Q4_1"]


@dataclass(frozen=True)
class Blocks:
    """One matrix in blocks.

    Attributes:
        kind: name of the block format.
        data: ``(out, bytes of a row)`` uint8.
        values: ``(out, in)`` float32, the weights that the blocks stand for.
        exact: whether these are the very weights of the packed matrix: no scale was rounded.
    """

    kind: Kind
    data: Tensor
    values: Tensor
    exact: bool


def blocks_of(path: str, module: Packed) -> Blocks:
    """A packed matrix in blocks, with its own codes.

    Args:
        path: the module's, for messages.
        module: a packed module.

    Raises:
        LmcompressError: If no block format can hold the codes: rows or groups that are no multiple of 32, 8 bits with
            zero points, or scales beyond half precision.
    """
    bits, codes, zero_points = signed_codes(module)
    rows, columns = codes.shape
    scales = module.weight_scales.detach().float().expand(rows, -1)
    size = columns // scales.shape[1]
    if columns % BLOCK or size % BLOCK:
        raise LmcompressError(
            f"GGUF has a scale for {BLOCK} neighbours, and {path} has one for {size} of a row of {columns}: quantize "
            "by row or in groups of a multiple of 32, or export it anew with weights='q8_0'"
        )
    if bits == 8 and zero_points is not None:
        raise LmcompressError(
            f"GGUF has no 8-bit block with zero points, which {path} has: quantize it without them, or export it anew "
            "with weights='q8_0'"
        )
    each = size // BLOCK
    d = _half(path, scales).repeat_interleave(each, dim=1)
    q = codes.view(rows, -1, BLOCK)
    if bits == 8:
        return _made(module, "Q8_0", [_bytes(d), q.view(torch.uint8)], q * d.float()[..., None])
    index = q.short() + 8
    nibbles = (index[..., : BLOCK // 2] | index[..., BLOCK // 2 :] << 4).to(torch.uint8)
    if zero_points is None:
        return _made(module, "Q4_0", [_bytes(d), nibbles], q * d.float()[..., None])
    low = _half(path, -scales * (zero_points.expand(rows, -1).float() + 8)).repeat_interleave(each, dim=1)
    values = index.float() * d.float()[..., None] + low.float()[..., None]
    return _made(module, "Q4_1", [_bytes(d), _bytes(low), nibbles], values)


def _half(path: str, numbers: Tensor) -> Tensor:
    rounded = numbers.half()
    if not bool(rounded.isfinite().all()) or bool(((rounded == 0) & (numbers != 0)).any()):
        raise LmcompressError(
            f"GGUF has scales of half precision, and some of {path} are beyond it, up to "
            f"{float(numbers.abs().max()):.3g}: export the dense weights with weights='f32'"
        )
    return rounded


def _bytes(numbers: Tensor) -> Tensor:
    """``(rows, blocks)`` float16 as ``(rows, blocks, 2)`` bytes."""
    return numbers.contiguous().view(torch.uint8).view(*numbers.shape, 2)


def _made(module: Packed, kind: Kind, parts: list[Tensor], values: Tensor) -> Blocks:
    data, flat = torch.cat(parts, dim=-1).flatten(1), values.flatten(1)
    return Blocks(kind, data.cpu().contiguous(), flat.cpu(), exact=torch.equal(flat, module.dequantized().float()))
