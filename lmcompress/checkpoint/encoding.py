"""Packed models: putting codes in place of weights, giving a skeleton such places, and dense weights again."""

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
    """A quantized weight, and what happens to the input of its module.

    Attributes:
        quantized: of the weight as ``(out, in)``; of an embedding by token.
        inputs: what happens to the input; of word embeddings, to that of the head which is tied to them.
        input_range: scale and zero point, where the range of ``inputs`` is static.
        container: how codes lie in bytes; the smallest that holds them, if None.
    """

    quantized: Quantized
    inputs: ActivationEncoding | None = None
    input_range: InputRange | None = None
    container: Container | None = None


def matrices(model: PreTrainedModel) -> dict[str, nn.Module]:
    """What has a weight that can be packed, or is packed already, by path.

    Paths are relative to the base model; modules of a task head have their own names. A head that is tied to the word
    embeddings is not among them, and neither is a projection of which pruning has left nothing.

    Args:
        model: of a known family.
    """
    head = tied_head(model)
    return {
        path: module
        for path, module in modules_by_path(model).items()
        if (is_matrix(module) or isinstance(module, Packed)) and module is not head
    }


def tied_head(model: PreTrainedModel) -> nn.Module | None:
    """The head that shares the matrix of the word embeddings, or None.

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
    """Put codes in the place of weights, and say so in the model's config.

    A head that is tied to packed embeddings reads their codes from then on.

    Args:
        model: changed in place, once everything has been checked; without parametrizations.
        parts: what to pack, by path (:func:`matrices`); pairs of path and part are iterated once, so that no more
            than one matrix need be held quantized.
        attention: what happens within attention, to be said in the config.

    Raises:
        LmcompressError: If there is nothing to pack, no such module, a weight of another shape, weights are not finite,
            or a static range comes without its scale.
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
                    f"the input of {path} must stay as it is, it is made of ids and no head is tied to it; got "
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
    """Give a freshly built model the places for codes that an encoding names, and let its attention quantize.

    The places have no values yet.

    Args:
        model: in its final shapes; changed in place; usually on ``meta``.
        encoding: as a checkpoint's config names it.

    Raises:
        CheckpointError: If it names a module that the model does not have, though the checkpoint was written by a model
            of this class or the module is of the backbone; or one that cannot be packed as it says.
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
                "quantization_config.encoding says what happens within attention, and no block has heads: the config "
                "is damaged; load the checkpoint as it was written"
            )
        quantize_attention(model, [block.get("attention") for block in blocks], encoding.attention)


def check_encoded(model: PreTrainedModel) -> None:
    """Refuse codes, scales and ranges of activations that nothing here writes.

    Args:
        model: with its values; what is on ``meta`` is left out.

    Raises:
        CheckpointError: If some are.
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
    """Names of the tensors that an encoding brings into a model: codes, scales, zero points, ranges of activations.

    Args:
        model: of a known family.
    """
    return {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, (Packed, AttentionQuantizers))
        for own, _ in module.named_buffers()
    }


def encoding_of(model: PreTrainedModel) -> Encoding | None:
    """How a model is encoded now: of weights as its modules say, of attention as its config says.

    Args:
        model: of a known family.

    Returns:
        None where nothing is.
    """
    recorded = recorded_compression(model.config)
    attention = recorded.encoding.attention if recorded is not None and recorded.encoding is not None else None
    weights = _grouped(model)
    return Encoding(weights=weights, attention=attention) if weights or attention is not None else None


def record_encoding(model: PreTrainedModel, encoding: Encoding | None) -> None:
    """Let a model's config say how it is encoded; its shapes and history stay.

    Args:
        model: its config is changed in place.
        encoding: None for a dense model.
    """
    old = recorded_compression(model.config)
    new = CompressionConfig(
        stated_structure(model), old and old.provenance, encoding=encoding, layers=layers_of(model),
        storage=old and old.storage,
    )  # fmt: skip
    if new == CompressionConfig():
        # nothing is left to say: a stock model again
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    else:
        model.config.quantization_config = new


def unpacked(model: PreTrainedModel) -> PreTrainedModel:
    """A dense model with the weights that the codes stand for; activations are no longer quantized.

    Args:
        model: packed or not; left as it is.

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
        # those of the class again
        model.__dict__.pop("_tied_weights_keys", None)
        model.all_tied_weights_keys[f"{name}.weight"] = f"{_name_of(model, embedding)}.weight"
    record_encoding(model, None)
    if not hasattr(model.config, "quantization_config"):
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            model.__dict__.pop(name, None)
    # past Transformers, which refuses to cast what was loaded by way of a quantization config
    return nn.Module.float(model)


def weight_count(model: nn.Module) -> int:
    """Numbers that a model consists of: its parameters, and one for each code; what is tied counts once.

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
    """Let a head that shared the weight of embeddings that are packed now read their codes."""
    head, embedding = tied_head(model), model.get_input_embeddings()
    if head is None or isinstance(head, TiedHead) or not isinstance(embedding, PackedEmbedding):
        return
    # Transformers would tie the weight again that is no longer there
    name = f"{_name_of(model, head)}.weight"
    model.all_tied_weights_keys.pop(name)
    model._tied_weights_keys = {target: source for target, source in model._tied_weights_keys.items() if target != name}
    _replace(model, head, TiedHead(embedding, head.bias).train(head.training))  # type: ignore[arg-type]


def _grouped(model: PreTrainedModel) -> tuple[WeightEncoding, ...]:
    """What the packed modules of a model say of themselves, those of one kind together."""
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
    """A dense module with the weights that a packed one stands for."""
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
