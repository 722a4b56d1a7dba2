"""Packed models: replacing weights by codes, preparing a skeleton for codes, and restoring dense weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lmcompress.checkpoint.config import CompressionConfig, recorded_compression
from lmcompress.checkpoint.layers import layers_of
from lmcompress.checkpoint.schema import ActivationEncoding, AttentionEncoding, Encoding, GridEncoding, WeightEncoding
from lmcompress.checkpoint.structure import stated_structure
from lmcompress.errors import CheckpointError, LmcompressError, nearest
from lmcompress.families import anatomy_of, is_conv1d, weight_view
from lmcompress.families.weights import is_matrix, modules_by_path
from lmcompress.nn.packed import InputRange, Layout, Packed, PackedConv1D, PackedEmbedding, PackedLinear, TiedHead
from lmcompress.nn.quantized_attention import AttentionQuantizers, quantize_attention, release_attention
from lmcompress.numerics.grids import PerGroup, PerRow, PerTensor
from lmcompress.numerics.inputs import InputEncoding, check_input_range
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


def matrices(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules with a weight that can be packed or is packed, by path.

    Paths are relative to the base model; modules of a task head have their own names. A head that is tied to the token
    embeddings is not included, nor is a projection that pruning has emptied.

    Args:
        model: a model of a known family.
    """
    head = tied_head(model)
    return {
        path: module
        for path, module in modules_by_path(model).items()
        if (is_matrix(module) or isinstance(module, Packed)) and module is not head
    }


def tied_head(model: PreTrainedModel) -> nn.Module | None:
    """The head that shares the matrix of the token embeddings, or None.

    Args:
        model: on any device, ``meta`` too.
    """
    head = model.get_output_embeddings()
    if head is None or isinstance(head, TiedHead):
        return head
    tied = f"{_name_of(model, head)}.weight" in model.all_tied_weights_keys
    return head if tied else None


def pack_model(
    model: PreTrainedModel,
    parts: Mapping[str, Packable] | Iterable[tuple[str, Packable]],
    attention: AttentionEncoding | None = None,
) -> None:
    """Replace weights by codes and record it in the model's config.

    A head that is tied to packed embeddings reads their codes afterwards.

    Args:
        model: modified in place, once everything has been checked; without parametrizations.
        parts: what to pack, by path (:func:`matrices`); pairs of path and part are iterated once, so that only
            one quantized matrix need be held at a time.
        attention: quantization within attention, recorded in the config.

    Raises:
        LmcompressError: If there is nothing to pack, a module does not exist, a weight has another shape or is not
            finite, or a static range has no scale.
    """
    known, head = matrices(model), tied_head(model)
    replaced: dict[str, Packed] = {}
    for path, part in parts.items() if isinstance(parts, Mapping) else parts:
        if path not in known:
            raise LmcompressError(f"there is no module {path} to pack{nearest(path, known)}")
        old = known[path]
        if isinstance(old, nn.Embedding) and part.inputs is not None:
            if head is None or old is not model.get_input_embeddings():
                raise LmcompressError(
                    f"the input of {path} cannot be quantized, it consists of ids and no head is tied to it; got "
                    f"{part.inputs}"
                )
        new = _place_for(old, _described(path, part), path)
        new.fill(part.quantized, part.input_range)
        replaced[path] = new
    if not replaced:
        raise LmcompressError("there must be at least one module to pack, got none; nothing would be quantized")
    for path, module in replaced.items():
        _replace(model, known[path], module)
    _tie(model)
    record_encoding(model, Encoding(weights=_grouped(model), attention=attention))


