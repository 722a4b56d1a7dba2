"""Packed models: replacing weights by codes, preparing a skeleton for codes, and restoring dense weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from lmcompress.checkpoint.behaviour import behave, has_codes, rule
from lmcompress.checkpoint.config import CompressionConfig, recorded_compression
from lmcompress.checkpoint.layers import layers_of
from lmcompress.checkpoint.places import Packable, dense, described, entry_of, place_for, reading, untied
from lmcompress.checkpoint.schema import AttentionEncoding, Encoding, WeightEncoding
from lmcompress.checkpoint.structure import stated_structure
from lmcompress.errors import CheckpointError, LmcompressError, nearest
from lmcompress.families import anatomy_of, name_of, outline_of, readers_of_encoder
from lmcompress.families.fusing import compare_ranges, fuse, unfuse
from lmcompress.families.matrices import is_matrix
from lmcompress.families.weights import modules_by_path
from lmcompress.nn.configs import own_config
from lmcompress.nn.packed import Packed, PackedEmbedding, TiedEmbedding, TiedHead
from lmcompress.nn.padding import follow_padding, release_padding
from lmcompress.nn.quantized_attention import AttentionQuantizers, quantize_attention, release_attention
from lmcompress.numerics.inputs import check_input_range


def matrices(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules with a weight that can be packed or is packed, by path.

    Paths are relative to the base model; modules of a task head have their own names. What is tied to the token
    embeddings, such as a head, is not included, nor is a projection that pruning has emptied.

    Args:
        model: a model of a known family.
    """
    tied = {id(module) for module in tied_modules(model).values()}
    return {
        path: module
        for path, module in modules_by_path(model).items()
        if (is_matrix(module) or isinstance(module, Packed)) and id(module) not in tied
    }


def tied_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules that share the matrix of the token embeddings, by name: a head, the embeddings of both stacks.

    Args:
        model: on any device, ``meta`` too.
    """
    embedding = model.get_input_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (TiedHead, TiedEmbedding))
        or (f"{name}.weight" in model.all_tied_weights_keys and is_matrix(module) and module is not embedding)
    }


def tied_head(model: PreTrainedModel) -> nn.Module | None:
    """The head that shares the matrix of the token embeddings, or None.

    Args:
        model: on any device, ``meta`` too.
    """
    head = model.get_output_embeddings()
    if head is None or isinstance(head, TiedHead):
        return head
    tied = f"{name_of(model, head)}.weight" in model.all_tied_weights_keys
    return head if tied else None


def pack_model(
    model: PreTrainedModel,
    parts: Mapping[str, Packable] | Iterable[tuple[str, Packable]],
    attention: AttentionEncoding | None = None,
) -> None:
    """Replace weights by codes and record it in the model's config.

    What is tied to packed embeddings, such as a head, reads their codes afterwards.

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
        new = place_for(old, described(path, part), path)
        new.fill(part.quantized, part.input_range)
        replaced[path] = new
    if not replaced:
        raise LmcompressError("there must be at least one module to pack, got none; nothing would be quantized")
    names = _names(model)
    for path, module in replaced.items():
        _replace(model, names[id(known[path])], module)
    _tie(model)
    follow_padding(model, readers_of_encoder(model))
    fuse(model, outline_of(model).blocks)
    compare_ranges(model)
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
    known, names = matrices(model), _names(model)
    same_class = (model.config.architectures or [""])[0] == type(model).__name__
    family = outline_of(model).family
    # a family may have no table of positions, and every path starts with ""
    places = [(stack.blocks + ".", stack.word_embeddings, stack.position_embeddings) for stack in family.stacks]
    backbone = tuple(path for paths in places for path in paths if path)
    for path, entry in encoding.by_module().items():
        if path in known:
            try:
                _replace(model, names[id(known[path])], place_for(known[path], entry, path))
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
    follow_padding(model, readers_of_encoder(model))
    fuse(model, outline_of(model).blocks)
    if encoding.attention is not None:
        attentions = [module for block in anatomy_of(model).blocks for module in block.attentions()]
        if not attentions:
            raise CheckpointError(
                "quantization_config.encoding quantizes attention, and no block has heads: the config "
                "is damaged; load the checkpoint as it was written"
            )
        quantize_attention(model, attentions, encoding.attention)


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
    compare_ranges(model)


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
    """Record the encoding in a model's config, beside its current shapes and layers; provenance stays.

    Args:
        model: gets a config of its own, which is changed.
        encoding: None for a dense model.
    """
    own_config(model)
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
    quantizer = model.__dict__.get("hf_quantizer")
    if quantizer is not None:
        quantizer.quantization_config = new
    behave(model)


