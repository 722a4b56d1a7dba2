"""Cutting a model down to some of its heads, neurons, blocks and hidden dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from lmcompress.errors import LmcompressError
from lmcompress.families import Block, anatomy_of, narrow_stream, new_projection, stream_axes, weight_view
from lmcompress.families.narrow import accompany, companion_of
from lmcompress.families.tied_blocks import shared_sources
from lmcompress.nn.base import Compact


def keep_heads(block: Block, heads: Sequence[int]) -> None:
    """Cut a block's attention down to the given heads.

    Args:
        block: modified in place.
        heads: indices of the heads to keep, from 0 in the current numbering; at least one:
            :func:`drop_heads` removes all.

    Raises:
        LmcompressError: If no head is kept, one is repeated, or one does not exist.
    """
    _cut_heads(block, _indices(heads, block.num_heads, "heads"))


def drop_heads(block: Block) -> None:
    """Remove all heads of a block; its attention then returns the bias of its output projection.

    Args:
        block: modified in place.
    """
    _cut_heads(block, torch.empty(0, dtype=torch.long))


def keep_neurons(block: Block, neurons: Sequence[int]) -> None:
    """Cut a block's feed-forward network down to the given neurons.

    Args:
        block: modified in place.
        neurons: indices of the neurons to keep, from 0; at least one: :func:`drop_neurons`
            removes all.

    Raises:
        LmcompressError: If no neuron is kept, one is repeated, or one does not exist.
    """
    _cut_neurons(block, _indices(neurons, block.ffn_width, "neurons"))


def drop_neurons(block: Block) -> None:
    """Remove all neurons of a block; its feed-forward network then returns the bias of its second matrix.

    Args:
        block: modified in place.
    """
    _cut_neurons(block, torch.empty(0, dtype=torch.long))


def _cut_heads(block: Block, keep: torch.Tensor) -> None:
    size = block.head_size
    columns = (keep[:, None] * size + torch.arange(size)).flatten()
    if block.family.qkv:
        width = block.num_heads * size
        fused = torch.cat([columns + offset * width for offset in range(3)])
        block.replace("qkv", _slice(block.get("qkv"), out=fused))
    else:
        for part in ("query", "key", "value"):
            block.replace(part, _slice(block.get(part), out=columns))
    block.replace("attention_out", _slice(block.get("attention_out"), into=columns))
    block.set_heads(len(keep))


def _cut_neurons(block: Block, keep: torch.Tensor) -> None:
    block.replace("ffn_in", _slice(block.get("ffn_in"), out=keep))
    block.replace("ffn_out", _slice(block.get("ffn_out"), into=keep))


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Cut a model down to the given blocks, in the given order, and update its config.

    Args:
        model: modified in place.
        layers: indices of the blocks to keep, from 0; at least one.

    Raises:
        LmcompressError: If no block is kept, one is repeated, one does not exist, or blocks share their parameters.
    """
    anatomy = anatomy_of(model)
    if len(set(shared_sources(list(anatomy.block_list)))) < len(anatomy.block_list):
        raise LmcompressError(
            "cannot remove blocks from a model whose blocks share parameters: choose the blocks first, then share "
            "the parameters of the remaining ones"
        )
    keep = _indices(layers, len(anatomy.block_list), "layers")
    parent, _, name = anatomy.family.blocks.rpartition(".")
    kept = nn.ModuleList([anatomy.block_list[i] for i in keep.tolist()])
    setattr(anatomy.base.get_submodule(parent), name, kept)
    for index, block in enumerate(anatomy.blocks):
        block.set_index(index)
    setattr(model.config, anatomy.family.num_layers, len(kept))


def keep_hidden(model: PreTrainedModel, dimensions: Sequence[int]) -> None:
    """Cut the residual stream down to the given dimensions, everywhere that the config's hidden size applies.

    These are embeddings, norms, every matrix that reads or writes the stream, and those modules of the task's head that
    have the same width: a pooler, the transform of a masked language model. Tied tensors stay tied. The config is
    unchanged: as long as the heads of the stock skeleton fill its hidden size, nothing else builds that skeleton
    (:func:`set_stock_shapes` writes the new one where possible).

    Args:
        model: modified in place.
        dimensions: indices of the dimensions to keep, from 0; at least one.

    Raises:
        LmcompressError: If no dimension is kept, one is repeated, one does not exist, or the model has parameters that
            a stock model of its class lacks, so that it is unknown whether they follow the hidden size.
    """
    keep = _indices(dimensions, anatomy_of(model).hidden_size, "hidden dimensions")
    narrow_stream(model, {name: axes for name, (_, axes) in hidden_axes(model).items()}, keep)


def hidden_axes(model: PreTrainedModel) -> dict[str, tuple[nn.Parameter, tuple[int, ...]]]:
    """The axes of each parameter that are as wide as the residual stream.

    Args:
        model: a model of a known family, with or without a head, of any shapes.

    Returns:
        By name, tied parameters under each of their names: the parameter, and its axes as stored; none if the
        parameter is unrelated to the stream.

    Raises:
        LmcompressError: If the model has compact layers, or parameters that a stock model of its class lacks.
    """
    if any(isinstance(module, Compact) for module in model.modules()):
        raise LmcompressError(
            "cannot determine what follows the hidden size in a model with compact layers: prune the dense model, "
            "then make the result compact"
        )
    axes = stream_axes(model, vars(anatomy_of(model).family))
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
        if isinstance(bias, torch.Tensor):
            assert isinstance(new.bias, torch.Tensor)
            new.bias.copy_(bias if out is None else bias[out.to(device)])
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(getattr(old, name).requires_grad)
    companion = companion_of(old)
    if companion is not None:
        accompany(new, companion if out is None else companion.rows(out))
    return new.train(old.training)