def encode_skeleton(model: PreTrainedModel, encoding: Encoding) -> None:
    """Give a newly built model the buffers for codes that an encoding names, and quantize its attention.

    The buffers have no values yet.

    Args:
        model: in its final shapes; modified in place; usually on ``meta``.
        encoding: encoding in a checkpoint's config.

    Raises:
        CheckpointError: If it names a module that the model lacks, though the checkpoint was written by a model
            of this class or the module is part of the backbone; or one that cannot be packed that way.
    """
    known = matrices(model)
    same_class = (model.config.architectures or [""])[0] == type(model).__name__
    family = anatomy_of(model).family
    backbone = (family.blocks + ".", family.word_embeddings, family.position_embeddings)
    for path, entry in encoding.by_module().items():
        if path in known:
            try:
                _replace(model, known[path], _place_for(known[path], entry, path))
            except CheckpointError:
                raise
            except LmcompressError as error:
                raise CheckpointError(f"quantization_config.encoding does not fit module {path}: {error}") from error
        elif same_class or path.startswith(backbone):
            raise CheckpointError(
                f"quantization_config.encoding names a module {path}, which this {type(model).__name__} does not have "
                "or cannot pack: the config is damaged; load the checkpoint as it was written"
            )
    _tie(model)
    if encoding.attention is not None:
        blocks = [block for block in anatomy_of(model).blocks if block.num_heads]
        if not blocks:
            raise CheckpointError(
                "quantization_config.encoding quantizes attention, and no block has heads: the config "
                "is damaged; load the checkpoint as it was written"
            )
        quantize_attention(model, [block.get("attention") for block in blocks], encoding.attention)


def check_encoded(model: PreTrainedModel) -> None:
    """Refuse codes, scales and ranges of activations that this library never writes.

    Args:
        model: with its values; tensors on ``meta`` are skipped.

    Raises:
        CheckpointError: If there are any.
    """
    for name, module in model.named_modules():
        if isinstance(module, Packed) and not module.weight.is_meta:
            module.check(name)
        elif isinstance(module, AttentionQuantizers):
            for role, encoding in module.encodings.items():
                scale = getattr(module, f"{role}_scale", None)
                if scale is not None and not scale.is_meta:
                    check_input_range(scale, getattr(module, f"{role}_zero_point", None), encoding, f"{name}.{role}")


def encoded_names(model: PreTrainedModel) -> set[str]:
    """Names of the tensors that an encoding adds to a model: codes, scales, zero points, ranges of activations.

    Args:
        model: a model of a known family.
    """
    return {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, (Packed, AttentionQuantizers))
        for own, _ in module.named_buffers()
    }


def encoding_of(model: PreTrainedModel) -> Encoding | None:
    """The current encoding of a model: of its weights by its modules, of its attention by its config.

    Args:
        model: a model of a known family.

    Returns:
        None if nothing is encoded.
    """
    recorded = recorded_compression(model.config)
    attention = recorded.encoding.attention if recorded is not None and recorded.encoding is not None else None
    weights = _grouped(model)
    return Encoding(weights=weights, attention=attention) if weights or attention is not None else None


def record_encoding(model: PreTrainedModel, encoding: Encoding | None) -> None:
    """Record the encoding in a model's config; shapes and provenance stay.

    Args:
        model: its config is modified in place.
        encoding: None for a dense model.
    """
    old = recorded_compression(model.config)
    new = CompressionConfig(
        stated_structure(model), old and old.provenance, encoding=encoding, layers=layers_of(model),
        storage=old and old.storage,
    )  # fmt: skip
    if new == CompressionConfig():
        # nothing left to record: a stock model again
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    else:
        model.config.quantization_config = new


def unpacked(model: PreTrainedModel) -> PreTrainedModel:
    """A dense model with the dequantized weights; activations are no longer quantized.

    Args:
        model: packed or not; unchanged.

    Returns:
        A copy whose packed weights are float32 parameters, the tied head tied again.
    """
    model = copy.deepcopy(model)
    release_attention(model)
    for module in list(matrices(model).values()):
        if isinstance(module, Packed):
            _replace(model, module, _dense(module))
    head = model.get_output_embeddings()
    if isinstance(head, TiedHead):
        embedding = model.get_input_embeddings()
        dense = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
        dense.weight = embedding.weight
        dense.register_parameter("bias", head.bias)
        name = _name_of(model, head)
        _replace(model, head, dense.train(head.training))
        # back to those of the class
        model.__dict__.pop("_tied_weights_keys", None)
        model.all_tied_weights_keys[f"{name}.weight"] = f"{_name_of(model, embedding)}.weight"
    record_encoding(model, None)
    if not hasattr(model.config, "quantization_config"):
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            model.__dict__.pop(name, None)
    # bypasses Transformers, which refuses to cast what was loaded with a quantization config
    return nn.Module.float(model)


