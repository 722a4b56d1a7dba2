"""Places for codes: packed modules in place of dense ones, and dense ones in place of packed ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from lmcompress.checkpoint.schema import ActivationEncoding, GridEncoding, WeightEncoding
from lmcompress.errors import LmcompressError
from lmcompress.families import is_conv1d, weight_view
from lmcompress.families.matrices import embedding_scale
from lmcompress.nn.packed import (
    InputRange,
    Layout,
    Packed,
    PackedConv1D,
    PackedEmbedding,
    PackedLinear,
    TiedEmbedding,
    TiedHead,
)
from lmcompress.numerics.grids import PerGroup, PerRow, PerTensor
from lmcompress.numerics.inputs import InputEncoding
from lmcompress.numerics.packing import Container, container_for
from lmcompress.numerics.quantizers.base import Quantized


class Packable(NamedTuple):
    """A quantized weight and the quantization of its module's input.

    Attributes:
        quantized: the weight as ``(out, in)``; embeddings by token.
        inputs: quantization of the input; for token embeddings, of the input of the tied head.
        input_range: scale and zero point, if the range of ``inputs`` is static.
        container: storage of the codes in bytes; None is the smallest that holds them.
    """

    quantized: Quantized
    inputs: ActivationEncoding | None = None
    input_range: InputRange | None = None
    container: Container | None = None


def described(path: str, part: Packable) -> WeightEncoding:
    """The encoding of a weight that is about to be packed.

    Args:
        path: path of its module.
        part: the quantized weight and the quantization of its module's input.

    Raises:
        LmcompressError: If no encoding can express it.
    """
    quantized = part.quantized
    container = container_for(quantized.grid) if part.container is None else part.container
    layout = Layout(quantized.grid, container, quantized.granularity, quantized.zero_points is not None)
    return entry_of(layout, part.inputs, path)


def entry_of(layout: Layout, inputs: InputEncoding | None, path: str) -> WeightEncoding:
    """The encoding of one module.

    Args:
        layout: layout of its matrix in bytes.
        inputs: quantization of its input.
        path: its path.

    Raises:
        LmcompressError: If no encoding can express it.
    """
    grid, granularity = layout.grid, layout.granularity
    if not isinstance(granularity, (PerTensor, PerRow, PerGroup)):
        raise LmcompressError(f"weights must share scales by tensor, row or group, got {granularity} for {path}")
    try:
        return WeightEncoding(
            grid=GridEncoding(low=grid.low, levels=grid.levels, stride=grid.stride),
            container=layout.container,
            granularity=granularity.size
            if isinstance(granularity, PerGroup)
            else "row"
            if isinstance(granularity, PerRow)
            else "tensor",
            zero_points=layout.zero_points,
            inputs=None if inputs is None else _activation(inputs),
            modules=(path,),
        )
    except ValidationError as error:
        raise LmcompressError(f"{path} cannot be packed so: {error.errors()[0]['msg']}") from error


def _activation(inputs: InputEncoding) -> ActivationEncoding:
    names = ActivationEncoding.model_fields
    return ActivationEncoding(**{name: getattr(inputs, name) for name in names})


def place_for(old: nn.Module, entry: WeightEncoding, path: str) -> Packed:
    """An empty packed module of the shape of a dense one, with its bias.

    Args:
        old: a linear layer, ``Conv1D`` or embedding table.
        entry: the encoding.
        path: path of the module, for errors.

    Raises:
        LmcompressError: If the module cannot be packed that way.
    """
    if isinstance(old, Packed):
        raise LmcompressError(
            f"{path} must be dense to be packed, it is packed already; see lmcompress.checkpoint.encoding.unpacked"
        )
    if is_parametrized(old):
        raise LmcompressError(f"{path} must be packed without parametrizations; remove them first")
    layout = Layout(entry.grid.grid(), entry.container, entry.grouping(), entry.zero_points)
    new: Packed
    if isinstance(old, nn.Embedding):
        new = PackedEmbedding(
            old.num_embeddings,
            old.embedding_dim,
            layout,
            entry.inputs,
            old.padding_idx,
            device=old.weight.device,
            dtype=old.weight.dtype,
            scale=embedding_scale(old),
        )
        new.stock = type(old)
    else:
        weight, bias = weight_view(old), old.bias
        if bias is not None and not isinstance(bias, nn.Parameter):
            raise LmcompressError(
                f"the bias of {path} must be a parameter to be packed beside it, got {type(bias).__name__}; something "
                "else has replaced it: undo that first"
            )
        kind = PackedConv1D if is_conv1d(old) else PackedLinear
        new = kind(weight.shape[1], weight.shape[0], layout, entry.inputs, bias, device=weight.device)
    return new.train(old.training)


def reading(tied: nn.Module, embedding: PackedEmbedding) -> TiedHead | TiedEmbedding:
    """What reads the codes of embeddings in place of a module that shared their matrix.

    Args:
        tied: a head, or an embedding table.
        embedding: owner of the codes.
    """
    new: TiedHead | TiedEmbedding
    if isinstance(tied, nn.Embedding):
        new = TiedEmbedding(embedding, tied.padding_idx, embedding_scale(tied))
        new.stock = type(tied)
    else:
        new = TiedHead(embedding, tied.bias)  # type: ignore[arg-type]
    return new.train(tied.training)


def untied(tied: TiedHead | TiedEmbedding, weight: nn.Parameter) -> nn.Module:
    """The dense module in place of one that read the codes of embeddings.

    Args:
        tied: from :func:`reading`.
        weight: the dense matrix, which it shares again.
    """
    new: nn.Module
    if isinstance(tied, TiedEmbedding):
        new = _table(tied, (tied.num_embeddings, tied.embedding_dim), weight.device)
    else:
        new = nn.Linear(tied.in_features, tied.out_features, bias=False, device="meta")
        new.register_parameter("bias", tied.bias)
    new.weight = weight
    return new.train(tied.training)


def _table(packed: PackedEmbedding | TiedEmbedding, shape: tuple[int, int], device: torch.device) -> nn.Module:
    """A table of the class that it had, without values."""
    scale: dict[str, Any] = {} if packed.scale is None else {"embed_scale": packed.scale}
    with torch.device("meta"):
        new: nn.Module = packed.stock(*shape, padding_idx=packed.padding_idx, **scale)
    if isinstance(buffer := new._buffers.get("embed_scale"), torch.Tensor):
        new._buffers["embed_scale"] = torch.full_like(buffer, packed.scale or 1.0, device=device)
    return new


def dense(packed: Packed) -> nn.Module:
    """A dense module with the dequantized weight of a packed one.

    Args:
        packed: a packed layer or embedding table.

    Raises:
        LmcompressError: If it is of another kind.
    """
    weight = packed.dequantized()
    new: nn.Module
    if isinstance(packed, PackedEmbedding):
        new = _table(packed, packed.shape, weight.device)
    else:
        if not isinstance(packed, (PackedLinear, PackedConv1D)):
            raise LmcompressError(f"a {type(packed).__name__} has no dense form that is known here")
        conv = isinstance(packed, PackedConv1D)
        with torch.device("meta"):
            new = Conv1D(packed.nf, packed.nx) if conv else nn.Linear(packed.in_features, packed.out_features)
        new.bias = packed.bias
        weight = weight.t().contiguous() if conv else weight
    new.weight = nn.Parameter(weight)
    return new.train(packed.training)
