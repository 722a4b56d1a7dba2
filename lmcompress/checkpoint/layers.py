"""Compact layers of a model: listing them, and giving a skeleton those that a config names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel

from lmcompress.checkpoint.behaviour import behave
from lmcompress.checkpoint.config import CompressionConfig, recorded_compression
from lmcompress.checkpoint.schema import (
    CompactLayer,
    FactorizedEmbeddings,
    GroupedLayers,
    LowRankLayers,
    SeparableLayers,
    SharedBlocks,
)
from lmcompress.checkpoint.structure import stated_structure
from lmcompress.errors import CheckpointError, LmcompressError
from lmcompress.families import (
    Family,
    ZeroWidthLinear,
    anatomy_of,
    in_features,
    is_conv1d,
    name_of,
    new_projection,
    out_features,
    outline_of,
)
from lmcompress.families.coupled import READ_STREAM, WRITE_STREAM
from lmcompress.families.matrices import embedding_scale
from lmcompress.families.mixing import mix_locally, mixing_of
from lmcompress.families.tied_blocks import empty_shared, fill_shared, shared_sources
from lmcompress.nn.base import Compact
from lmcompress.nn.configs import own_config
from lmcompress.nn.embedding import FactorizedEmbedding, FactorizedHead
from lmcompress.nn.grouped import GroupedLinear
from lmcompress.nn.low_rank import LowRankLinear
from lmcompress.nn.packed import Packed
from lmcompress.nn.separable import SeparableMixing

PARTS = (*READ_STREAM, *WRITE_STREAM)
"""The family's names of the matrices of a block."""


def layers_of(model: PreTrainedModel) -> tuple[CompactLayer, ...]:
    """The current compact layers of a model, as its config is to list them.

    Args:
        model: a model of a known family, on any device.

    Returns:
        One entry for each kind and size; that of shared blocks is last.

    Raises:
        LmcompressError: If two blocks share some of their parameters but not all.
    """
    anatomy = outline_of(model)
    prefix = model.base_model_prefix + "."
    kinds: dict[CompactLayer, list[str]] = {}
    for name, module in model.named_modules():
        kind = _kind_of(module)
        if kind is not None:
            kinds.setdefault(kind, []).append(name.removeprefix(prefix))
    entries = [kind.model_copy(update={"modules": tuple(paths)}) for kind, paths in kinds.items()]
    kernels: dict[int, list[int]] = {}
    for index, block in enumerate(anatomy.blocks):
        mixing = mixing_of(block)
        if mixing is not None:
            kernels.setdefault(mixing.kernel, []).append(index)
    mixings = [SeparableLayers(kind="separable", kernel=k, blocks=tuple(b)) for k, b in kernels.items()]
    sources = shared_sources(list(anatomy.block_list))
    shared = [SharedBlocks(kind="shared", sources=sources)] if sources != tuple(range(len(sources))) else []
    return (*mixings, *entries, *shared)


def _kind_of(module: nn.Module) -> LowRankLayers | FactorizedEmbeddings | GroupedLayers | None:
    """The entry of one compact module, without its place."""
    place = ("x",)
    if isinstance(module, LowRankLinear):
        return LowRankLayers(kind="low_rank", rank=module.rank, modules=place)
    if isinstance(module, FactorizedEmbedding):
        return FactorizedEmbeddings(kind="factorized_embedding", rank=module.rank, modules=place)
    if isinstance(module, GroupedLinear):
        orders = {"input_order": module.input_order is not None, "output_order": module.output_order is not None}
        return GroupedLayers(kind="grouped", groups=module.groups, modules=place, **orders)
    return None


def record_layers(model: PreTrainedModel) -> None:
    """Record a model's compact layers in its config; shapes and provenance stay.

    Args:
        model: dense except for its compact layers; gets a config of its own, which is changed.
    """
    own_config(model)
    old = recorded_compression(model.config)
    model.config.quantization_config = CompressionConfig(
        stated_structure(model), old and old.provenance, layers=layers_of(model), storage=old and old.storage
    )
    behave(model)


