"""Shapes of a model: reading them, giving them to a skeleton, cutting weights down to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lmcompress.checkpoint.config import MAX_BLOCKS, MAX_HEADS, MAX_WIDTH, BlockShape, Structure, recorded_compression
from lmcompress.errors import CheckpointError, LmcompressError
from lmcompress.families import (
    Block,
    anatomy_of,
    config_value,
    family_of,
    narrow_stream,
    new_projection,
    stream_axes,
    weight_view,
)
from lmcompress.families.narrow import accompany, companion_of
from lmcompress.families.tied_blocks import shared_sources
from lmcompress.nn import Compact


def structure_of(model: PreTrainedModel) -> Structure:
    """The shapes that a model has now.

    Args:
        model: of a known family, on any device.
    """
    anatomy = anatomy_of(model)
    blocks = anatomy.blocks
    stock = config_value(model.config, anatomy.family, "hidden_size")
    return Structure(
        head_size=blocks[0].head_size,
        blocks=tuple(BlockShape(heads=b.num_heads, ffn=b.ffn_width) for b in blocks),
        hidden=anatomy.hidden_size if anatomy.hidden_size != stock else None,
    )


def same_shapes(one: Structure, other: Structure) -> bool:
    """Whether two structures differ at most in where their blocks came from.

    Args:
        one: some shapes.
        other: those they are compared with.
    """
    bare = [
        (shapes.head_size, shapes.hidden, [(block.heads, block.ffn) for block in shapes.blocks])
        for shapes in (one, other)
    ]
    return bare[0] == bare[1]


def recorded_structure(model: PreTrainedModel) -> Structure:
    """The shapes of a model now, with the numbers of the blocks it was cut from where its config knows them.

    Args:
        model: of a known family.
    """
    structure = structure_of(model)
    recorded = recorded_compression(model.config)
    if recorded is not None and recorded.structure is not None and same_shapes(recorded.structure, structure):
        return recorded.structure
    return structure


def stated_structure(model: PreTrainedModel) -> Structure | None:
    """The shapes of a model as far as its config must name them; its stock config is made to say what it can.

    Args:
        model: of a known family; its config is changed in place.

    Returns:
        None where the stock config says all.
    """
    structure = recorded_structure(model)
    set_stock_shapes(model.config, structure)
    stock = why_not_vanilla(structure, model.config) is None and all(block.source is None for block in structure.blocks)
    return None if stock else structure


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

    A stock config has one head count, one FFN width and one hidden size, which must be the head count times the head
    size. The number of blocks is free, and so is the FFN width as long as it is the same everywhere.

    Args:
        structure: the shapes wanted.
        config: the stock config of the model.

    Returns:
        One clause that names the obstacle and the nearest shape without it; None if there is no obstacle.
    """
    family = family_of(config)
    stock = config_value(config, family, "hidden_size")
    hidden, size = structure.hidden or stock, structure.head_size
    counts = [block.heads for block in structure.blocks]
    widths = [block.ffn for block in structure.blocks]
    full = hidden // size
    if hidden % size:
        near = [n * size for n in (full, full + 1) if n and n * size <= stock]
        return (
            f"{family.model_type} derives the size of a head from hidden size / heads, and heads of {size} do not "
            f"divide a hidden size of {hidden}. Nearest that would do: a hidden size of "
            f"{' or '.join(f'{n} with {n // size} heads everywhere' for n in near)}"
        )
    if set(counts) != {full}:
        return (
            f"{family.model_type} derives the size of a head from hidden size / heads, so every block needs all "
            f"{full} heads; here they have {counts}. Nearest that would do: {full} heads everywhere"
        )
    if len(set(widths)) > 1:
        return (
            f"a stock {family.model_type} has one FFN width for all blocks; here they are {widths}. "
            f"Nearest that would do: {max(widths)} everywhere"
        )
    if 0 in widths:
        return f"a stock {family.model_type} has no FFN of width 0. Nearest that would do: 1 everywhere"
    if hidden != stock and _loses_projection(config, hidden):
        return (
            f"a stock {family.model_type} has no projection of its embeddings where they are as wide as the hidden "
            f"size, {hidden}, and this model has one. Nearest that would do: a hidden size of {hidden - size or stock} "
            f"with {(hidden - size or stock) // size} heads everywhere"
        )
    return None


def set_stock_shapes(config: PretrainedConfig, structure: Structure) -> None:
    """Write into ``config`` what a stock config can say of the shapes.

    That is the number of blocks; the FFN width, if it is the same everywhere; and hidden size and number of heads, if
    all blocks have as many heads as the hidden size over the head size. A hidden size that it cannot say stays as it
    was: the skeleton is built from it, and cut down to ``structure.hidden``.

    Args:
        config: changed in place.
        structure: the shapes of the model, with this config as it is.
    """
    family = family_of(config)
    stock = config_value(config, family, "hidden_size")
    hidden = structure.hidden or stock
    setattr(config, family.num_layers, len(structure.blocks))
    widths = {block.ffn for block in structure.blocks}
    if len(widths) == 1 and 0 not in widths:
        setattr(config, family.intermediate_size, widths.pop())
    elif config_value(config, family, "intermediate_size") is None:
        # GPT-2's None follows the hidden size
        setattr(config, family.intermediate_size, 4 * stock)
    heads = {block.heads for block in structure.blocks}
    whole = len(heads) == 1 and hidden == structure.head_size * max(heads)
    if hidden != stock and whole and not _loses_projection(config, hidden):
        if getattr(config, "embedding_size", None) == stock:
            config.embedding_size = hidden
        setattr(config, family.hidden_size, hidden)
        setattr(config, family.num_heads, heads.pop())


