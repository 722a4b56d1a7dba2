"""Helpers of the tests of packed models: quantizing every matrix of a tiny model, and its dense double."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lmcompress.checkpoint.encoding import Packable, matrices, pack_model, tied_head
from lmcompress.checkpoint.schema import ActivationEncoding, AttentionEncoding
from lmcompress.families import anatomy_of, weight_view
from lmcompress.nn.quantized_attention import quantize_attention
from lmcompress.numerics.grids import PerRow, PerTensor
from lmcompress.numerics.inputs import static_range
from lmcompress.numerics.quantizers.registry import quantizer_for

INPUTS = {
    "none": None,
    "dynamic": ActivationEncoding(bits=8),
    "token": ActivationEncoding(bits=8, granularity="token"),
    "asymmetric": ActivationEncoding(bits=8, symmetric=False, clip=2.5),
    "static": ActivationEncoding(bits=8, range="static"),
    "static asymmetric": ActivationEncoding(bits=4, symmetric=False, range="static"),
}


def projections(model: PreTrainedModel) -> list[str]:
    """Paths of the projections of the blocks."""
    blocks = anatomy_of(model).family.blocks + "."
    return [
        path
        for path, module in matrices(model).items()
        if path.startswith(blocks) and not isinstance(module, nn.Embedding)
    ]


def quantized(weight: torch.Tensor, quantizer: str, bits: Any, granularity: Any) -> Any:
    """A weight as ``(out, in)`` through a quantizer in its first state."""
    chosen = quantizer_for(quantizer, bits)
    state = [] if chosen.initial is None else [chosen.initial(weight, bits=bits, granularity=granularity)]
    return chosen.function(weight.detach(), *state, bits=bits, granularity=granularity)


def parts_of(
    model: PreTrainedModel,
    quantizer: str = "minmax",
    bits: Any = 8,
    *,
    granularity: Any = PerTensor(),  # noqa: B008
    inputs: str = "none",
    embeddings: bool = True,
    more: tuple[str, ...] = (),
) -> dict[str, Packable]:
    """Every projection, and the word embeddings by row, as :func:`pack_model` takes them."""
    known, encoding = matrices(model), INPUTS[inputs]
    given = None if encoding is None or encoding.range == "dynamic" else static_range(-3.0, 4.0, encoding)
    parts = {
        path: Packable(quantized(weight_view(known[path]), quantizer, bits, granularity), encoding, given)
        for path in (*projections(model), *more)
    }
    if embeddings:
        words = anatomy_of(model).family.word_embeddings
        head = None if tied_head(model) is None else encoding
        parts[words] = Packable(
            quantized(known[words].weight, quantizer, bits, PerRow()), head, None if head is None else given
        )
    return parts


def packed_with_attention(model: PreTrainedModel, encoding: ActivationEncoding) -> PreTrainedModel:
    """The model with everything packed, whose attention quantizes all four by one description; in place."""
    attention = AttentionEncoding(queries=encoding, keys=encoding, values=encoding, probabilities=encoding)
    pack_model(model, parts_of(model), attention)
    blocks = [block.get("attention") for block in anatomy_of(model).blocks if block.num_heads]
    quantize_attention(model, blocks, attention)
    for name, tensor in model.named_buffers():
        if name.endswith(("queries_scale", "keys_scale", "values_scale", "probabilities_scale")):
            tensor.fill_(0.25)
    return model


def packed(model: PreTrainedModel, *args: Any, **kwargs: Any) -> PreTrainedModel:
    """The model with everything packed; in place."""
    pack_model(model, parts_of(model, *args, **kwargs))
    return model