def compact_modules(model: nn.Module) -> dict[str, Compact]:
    """The compact modules of a model, by name.

    Args:
        model: any model.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, Compact)}


def refuse_compact(model: PreTrainedModel, what: str) -> None:
    """Refuse a model with compact layers or shared blocks before any long work on it.

    Args:
        model: a model of a known family.
        what: the operation, such as ``"cut"``.

    Raises:
        LmcompressError: If the model has any.
    """
    found = layers_of(model)
    if found:
        kinds = ", ".join(sorted({entry.kind for entry in found}))
        raise LmcompressError(
            f"cannot {what} a model that has compact layers, this one has: {kinds}. Do that with the dense model "
            "first, then make the result compact (lmcompress.students)"
        )


def replace_skeleton(model: PreTrainedModel, layers: Sequence[CompactLayer]) -> None:
    """Give a newly built model the compact layers that a config names, without values.

    Blocks that share parameters have none until :func:`finish_replaced`.

    Args:
        model: in its final shapes; modified in place; usually on ``meta``.
        layers: compact layers in a checkpoint's config.

    Raises:
        CheckpointError: If the config names something the model lacks, or sizes that do not fit.
    """
    try:
        for entry in layers:
            _build(model, entry)
    except CheckpointError:
        raise
    except LmcompressError as error:
        raise CheckpointError(
            f"quantization_config.layers does not fit the model: {error}. The config is damaged; load the checkpoint "
            "as it was written"
        ) from error


def finish_replaced(model: PreTrainedModel, layers: Sequence[CompactLayer]) -> None:
    """Check the values loaded into compact layers, and let blocks share their parameters.

    Args:
        model: with its values; tensors on ``meta`` are skipped.
        layers: as for :func:`replace_skeleton`.

    Raises:
        CheckpointError: If an order is not a permutation, a size differs from the module's, or other blocks share.
    """
    for name, module in compact_modules(model).items():
        if not any(tensor.is_meta for tensor in module.buffers()):
            module.check(name)
    for entry in layers:
        if isinstance(entry, SharedBlocks):
            fill_shared(list(anatomy_of(model).block_list), entry.sources)


def low_rank_place(old: nn.Module, rank: int) -> LowRankLinear:
    """An empty low-rank layer with the widths, dtype, device, mode and bias of a dense one.

    Args:
        old: a ``Linear`` or ``Conv1D``.
        rank: rank of the new layer.
    """
    like = _likeness(old)
    return LowRankLinear(in_features(old), out_features(old), rank, old.bias is not None, **like).train(old.training)


def grouped_place(old: nn.Module, groups: int, *, input_order: bool, output_order: bool) -> GroupedLinear:
    """An empty grouped layer with the widths, dtype, device, mode and bias of a dense one.

    Args:
        old: a ``Linear`` or ``Conv1D``.
        groups: number of groups of the new layer.
        input_order: whether its input is permuted.
        output_order: whether its output is permuted.
    """
    new = GroupedLinear(
        in_features(old),
        out_features(old),
        groups,
        old.bias is not None,
        input_order=input_order,
        output_order=output_order,
        **_likeness(old),
    )
    return new.train(old.training)


def mixing_place(model: PreTrainedModel, index: int, kernel: int) -> SeparableMixing:
    """An empty local mixing for a block, without values.

    Args:
        model: a model of a known family.
        index: number of the block.
        kernel: number of positions it covers.

    Raises:
        LmcompressError: If the block has no heads, or its values are compact already.
    """
    block = anatomy_of(model).blocks[index]
    if mixing_of(block) is not None:
        raise LmcompressError(f"block {index} must attend to be replaced, it mixes neighbours already")
    if block.num_heads == 0:
        raise LmcompressError(f"block {index} must have heads to be replaced, pruning has removed all")
    old = block.get(block.value_part)
    check_replaceable(old, f"the values of block {index}")
    channels = block.num_heads * block.head_width
    inner = new_projection(old, in_width=in_features(old), out_width=channels)
    causal = anatomy_of(model).causal or block.looks_back
    new = SeparableMixing(inner, in_features(old), channels, kernel, causal, **_likeness(old))
    return new.train(old.training)


def factorized_place(old: nn.Embedding, rank: int) -> FactorizedEmbedding:
    """Empty factorized embeddings of a table's size.

    Args:
        old: the table.
        rank: rank of the new embeddings.

    Raises:
        LmcompressError: If the table multiplies what it looks up, as Gemma's does.
    """
    if embedding_scale(old) is not None:
        raise LmcompressError(
            f"a {type(old).__name__} multiplies the embeddings that it looks up, which factorized ones cannot: leave "
            "the embeddings as they are"
        )
    new = FactorizedEmbedding(old.num_embeddings, old.embedding_dim, rank, old.padding_idx, **_likeness(old))
    return new.train(old.training)


def put(model: PreTrainedModel, path: str, new: nn.Module) -> None:
    """Replace a module; a head tied to replaced embeddings is tied to the new ones.

    Args:
        model: modified in place.
        path: path of the module, relative to the base model.
        new: the replacement.
    """
    parent, _, name = path.rpartition(".")
    setattr(model.base_model.get_submodule(parent), name, new)
    head = model.get_output_embeddings()
    if not isinstance(new, FactorizedEmbedding) or head is None:
        return
    tied = f"{name_of(model, head)}.weight"
    if tied in model.all_tied_weights_keys:
        # Transformers would tie the weight again, which no longer exists
        model.all_tied_weights_keys.pop(tied)
        model._tied_weights_keys = {t: source for t, source in model._tied_weights_keys.items() if t != tied}
        bias = head.bias if isinstance(head.bias, nn.Parameter) else None
        owner, _, name = tied.removesuffix(".weight").rpartition(".")
        setattr(model.get_submodule(owner), name, FactorizedHead(new, bias).train(head.training))


def check_replaceable(module: nn.Module, path: str) -> None:
    """Refuse a module that is not a dense matrix.

    Args:
        module: module to be replaced.
        path: its path, for the error.

    Raises:
        LmcompressError: If it is packed, compact, emptied by pruning, parametrized, or of another kind.
    """
    reason = None
    if isinstance(module, Packed):
        reason = "it is packed; make the dense model that lmcompress.checkpoint.encoding.unpacked(model) gives compact"
    elif isinstance(module, Compact):
        reason = f"it is a {type(module).__name__} already"
    elif isinstance(module, ZeroWidthLinear):
        reason = "pruning has emptied it"
    elif is_parametrized(module):
        reason = "something else has parametrized it; remove that first"
    elif not (isinstance(module, (nn.Linear, nn.Embedding)) or is_conv1d(module)):
        reason = f"it is a {type(module).__name__}"
    if reason:
        raise LmcompressError(f"{path} must be a dense matrix to be replaced: {reason}")


def _build(model: PreTrainedModel, entry: CompactLayer) -> None:
    anatomy = anatomy_of(model)
    count = len(anatomy.block_list)
    if isinstance(entry, SharedBlocks):
        if len(entry.sources) != count:
            raise LmcompressError(f"the sources of shared blocks must be {count} numbers, got {len(entry.sources)}")
        blocks = list(anatomy.block_list)
        for index, source in enumerate(entry.sources):
            if not alike(blocks[index], blocks[source]):
                raise LmcompressError(f"block {index} cannot share the parameters of block {source}: other shapes")
        empty_shared(blocks, entry.sources)
        return
    if isinstance(entry, SeparableLayers):
        for index in entry.blocks:
            if index >= count:
                raise LmcompressError(f"there is no block {index}, the model has {count}")
            mix_locally(anatomy.blocks[index], mixing_place(model, index, entry.kernel))
        return
    for path in entry.modules:
        old = _dense_at(model, path, embedding=isinstance(entry, FactorizedEmbeddings))
        check_replaceable(old, path)
        new: nn.Module
        if isinstance(entry, FactorizedEmbeddings):
            if not isinstance(old, nn.Embedding):
                raise LmcompressError(f"{path} must be an embedding table to be factorized, got a {type(old).__name__}")
            new = factorized_place(old, entry.rank)
        elif isinstance(entry, LowRankLayers):
            new = low_rank_place(old, entry.rank)
        else:
            new = grouped_place(old, entry.groups, input_order=entry.input_order, output_order=entry.output_order)
        put(model, path, new)


def _is_part(path: str, stack: Family) -> bool:
    """Whether a path is that of a projection in a block."""
    start, _, rest = path.removeprefix(f"{stack.blocks}.").partition(".")
    places = {getattr(stack, part) for part in PARTS} - {""}
    return path.startswith(f"{stack.blocks}.") and start.isdecimal() and rest in places


def _dense_at(model: PreTrainedModel, path: str, *, embedding: bool) -> nn.Module:
    """The replaceable module at a path: a block's projection, or the token embeddings."""
    family = anatomy_of(model).family
    if embedding:
        if family.decoder is not None:
            raise LmcompressError(
                f"the embeddings of a {family.model_type} belong to its encoder, its decoder and its head, and cannot "
                "be factorized; leave them out"
            )
        known = path == family.word_embeddings
    else:
        known = any(_is_part(path, stack) for stack in family.stacks)
    try:
        if known:
            return model.base_model.get_submodule(path)
    except AttributeError:
        pass
    raise LmcompressError(f"there is no module {path} that could be compact")


def alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two blocks have the same modules with tensors of the same shapes.

    Args:
        one: a block.
        other: another.
    """

    def form(block: nn.Module) -> list[tuple[str, type, list[tuple[str, torch.Size]]]]:
        return [
            (name, type(m), [(n, p.shape) for n, p in m.named_parameters(recurse=False)])
            for name, m in block.named_modules()
        ]

    return form(one) == form(other)


def _likeness(old: nn.Module) -> dict[str, Any]:
    parameter = next(old.parameters())
    return {"device": parameter.device, "dtype": parameter.dtype}