def _loses_projection(config: PretrainedConfig, hidden: int) -> bool:
    """Whether a stock model of this hidden size would lack the projection that the model of ``config`` has."""
    stock = config_value(config, family_of(config), "hidden_size")
    return bool(getattr(config, "embedding_size", stock) == hidden != stock)


def shape_skeleton(model: PreTrainedModel, structure: Structure) -> None:
    """Give a freshly built model the shapes of ``structure``; the new matrices have no values yet.

    Args:
        model: changed in place; usually on ``meta``, where nothing is allocated.
        structure: as a checkpoint's config names it.

    Raises:
        CheckpointError: the number of blocks or the head size is not the model's, or the hidden size is greater.
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
    hidden = anatomy_of(model).hidden_size
    if structure.hidden is not None and structure.hidden > hidden:
        raise CheckpointError(
            f"config.json says a hidden size of {hidden}, quantization_config.structure of {structure.hidden}, which "
            "must not be greater: the config is damaged; load the checkpoint as it was written"
        )
    for block, shape in zip(blocks, structure.blocks, strict=True):
        _shape_block(block, shape)
    if structure.hidden is not None and structure.hidden != hidden:
        keep_hidden(model, range(structure.hidden))


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
        heads: numbers of the heads that stay, counted from 0 as they are now; at least one, as a block that loses them
            all is asked for by :func:`drop_heads`.

    Raises:
        LmcompressError: no head is left, one is named twice, or one is not there.
    """
    _cut_heads(block, _indices(heads, block.num_heads, "heads"))


def drop_heads(block: Block) -> None:
    """Take all heads out of a block; its attention then answers with the bias of its output projection.

    Args:
        block: changed in place.
    """
    _cut_heads(block, torch.empty(0, dtype=torch.long))


def keep_neurons(block: Block, neurons: Sequence[int]) -> None:
    """Cut a block's feed-forward network down to the given neurons.

    Args:
        block: changed in place.
        neurons: numbers of the neurons that stay, counted from 0; at least one, as a block that loses them all is
            asked for by :func:`drop_neurons`.

    Raises:
        LmcompressError: none is left, one is named twice, or one is not there.
    """
    _cut_neurons(block, _indices(neurons, block.ffn_width, "neurons"))


def drop_neurons(block: Block) -> None:
    """Take all neurons out of a block; its feed-forward network then answers with the bias of its second matrix.

    Args:
        block: changed in place.
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
    """Cut a model down to the given blocks, in the order given, and say so in its config.

    Args:
        model: changed in place.
        layers: numbers of the blocks that stay, counted from 0; at least one.

    Raises:
        LmcompressError: none is left, one is named twice, or one is not there; or blocks share their parameters.
    """
    anatomy = anatomy_of(model)
    if len(set(shared_sources(list(anatomy.block_list)))) < len(anatomy.block_list):
        raise LmcompressError(
            "cannot take blocks out of a model whose blocks share their parameters: choose the blocks first, and let "
            "those that are left share"
        )
    keep = _indices(layers, len(anatomy.block_list), "layers")
    parent, _, name = anatomy.family.blocks.rpartition(".")
    kept = nn.ModuleList([anatomy.block_list[i] for i in keep.tolist()])
    setattr(anatomy.base.get_submodule(parent), name, kept)
    for index, block in enumerate(anatomy.blocks):
        block.set_index(index)
    setattr(model.config, anatomy.family.num_layers, len(kept))


def keep_hidden(model: PreTrainedModel, dimensions: Sequence[int]) -> None:
    """Cut the residual stream down to the given dimensions, everywhere that the hidden size of the config reaches.

    That is embeddings, norms, every matrix that reads or writes the stream, and what the task's head has of the same
    width: a pooler, the transform of a masked language model. Tied tensors stay tied. The config is left alone: where
    the heads of the stock skeleton still fill its hidden size, nothing else builds that skeleton
    (:func:`set_stock_shapes` writes the new one where it can).

    Args:
        model: changed in place.
        dimensions: numbers of the dimensions that stay, counted from 0; at least one.

    Raises:
        LmcompressError: none is left, one is named twice, or one is not there; or the model has parameters that a
            stock model of its class has not, of which nobody knows whether they follow the hidden size.
    """
    keep = _indices(dimensions, anatomy_of(model).hidden_size, "hidden dimensions")
    narrow_stream(model, {name: axes for name, (_, axes) in hidden_axes(model).items()}, keep)


def hidden_axes(model: PreTrainedModel) -> dict[str, tuple[nn.Parameter, tuple[int, ...]]]:
    """Which axes of which parameters are as wide as the residual stream.

    Args:
        model: of a known family, with or without a head, of whatever shapes.

    Returns:
        By name, tied parameters under each of their names: the parameter, and its axes as it is stored; none where the
        parameter has nothing to do with the stream.

    Raises:
        LmcompressError: the model has parameters that a stock model of its class has not.
    """
    if any(isinstance(module, Compact) for module in model.modules()):
        raise LmcompressError(
            "cannot tell what follows the hidden size in a model that has compact layers: prune the dense model first, "
            "and make what is left compact"
        )
    axes = stream_axes(model, vars(anatomy_of(model).family))
    for name, found in axes.items():
        if found is None:
            raise LmcompressError(
                f"a stock {type(model).__name__} has no parameter {name}, so nobody knows whether it follows the "
                "hidden size. Prune hidden dimensions before adding modules, or prune other parts"
            )
    return {name: (parameter, axes[name] or ()) for name, parameter in model.named_parameters(remove_duplicate=False)}


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
            assert isinstance(new.bias, torch.Tensor)
            new.bias.copy_(bias if out is None else bias[out.to(device)])
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(getattr(old, name).requires_grad)
    companion = companion_of(old)
    if companion is not None:
        accompany(new, companion if out is None else companion.rows(out))
    return new.train(old.training)