def weight_count(model: nn.Module) -> int:
    """Number of parameters of a model, each code counting as one; tied tensors count once.

    Args:
        model: packed or not, on any device.
    """
    codes = sum(module.shape[0] * module.shape[1] for module in model.modules() if isinstance(module, Packed))
    return codes + sum(parameter.numel() for parameter in model.parameters())


def packed_modules(model: PreTrainedModel) -> Iterator[tuple[str, Packed]]:
    """The packed modules of a model by path.

    Args:
        model: packed or not.

    Yields:
        Path and module.
    """
    for path, module in matrices(model).items():
        if isinstance(module, Packed):
            yield path, module


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    parent, _, name = _name_of(model, old).rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def _tie(model: PreTrainedModel) -> None:
    """Let a head that shared the weight of embeddings read their codes now that they are packed."""
    head, embedding = tied_head(model), model.get_input_embeddings()
    if head is None or isinstance(head, TiedHead) or not isinstance(embedding, PackedEmbedding):
        return
    # Transformers would tie the weight again, which no longer exists
    name = f"{_name_of(model, head)}.weight"
    model.all_tied_weights_keys.pop(name)
    model._tied_weights_keys = {target: source for target, source in model._tied_weights_keys.items() if target != name}
    _replace(model, head, TiedHead(embedding, head.bias).train(head.training))  # type: ignore[arg-type]


def _grouped(model: PreTrainedModel) -> tuple[WeightEncoding, ...]:
    """The encoding of a model's packed modules, grouped by kind."""
    groups: dict[WeightEncoding, list[str]] = {}
    for path, module in packed_modules(model):
        kind = _entry(module.layout, module.inputs, path).model_copy(update={"modules": ()})
        groups.setdefault(kind, []).append(path)
    return tuple(kind.model_copy(update={"modules": tuple(paths)}) for kind, paths in groups.items())


def _described(path: str, part: Packable) -> WeightEncoding:
    quantized = part.quantized
    container = container_for(quantized.grid) if part.container is None else part.container
    layout = Layout(quantized.grid, container, quantized.granularity, quantized.zero_points is not None)
    return _entry(layout, part.inputs, path)


def _entry(layout: Layout, inputs: InputEncoding | None, path: str) -> WeightEncoding:
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


def _place_for(old: nn.Module, entry: WeightEncoding, path: str) -> Packed:
    """An empty packed module of the shape of a dense one, with its bias."""
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
        )
    else:
        weight, bias = weight_view(old), old.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        kind = PackedConv1D if is_conv1d(old) else PackedLinear
        new = kind(weight.shape[1], weight.shape[0], layout, entry.inputs, bias, device=weight.device)
    return new.train(old.training)


def _dense(packed: Packed) -> nn.Module:
    """A dense module with the dequantized weight of a packed one."""
    weight = packed.dequantized()
    new: nn.Module
    if isinstance(packed, PackedEmbedding):
        new = nn.Embedding(*packed.shape, padding_idx=packed.padding_idx, device="meta")
    else:
        assert isinstance(packed, (PackedLinear, PackedConv1D))
        conv = isinstance(packed, PackedConv1D)
        with torch.device("meta"):
            new = Conv1D(packed.nf, packed.nx) if conv else nn.Linear(packed.in_features, packed.out_features)
        new.bias = packed.bias
        weight = weight.t().contiguous() if conv else weight
    new.weight = nn.Parameter(weight)
    return new.train(packed.training)