def unpacked(model: PreTrainedModel) -> PreTrainedModel:
    """A dense model with the dequantized weights; activations are no longer quantized.

    Args:
        model: packed or not; unchanged.

    Returns:
        A copy whose packed weights are float32 parameters, tied again where they were.
    """
    return unpack(copy.deepcopy(model))


def unpack(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Replace codes by the dequantized weights; activations are no longer quantized.

    Args:
        model: packed or not; modified in place.
        dtype: dtype of all parameters afterwards.

    Returns:
        The same model, dense; what was tied is tied again.
    """
    release_attention(model)
    release_padding(model)
    unfuse(model)
    names = _names(model)
    for module in list(matrices(model).values()):
        if isinstance(module, Packed):
            _replace(model, names[id(module)], dense(module))
    embedding = model.get_input_embeddings()
    for name, tied in tied_modules(model).items():
        if isinstance(tied, (TiedHead, TiedEmbedding)):
            _replace(model, name, untied(tied, embedding.weight))
            model.all_tied_weights_keys[f"{name}.weight"] = f"{name_of(model, embedding)}.weight"
    for module in model.modules():
        # back to those of the class
        module.__dict__.pop("_tied_weights_keys", None)
    record_encoding(model, None)
    if not hasattr(model.config, "quantization_config"):
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            model.__dict__.pop(name, None)
    return model.to(dtype)


def is_encoded(model: PreTrainedModel) -> bool:
    """Whether weights of a model are packed or its attention is quantized as its config records.

    Args:
        model: a model of a known family.
    """
    recorded = recorded_compression(model.config)
    return has_codes(model) or (recorded is not None and recorded.encoding is not None)


@rule(is_encoded)
def dequantize(self: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Replace codes by the dequantized weights, in place; pruned shapes stay.

    Args:
        self: a packed model.
        dtype: dtype of all parameters afterwards; default: float32, which holds the dequantized weights exactly.

    Returns:
        The same model.
    """
    return unpack(self, torch.float32 if dtype is None else dtype)


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


def _names(model: nn.Module) -> dict[int, str]:
    """Names of all modules by id."""
    return {id(module): name for name, module in model.named_modules()}


def _replace(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def _tie(model: PreTrainedModel) -> None:
    """Let what shared the weight of embeddings, such as a head, read their codes now that they are packed."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, PackedEmbedding):
        return
    for path, module in tied_modules(model).items():
        if isinstance(module, (TiedHead, TiedEmbedding)):
            continue
        # Transformers would tie the weight again, which no longer exists
        _untie(model, f"{path}.weight")
        _replace(model, path, reading(module, embedding))


def _untie(model: PreTrainedModel, name: str) -> None:
    """Take a weight from the lists of tied ones, of the model and of the models inside."""
    model.all_tied_weights_keys.pop(name)
    for prefix, module in model.named_modules():
        own = name.removeprefix(f"{prefix}." if prefix else "")
        keys = getattr(module, "_tied_weights_keys", None)
        if isinstance(keys, dict) and own in keys:
            module._tied_weights_keys = {target: source for target, source in keys.items() if target != own}


def _grouped(model: PreTrainedModel) -> tuple[WeightEncoding, ...]:
    """The encoding of a model's packed modules, grouped by kind."""
    groups: dict[WeightEncoding, list[str]] = {}
    for path, module in packed_modules(model):
        kind = entry_of(module.layout, module.inputs, path).model_copy(update={"modules": ()})
        groups.setdefault(kind, []).append(path)
    return tuple(kind.model_copy(update={"modules": tuple(paths)}) for kind, paths in groups.items())
