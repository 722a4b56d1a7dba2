"""Cutting a model down to some of its heads, neurons, blocks and hidden dimensions.

Each cut is recorded in the model's config, so that any ``save_pretrained`` writes a checkpoint that reloads. Other
models that were built from the same config object keep it unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from lmcompress.checkpoint.encoding import encoding_of, record_encoding
from lmcompress.checkpoint.structure import paths_of
from lmcompress.errors import LmcompressError
from lmcompress.families import (
    Anatomy,
    Block,
    anatomy_of,
    choose_layers_in_config,
    narrow_stream,
    new_projection,
    refuse_foreign,
    stream_axes,
    weight_view,
)
from lmcompress.families.narrow import accompany, companion_of
from lmcompress.families.tied_blocks import shared_sources
from lmcompress.nn.base import Compact
from lmcompress.nn.configs import own_config


def keep_heads(block: Block, heads: Sequence[int]) -> None:
    """Cut a block's attention down to the given heads.

    Args:
        block: modified in place, and its model's config.
        heads: indices of the heads to keep, from 0 in the current numbering; at least one:
            :func:`drop_heads` removes all.

    Raises:
        LmcompressError: If no head is kept, one is repeated, or one does not exist, or another library has quantized
            the model.
    """
    _cut_heads(block, _indices(heads, block.num_heads, "heads"))


def drop_heads(block: Block) -> None:
    """Remove all heads of a block; its attention then returns the bias of its output projection.

    Args:
        block: modified in place, and its model's config.
    """
    _cut_heads(block, torch.empty(0, dtype=torch.long))


def keep_neurons(block: Block, neurons: Sequence[int]) -> None:
    """Cut a block's feed-forward network down to the given neurons.

    Args:
        block: modified in place, and its model's config.
        neurons: indices of the neurons to keep, from 0; at least one: :func:`drop_neurons`
            removes all.

    Raises:
        LmcompressError: If no neuron is kept, one is repeated, or one does not exist, or another library has quantized
            the model.
    """
    _cut_neurons(block, _indices(neurons, block.ffn_width, "neurons"))


def drop_neurons(block: Block) -> None:
    """Remove all neurons of a block; its feed-forward network then returns the bias of its second matrix.

    Args:
        block: modified in place, and its model's config.
    """
    _cut_neurons(block, torch.empty(0, dtype=torch.long))


def _cut_heads(block: Block, keep: torch.Tensor) -> None:
    if block.family.shared_bias:
        raise LmcompressError(f"cannot cut heads of a {block.family.model_type}: {block.family.refused['heads']}")
    _cut_coupled(block, "heads", keep)
    block.set_heads(len(keep))
    _record(block.model)


def _cut_neurons(block: Block, keep: torch.Tensor) -> None:
    _cut_coupled(block, "neurons", keep)
    _record(block.model)


def _cut_coupled(block: Block, kind: Literal["heads", "neurons"], keep: torch.Tensor) -> None:
    _check_cuttable(block)
    units, parts = block.units(kind), {}
    for coupled in block.coupled(kind):
        axis = coupled.places(units, keep)
        out, into = (axis, None) if coupled.side == "in" else (None, axis)
        parts[coupled.part] = _slice(block.get(coupled.part), out=out, into=into)
    for part, new in parts.items():
        block.replace(part, new)


def _check_cuttable(what: PreTrainedModel | Block) -> None:
    """Refuse, before anything changes, what another library has changed, or what could not be recorded afterwards."""
    model = what.model if isinstance(what, Block) else what
    if model is None:
        refuse_foreign(cast(Block, what).module, "cut")
        return
    refuse_foreign(model, "cut")
    blocks = list(anatomy_of(model).block_list)
    if len(set(shared_sources(blocks))) < len(blocks):
        raise LmcompressError(
            "cannot cut a model whose blocks share parameters: cut the model first, then share those of the remaining "
            "blocks"
        )


def _record(model: PreTrainedModel | None) -> None:
    if model is not None:
        record_encoding(model, encoding_of(model))


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Cut a model down to the given blocks, in the given order, and update its config.

    Where attention is scaled by the number of its block (``scale_attn_by_inverse_layer_idx``), that factor is
    multiplied into the queries of blocks that get another number.

    Args:
        model: modified in place.
        layers: indices of the blocks to keep, from 0; at least one.

    Raises:
        LmcompressError: If no block is kept, one is repeated, one does not exist, blocks share their parameters, or
            a factor is to be multiplied into queries that are packed or otherwise no plain matrix; nothing is changed.
    """
    _check_cuttable(model)
    anatomy = anatomy_of(model)
    keep = _indices(layers, len(anatomy.block_list), "layers")
    by_stack = _by_stack(anatomy, keep.tolist())
    for index, old in enumerate(number for numbers in by_stack for number in numbers):
        # before anything is changed
        anatomy.blocks[old].number_factors(index)
    config, modules = own_config(model), list(anatomy.block_list)
    for start, stack, numbers in zip(anatomy.starts, anatomy.family.stacks, by_stack, strict=True):
        parent, _, name = stack.blocks.rpartition(".")
        setattr(anatomy.base.get_submodule(parent), name, nn.ModuleList([modules[i] for i in numbers]))
        choose_layers_in_config(config, stack, [i - start for i in numbers])
    starts = anatomy.starts
    for index, block in enumerate(anatomy.blocks):
        block.set_index(index - max(start for start in starts if start <= index))
    _record(model)


