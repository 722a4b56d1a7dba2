r"""The tensors of the compressed-tensors format, for packed matrices: ``pack-quantized`` and ``int-quantized``.

A module ``m`` whose weight ``(out, in)`` has ``b``-bit codes, in the names of the format (compressed-tensors 0.15 to
0.20, ``compressors/pack_quantized`` and ``compressors/naive_quantized``):

======================= ============= ==================================================================================
tensor                  dtype         meaning
======================= ============= ==================================================================================
``m.weight_packed``     int32         ``(out, ⌈in · b / 32⌉)``: code ``i`` of a row plus :math:`2^{b-1}` lies in bits
                                      :math:`(i \bmod 32/b) \cdot b` and up of word :math:`⌊i · b / 32⌋`; padded with 0
``m.weight_shape``      int64         ``(out, in)``, of ``pack-quantized`` only
``m.weight``            int8          ``(out, in)``: the codes, in place of the two above, of ``int-quantized``
``m.weight_scale``      as the model  ``(out, 1)`` by row (``channel``), ``(out, in / n)`` by group
``m.weight_zero_point`` int32 or int8 of asymmetric weights: as ``weight_scale``, packed along the *first* axis like
                                      the weight (int8 and not packed in ``int-quantized``)
``m.input_scale``       as the model  ``(1,)``, of static ranges of inputs
``m.input_zero_point``  int8          ``(1,)``, of those that are asymmetric
======================= ============= ==================================================================================

A number is ``scale * (code - zero_point)``, codes and zero points are from :math:`-2^{b-1}` to :math:`2^{b-1} - 1`:
ours that begin at 0 move down by :math:`2^{b-1}`, and their zero points with them. Only 4 and 8 bits are written,
whose layout is that of every version; narrower codes are numbers of 4 bits as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lmcompress.errors import LmcompressError
from lmcompress.nn.packed import Layout, Packed
from lmcompress.numerics.grids import PerGroup
from lmcompress.numerics.inputs import InputEncoding, input_grid


@dataclass(frozen=True)
class Entry:
    """One matrix in the format.

    Attributes:
        tensors: tensors by the name that follows the module's; all on the CPU.
        scheme: the ``config_groups`` entry without its targets, as JSON types.
        bits: width of the stored codes.
    """

    tensors: dict[str, Tensor]
    scheme: dict[str, Any]
    bits: Literal[4, 8]


def entry_of(module: Packed, *, inputs: InputEncoding | None) -> Entry:
    """A packed matrix in the format.

    Args:
        module: a packed module.
        inputs: the quantization of its input to state, one that :func:`why_not_expressible` has nothing against.
    """
    bits, codes, zero_points = signed_codes(module)
    scales = module.weight_scales.float().expand(codes.shape[0], -1).contiguous()
    # 8-bit zero points too: packed ones have not loaded since compressed-tensors 0.18 (bytes are the same)
    plain = bits == 8 and (inputs is not None or zero_points is not None)
    tensors = {"weight_scale": scales}
    if plain:
        tensors["weight"] = codes
    else:
        tensors["weight_packed"] = packed_words(codes, bits)
        tensors["weight_shape"] = torch.tensor(codes.shape)
    if zero_points is not None:
        zero_points = zero_points.expand(codes.shape[0], -1).contiguous()
        tensors["weight_zero_point"] = zero_points if plain else packed_words(zero_points.t(), bits).t().contiguous()
    weights: dict[str, Any] = _arguments(bits, symmetric=zero_points is None)
    if isinstance(module.layout.granularity, PerGroup):
        weights |= {"strategy": "group", "group_size": module.layout.granularity.size}
    else:
        weights |= {"strategy": "channel"}
    scheme: dict[str, Any] = {"weights": weights, "format": "int-quantized" if plain else "pack-quantized"}
    if inputs is not None:
        scheme["input_activations"] = _arguments(inputs.bits, symmetric=inputs.symmetric) | {
            "strategy": "token" if inputs.granularity == "token" else "tensor",
            "dynamic": inputs.range == "dynamic",
        }
        if module.input_scale is not None:
            tensors["input_scale"] = module.input_scale.float()
        if module.input_zero_point is not None:
            tensors["input_zero_point"] = (module.input_zero_point.short() - 2 ** (inputs.bits - 1)).to(torch.int8)
    return Entry({name: tensor.detach().cpu() for name, tensor in tensors.items()}, scheme, bits)


def why_not_expressible(inputs: InputEncoding, *, vectors: bool) -> str | None:
    """Why the format does not have a quantization of an input, or None if it has the very same.

    The format's symmetric codes are all ``2 ** bits``, with a dynamic scale of ``max |x| / ((2 ** bits - 1) / 2)``; its
    ranges of a whole tensor include padding.

    Args:
        inputs: quantization of an input.
        vectors: whether the input has one vector for a row of the batch, as that of a pooler has; Transformers'
            dynamic ranges by token are then ranges of the whole batch.
    """
    if inputs.range == "static":
        if inputs.symmetric and input_grid(inputs).low != -(2 ** (inputs.bits - 1)):
            return f"its symmetric codes go down to -{2 ** (inputs.bits - 1)}, ours to -{2 ** (inputs.bits - 1) - 1}"
        return None
    if inputs.symmetric:
        half = (2**inputs.bits - 1) / 2
        return f"its symmetric dynamic scale is max |x| / {half}, ours max |x| / {input_grid(inputs).high}"
    if inputs.clip is not None:
        return "it does not clip inputs of dynamic ranges"
    if inputs.granularity == "tensor":
        return "its dynamic ranges of a whole tensor include the padding, ours leave it out"
    if vectors:
        return "its dynamic ranges by token are of the whole batch where a row is one vector, as a pooler's input is"
    return None


def signed_codes(module: Packed) -> tuple[Literal[4, 8], Tensor, Tensor | None]:
    """Codes and zero points in two's complement of 4 or 8 bits.

    Args:
        module: a packed module.

    Returns:
        Bits; codes ``(out, in)`` int8; zero points int8 in the shape of the scales, or None where they are all 0.
    """
    bits, shift = _width(module.layout)
    codes = (module.matrix().codes().short() - shift).to(torch.int8)
    if module.weight_zero_points is not None:
        return bits, codes, (module.weight_zero_points.short() - shift).to(torch.int8)
    return bits, codes, torch.full_like(module.weight_scales, -shift, dtype=torch.int8) if shift else None


def _width(layout: Layout) -> tuple[Literal[4, 8], int]:
    """Bits of the stored codes, and what is taken from ours."""
    widths: tuple[Literal[4, 8], ...] = (4, 8)
    low, high = layout.grid.low, layout.grid.high
    for bits in widths:
        half = 2 ** (bits - 1)
        if not layout.zero_points and -half <= low and high < half:
            return bits, 0
        if 0 <= low and high < 2 * half:
            return bits, half
    raise LmcompressError(f"codes must fit one byte, and those with zero points be 0 or more, got {layout.grid}")


def packed_words(codes: Tensor, bits: Literal[4, 8]) -> Tensor:
    """Codes of 4 or 8 bits in words, each row padded to whole words.

    Args:
        codes: ``(rows, n)`` int8, two's complement of ``bits`` bits.
        bits: width of a code.

    Returns:
        ``(rows, ⌈n · bits / 32⌉)`` int32.

    Example:
        >>> packed_words(torch.tensor([[-8, -7, 7]]).char(), 4).tolist()
        [[3856]]
    """
    each = 32 // bits
    index = codes.to(torch.int64) + 2 ** (bits - 1)
    index = torch.nn.functional.pad(index, (0, -index.shape[1] % each)).view(len(index), -1, each)
    words = (index << (bits * torch.arange(each, device=index.device))).sum(-1)
    # the highest bit is the sign of an int32
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _arguments(bits: int, *, symmetric: bool) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
