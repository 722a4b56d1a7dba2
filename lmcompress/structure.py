"""Shapes of a model: reading them, giving them to a skeleton, cutting weights down to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lmcompress.anatomy import (
    Block,
    anatomy_of,
    config_value,
    family_of,
    new_projection,
    weight_view,
)
from lmcompress.config import MAX_BLOCKS, MAX_HEADS, MAX_WIDTH, BlockShape, Structure
from lmcompress.errors import CheckpointError, LmcompressError


def structure_of(model: PreTrainedModel) -> Structure:
    """The shapes that a model has now.

    Args:
        model: of a known family, on any device.
    """
    blocks = anatomy_of(model).blocks
    return Structure(
        head_size=blocks[0].head_size, blocks=tuple(BlockShape(heads=b.num_heads, ffn=b.ffn_width) for b in blocks)
    )


def stock_structure(config: PretrainedConfig) -> Structure:
    """The shapes that a stock model built from ``config`` would have.

    Args:
        config: a stock config of a known family.

    Raises:
        CheckpointError: it asks for no blocks or for absurdly many, or for sizes that no model has.
    """
    family = family_of(config)
    heads = config_value(config, family, "num_heads")
    hidden = config_value(config, family, "hidden_size")
    # GPT-2 leaves n_inner unset for the usual four times the width
    ffn = config_value(config, family, "intermediate_size") or 4 * hidden
    layers = config_value(config, family, "num_layers")
    for what, size, limit in (
        ("layers", layers, MAX_BLOCKS),
        ("attention heads", heads, MAX_HEADS),
        ("as hidden size", hidden, MAX_WIDTH),
        ("as FFN width", ffn, MAX_WIDTH),
    ):
        if not isinstance(size, int) or not 1 <= size <= limit:
            raise CheckpointError(f"config.json says {size} {what}; a model has 1 to {limit}")
    if hidden % heads:
        raise CheckpointError(
            f"config.json says a hidden size of {hidden}, which {heads} attention heads do not divide"
        )
    return Structure(head_size=hidden // heads, blocks=(BlockShape(heads=heads, ffn=ffn),) * layers)


def why_not_vanilla(structure: Structure, config: PretrainedConfig) -> str | None:
    """Why a stock config cannot express these shapes, or None where it can.

    A stock config has one head count, which must be the hidden size over the head size, and one FFN width. The number
    of blocks is free, and so is the FFN width as long as it is the same everywhere.

    Args:
        structure: the shapes wanted.
        config: the stock config of the model.

    Returns:
        One clause that names the obstacle and the nearest shape without it; None if there is no obstacle.
    """
    family = family_of(config)
    hidden, heads = config_value(config, family, "hidden_size"), config_value(config, family, "num_heads")
    full = hidden // structure.head_size
    counts = [block.heads for block in structure.blocks]
    widths = [block.ffn for block in structure.blocks]
    if set(counts) != {full} or full != heads:
        return (
            f"{family.model_type} derives the size of a head from hidden size / heads, so every block needs all "
            f"{full} heads; here they have {counts}. Nearest that would do: {full} heads everywhere"
        )
    if len(set(widths)) > 1:
        return (
            f"a stock {family.model_type} has one FFN width for all blocks; here they are {widths}. "
            f"Nearest that would do: {max(widths)} everywhere"
        )
    return None


def set_stock_shapes(config: PretrainedConfig, structure: Structure) -> None:
    """Write into ``config`` what a stock config can say of the shapes: number of blocks and, if uniform, FFN width.

    Args:
        config: changed in place.
        structure: the shapes of the model.
    """
    family = family_of(config)
    setattr(config, family.num_layers, len(structure.blocks))
    widths = {block.ffn for block in structure.blocks}
    if len(widths) == 1:
        setattr(config, family.intermediate_size, widths.pop())


def shape_skeleton(model: PreTrainedModel, structure: Structure) -> None:
    """Give a freshly built model the shapes of ``structure``; the new matrices have no values yet.

    Args:
        model: changed in place; usually on ``meta``, where nothing is allocated.
        structure: as a checkpoint's config names it.

    Raises:
        CheckpointError: the number of blocks or the head size is not the model's.
    """
    blocks = anatomy_of(model).blocks
    if len(blocks) != len(structure.blocks):
        raise CheckpointError(
            f"config.json says {len(blocks)} layers, quantization_config.structure describes {len(structure.blocks)} "
            "blocks: the config is damaged; load the checkpoint as it was written"
        )
    if blocks and blocks[0].head_size != structure.head_size:
        raise CheckpointError(
            f"config.json makes heads of {blocks[0].head_size}, quantization_config.structure of "
            f"{structure.head_size}: the config is damaged; load the checkpoint as it was written"
        )
    for block, shape in zip(blocks, structure.blocks, strict=True):
        _shape_block(block, shape)


def _shape_block(block: Block, shape: BlockShape) -> None:
    if shape.heads != block.num_heads:
        width = shape.heads * block.head_size
        hidden = weight_view(block.get("attention_out")).shape[0]
        for part, parallel in (("qkv", 3), ("query", 1), ("key", 1), ("value", 1)):
            if getattr(block.family, part):
                old = block.get(part)
                block.replace(part, new_projection(old, in_width=weight_view(old).shape[1], out_width=parallel * width))
        block.replace("attention_out", new_projection(block.get("attention_out"), in_width=width, out_width=hidden))
        block.set_heads(shape.heads)
    if shape.ffn != block.ffn_width:
        old_in, old_out = block.get("ffn_in"), block.get("ffn_out")
        block.replace("ffn_in", new_projection(old_in, in_width=weight_view(old_in).shape[1], out_width=shape.ffn))
        block.replace("ffn_out", new_projection(old_out, in_width=shape.ffn, out_width=weight_view(old_out).shape[0]))


def keep_heads(block: Block, heads: Sequence[int]) -> None:
    """Cut a block's attention down to the given heads.

    Args:
        block: changed in place.
        heads: numbers of the heads that stay, counted from 0 as they are now; at least one.

    Raises:
        LmcompressError: no head is left, one is named twice, or one is not there.
    """
    keep = _indices(heads, block.num_heads, "heads")
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


def keep_neurons(block: Block, neurons: Sequence[int]) -> None:
    """Cut a block's feed-forward network down to the given neurons.

    Args:
        block: changed in place.
        neurons: numbers of the neurons that stay, counted from 0; at least one.

    Raises:
        LmcompressError: none is left, one is named twice, or one is not there.
    """
    keep = _indices(neurons, block.ffn_width, "neurons")
    block.replace("ffn_in", _slice(block.get("ffn_in"), out=keep))
    block.replace("ffn_out", _slice(block.get("ffn_out"), into=keep))


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Cut a model down to the given blocks, in the order given, and say so in its config.

    Args:
        model: changed in place.
        layers: numbers of the blocks that stay, counted from 0; at least one.

    Raises:
        LmcompressError: none is left, one is named twice, or one is not there.
    """
    anatomy = anatomy_of(model)
    keep = _indices(layers, len(anatomy.block_list), "layers")
    parent, _, name = anatomy.family.blocks.rpartition(".")
    kept = nn.ModuleList([anatomy.block_list[i] for i in keep.tolist()])
    setattr(anatomy.base.get_submodule(parent), name, kept)
    for index, block in enumerate(anatomy.blocks):
        block.set_index(index)
    setattr(model.config, anatomy.family.num_layers, len(kept))


def _indices(wanted: Sequence[int], available: int, what: str) -> torch.Tensor:
    if not wanted or len(set(wanted)) != len(wanted) or min(wanted) < 0 or max(wanted) >= available:
        raise LmcompressError(
            f"{what} to keep must be at least one number in [0, {available - 1}], none twice; got {list(wanted)}"
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
            new.get_parameter("bias").copy_(bias if out is None else bias[out.to(device)])
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(old.get_parameter(name).requires_grad)
    return new.train(old.training)
