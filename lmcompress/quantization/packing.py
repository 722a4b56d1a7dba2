"""Packing a model whose attention is quantized too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from lmcompress.checkpoint.encoding import pack_model
from lmcompress.checkpoint.places import Packable
from lmcompress.checkpoint.schema import ActivationEncoding, AttentionEncoding
from lmcompress.nn.packed import InputRange
from lmcompress.nn.quantized_attention import Role, attention_quantizers, quantize_attention

FixedActivation = tuple[ActivationEncoding, InputRange | None]
"""The quantization of an activation, and its range unless that is dynamic."""

AttentionRanges = Mapping[nn.Module, Mapping[Role, FixedActivation]]
"""By module of attention."""


def pack(model: PreTrainedModel, parts: Iterable[tuple[str, Packable]], attention: AttentionRanges) -> None:
    """Replace weights by codes, and quantize attention.

    Args:
        model: modified in place.
        parts: what to pack, by path.
        attention: quantization of each attention module, equal except for the ranges; empty leaves attention
            unquantized.

    Raises:
        LmcompressError: If :func:`~lmcompress.checkpoint.encoding.pack_model` refuses a part.
    """
    roles = next(iter(attention.values()), {})
    encoding = AttentionEncoding(**{role: encoding for role, (encoding, _) in roles.items()}) if roles else None
    pack_model(model, parts, encoding)
    if encoding is None:
        return
    quantize_attention(model, attention, encoding)
    for module, ranges in attention.items():
        buffers = dict(cast(nn.Module, attention_quantizers(module)).named_buffers())
        for role, (_, fixed) in ranges.items():
            for name, value in zip((f"{role}_scale", f"{role}_zero_point"), fixed or (), strict=False):
                if value is not None:
                    buffers[name].copy_(value)