def _by_stack(anatomy: Anatomy, keep: list[int]) -> list[list[int]]:
    """The numbers of the blocks to keep, by stack; some of each, and no block of one before those of an earlier one."""
    starts = (*anatomy.starts, len(anatomy.block_list))
    found = [[i for i in keep if start <= i < end] for start, end in zip(starts, starts[1:], strict=False)]
    if not all(found) or [number for numbers in found for number in numbers] != keep:
        raise LmcompressError(
            f"layers to keep must be some of the encoder (0 to {starts[1] - 1}), then some of the decoder ({starts[1]} "
            f"to {starts[-1] - 1}); got {keep}"
        )
    if anatomy.family.shared_bias and [numbers[0] for numbers in found] != list(anatomy.starts):
        raise LmcompressError(
            f"layers to keep of a {anatomy.family.model_type} must begin with the first of each stack, which computes "
            f"a bias that the others add; got {keep}"
        )
    return found


def keep_hidden(model: PreTrainedModel, dimensions: Sequence[int]) -> None:
    """Cut the residual stream down to the given dimensions, everywhere that the config's hidden size applies.

    These are embeddings, norms, every matrix that reads or writes the stream, and those modules of the task's head that
    have the same width: a pooler, the transform of a masked language model. Tied tensors stay tied. The config's own
    hidden size changes only where the heads of a stock skeleton fill the new one
    (:func:`~lmcompress.checkpoint.structure.set_stock_shapes`): nothing else builds that skeleton.

    Args:
        model: modified in place.
        dimensions: indices of the dimensions to keep, from 0; at least one.

    Raises:
        LmcompressError: If no dimension is kept, one is repeated, one does not exist, or the model has cross-attention,
            or parameters that a stock model of its class lacks, so that it is unknown what follows the hidden size.
    """
    _check_cuttable(model)
    keep = _indices(dimensions, anatomy_of(model).hidden_size, "hidden dimensions")
    narrow_stream(model, {name: axes for name, (_, axes) in hidden_axes(model).items()}, keep)
    _record(model)


def refuse_undescribed(model: PreTrainedModel) -> None:
    """Refuse to change the hidden size of a model whose blocks have matrices that its family does not describe.

    Args:
        model: a model of a known family.

    Raises:
        LmcompressError: If there are any, such as those of cross-attention.
    """
    for index, block in enumerate(anatomy_of(model).blocks):
        if found := block.undescribed():
            raise LmcompressError(
                f"cannot change the hidden size of a model whose blocks have more than self-attention and a "
                f"feed-forward network: block {index} has {found[0]}, of which some sides follow the hidden size and "
                "others the heads or an encoder. Prune heads, neurons or layers, or take a model without it "
                "(add_cross_attention=False)"
            )


def hidden_axes(model: PreTrainedModel) -> dict[str, tuple[nn.Parameter, tuple[int, ...]]]:
    """The axes of each parameter that are as wide as the residual stream.

    Args:
        model: a model of a known family, with or without a head, of any shapes.

    Returns:
        By name, tied parameters under each of their names: the parameter, and its axes as stored; none if the
        parameter is unrelated to the stream.

    Raises:
        LmcompressError: If the model has compact layers, cross-attention, adapters, or parameters that a stock model of
            its class lacks.
    """
    refuse_foreign(model, "cut")
    refuse_undescribed(model)
    if any(isinstance(module, Compact) for module in model.modules()):
        raise LmcompressError(
            "cannot determine what follows the hidden size in a model with compact layers: prune the dense model, "
            "then make the result compact"
        )
    axes = stream_axes(model, paths_of(anatomy_of(model).family))
    for name, found in axes.items():
        if found is None:
            raise LmcompressError(
                f"a stock {type(model).__name__} has no parameter {name}, so it is unknown whether it follows the "
                "hidden size. Prune hidden dimensions before adding modules, or prune other parts"
            )
    return {name: (parameter, axes[name] or ()) for name, parameter in model.named_parameters(remove_duplicate=False)}


def _indices(wanted: Sequence[int], available: int, what: str) -> torch.Tensor:
    if not wanted or len(set(wanted)) != len(wanted) or min(wanted) < 0 or max(wanted) >= available:
        raise LmcompressError(
            f"{what} to keep must be at least one number in [0, {available - 1}], not repeated; got {list(wanted)}"
        )
    return torch.tensor(list(wanted))


def _slice(old: nn.Module, *, out: torch.Tensor | None = None, into: torch.Tensor | None = None) -> nn.Module:
    weight, bias = weight_view(old).detach(), old.bias
    device = weight.device
    if out is not None:
        weight = weight[out.to(device)]
    if into is not None:
        weight = weight[:, into.to(device)]
    new = new_projection(old, in_width=weight.shape[1], out_width=weight.shape[0])
    with torch.no_grad():
        weight_view(new).copy_(weight)
        if isinstance(bias, torch.Tensor) and isinstance(new.bias, torch.Tensor):
            new.bias.copy_(bias if out is None else bias[out.to(device)])
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(getattr(old, name).requires_grad)
    companion = companion_of(old)
    if companion is not None:
        accompany(new, companion if out is None else companion.rows(out))
    return new.train(old.training)
