"""Shapes of a model: reading them, recording them in a config, giving them to a skeleton."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, PreTrainedModel

from lmcompress.checkpoint.config import recorded_compression
from lmcompress.checkpoint.schema import MAX_BLOCKS, MAX_HEADS, MAX_WIDTH, BlockShape, Structure
from lmcompress.errors import CheckpointError
from lmcompress.families import BLOCK_PARTS, FAMILIES, Family, anatomy_of, config_value, family_of, is_described
from lmcompress.families.shaping import shape_model


def structure_of(model: PreTrainedModel) -> Structure:
    """The current shapes of a model.

    Args:
        model: a model of a known family, on any device.
    """
    anatomy = anatomy_of(model)
    blocks = anatomy.blocks
    stock = config_value(model.config, anatomy.family, "hidden_size")
    return Structure(
        head_size=blocks[0].head_size,
        blocks=tuple(BlockShape(heads=b.num_heads, ffn=b.ffn_width) for b in blocks),
        hidden=anatomy.hidden_size if anatomy.hidden_size != stock else None,
        queries=blocks[0].queries,
        encoder=anatomy.starts[1] if anatomy.reads_encoder else None,
    )


def same_shapes(one: Structure, other: Structure) -> bool:
    """Whether two structures differ at most in the origin of their blocks.

    Args:
        one: a structure.
        other: the structure to compare with.
    """
    compared = [
        (
            (shapes.head_size, shapes.queries, shapes.hidden, shapes.encoder),
            [(block.heads, block.ffn) for block in shapes.blocks],
        )
        for shapes in (one, other)
    ]
    return compared[0] == compared[1]


def recorded_structure(model: PreTrainedModel) -> Structure:
    """The current shapes of a model, with the source numbers of its blocks where its config records them.

    Args:
        model: a model of a known family.
    """
    structure = structure_of(model)
    recorded = recorded_compression(model.config)
    if recorded is not None and recorded.structure is not None and same_shapes(recorded.structure, structure):
        return recorded.structure
    return structure


def stated_structure(model: PreTrainedModel) -> Structure | None:
    """The shapes that a model's config must record; its stock config is updated as far as possible.

    Args:
        model: any model; its config is modified in place.

    Returns:
        None if the stock config expresses all shapes, as that of a family does which is not described and so never cut.
    """
    if not is_described(model):
        return None
    structure = recorded_structure(model)
    set_stock_shapes(model.config, structure)
    return unless_stock(structure, model.config)


def unless_stock(structure: Structure, config: PretrainedConfig) -> Structure | None:
    """The shapes, or None if a stock config expresses all of them.

    Args:
        structure: structure of a model, with source numbers of its blocks where known.
        config: the stock config of the model.
    """
    cut = any(block.source is not None for block in structure.blocks)
    return structure if cut or why_not_vanilla(structure, config) is not None else None


def stock_structure(config: PretrainedConfig) -> Structure:
    """The shapes that a stock model built from ``config`` would have.

    Args:
        config: a stock config of a known family.

    Raises:
        CheckpointError: If it has no blocks, or implausible numbers or sizes.
    """
    first, *others = [_stock_stack(config, stack) for stack in family_of(config).stacks]
    for other in others:
        if (first.head_size, first.queries) != (other.head_size, other.queries):
            raise CheckpointError(
                f"config.json makes heads of {first.head_size} in the encoder and of {other.head_size} in the decoder, "
                "which must be of one size"
            )
        first = first.model_copy(update={"blocks": first.blocks + other.blocks, "encoder": len(first.blocks)})
    return first


def _stock_stack(config: PretrainedConfig, family: Family) -> Structure:
    """The shapes of one stack."""
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
    size = config_value(config, family, "head_size") if family.head_size else None
    if size is None and hidden % heads:
        raise CheckpointError(
            f"config.json says a hidden size of {hidden}, which {heads} attention heads do not divide"
        )
    keys = config_value(config, family, "key_value_heads") if family.key_value_heads else None
    keys = heads if keys is None else keys
    if not isinstance(keys, int) or not 1 <= keys <= heads or heads % keys:
        raise CheckpointError(f"config.json says {keys} key/value heads, which must divide {heads} attention heads")
    shape = BlockShape(heads=keys, ffn=ffn)
    return Structure(head_size=size or hidden // heads, blocks=(shape,) * layers, queries=heads // keys)


def why_not_vanilla(structure: Structure, config: PretrainedConfig) -> str | None:
    """Why these shapes are not expressible in a stock config, or None if they are.

    A stock config has one head count, one FFN width and one hidden size, which must be the head count times the head
    size. The number of blocks is free, and so is the FFN width as long as it is the same everywhere.

    Args:
        structure: the desired shapes.
        config: the stock config of the model.

    Returns:
        One clause that names the obstacle and the nearest shape without it; None if there is none.
    """
    family = family_of(config)
    stock = config_value(config, family, "hidden_size")
    hidden = structure.hidden or stock
    # stacks whose config has one field for both are alike
    fields: dict[str, list[int]] = {}
    for stack, blocks in zip(family.stacks, structure.stacks, strict=True):
        fields.setdefault(stack.intermediate_size, []).extend(block.ffn for block in blocks)
    uneven = next((widths for widths in fields.values() if len(set(widths)) > 1), None)
    if (obstacle := _obstacle_of_heads(structure, config)) is not None:
        return obstacle
    if uneven is not None:
        return (
            f"a stock {family.model_type} has one FFN width for all blocks; here they are {uneven}. "
            f"Nearest that is expressible: {max(uneven)} everywhere"
        )
    if any(block.ffn == 0 for block in structure.blocks):
        return f"a stock {family.model_type} has no FFN of width 0. Nearest that is expressible: 1 everywhere"
    if hidden != stock and _loses_projection(config, hidden):
        narrower = hidden - structure.head_size or stock
        return (
            f"a stock {family.model_type} has no projection of its embeddings where they are as wide as the hidden "
            f"size, {hidden}, and this model has one. Nearest expressible: a hidden size of {narrower} "
            f"with {narrower // structure.head_size} heads everywhere"
        )
    if hidden != stock and family.stream_scaled:
        return (
            f"a stock {family.model_type} multiplies its embeddings by a function of the hidden size, so that one of "
            f"{hidden} in place of {stock} would compute something else. Nearest that is expressible: {stock}"
        )
    return None


def _obstacle_of_heads(structure: Structure, config: PretrainedConfig) -> str | None:
    """Why a stock config cannot express these heads beside this hidden size, or None."""
    family = family_of(config)
    stock = config_value(config, family, "hidden_size")
    hidden, size = structure.hidden or stock, structure.head_size
    counts = [block.heads for block in structure.blocks]
    if family.head_size:
        # the config names the size of a head: any number of them will do, if it is the same everywhere
        full = max(counts)
        if set(counts) != {full} or not full:
            return (
                f"a stock {family.model_type} has one number of heads for all blocks; here they have {counts}. "
                f"Nearest that is expressible: {max(full, 1)} heads everywhere"
            )
        if not _accepted(config, _stated_heads(config, structure)):
            return (
                f"the config of {family.model_type} refuses {full * structure.queries} heads beside a hidden size of "
                f"{hidden}, which they must divide. Nearest that is expressible: the heads or the size before pruning"
            )
        return None
    width = size * structure.queries
    full = hidden // width
    if hidden % width:
        near = [n * width for n in (full, full + 1) if n and n * width <= stock]
        return (
            f"{family.model_type} derives the size of a head from hidden size / heads, and heads of {width} do not "
            f"divide a hidden size of {hidden}. Nearest that is expressible: a hidden size of "
            f"{' or '.join(f'{n} with {n // width} heads everywhere' for n in near)}"
        )
    if set(counts) != {full}:
        return (
            f"{family.model_type} derives the size of a head from hidden size / heads, so every block needs all "
            f"{full} heads; here they have {counts}. Nearest that is expressible: {full} heads everywhere"
        )
    return None


def _stated_heads(config: PretrainedConfig, structure: Structure) -> dict[str, int]:
    """Heads and hidden size as the config states them in a family whose config names the size of a head."""
    family = family_of(config)
    heads = max(block.heads for block in structure.blocks)
    fields = {
        family.num_heads: heads * structure.queries,
        family.head_size: structure.head_size,
        family.hidden_size: structure.hidden or config_value(config, family, "hidden_size"),
    }
    return fields | ({family.key_value_heads: heads} if family.key_value_heads else {})


def _accepted(config: PretrainedConfig, fields: Mapping[str, int]) -> bool:
    """Whether a config of this class may have these values: some refuse a width that heads do not divide."""
    trial = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(trial, name, value)
    try:
        trial.validate()
    except (StrictDataclassError, ValueError):
        return False
    return True


def set_stock_shapes(config: PretrainedConfig, structure: Structure) -> None:
    """Write into ``config`` the shapes that a stock config can express.

    That is the number of blocks; the FFN width, if it is the same everywhere; and hidden size and number of heads, if
    all blocks have as many heads as the hidden size over the head size. A hidden size that it cannot express stays as
    it was: the skeleton is built from it, and cut down to ``structure.hidden``.

    Args:
        config: modified in place.
        structure: the shapes of the model, with this config as it is.
    """
    family = family_of(config)
    stock = config_value(config, family, "hidden_size")
    hidden = structure.hidden or stock
    fields: dict[str, set[int]] = {}
    for stack, blocks in zip(family.stacks, structure.stacks, strict=True):
        setattr(config, stack.num_layers, len(blocks))
        fields.setdefault(stack.intermediate_size, set()).update(block.ffn for block in blocks)
    for name, widths in fields.items():
        if len(widths) == 1 and 0 not in widths:
            setattr(config, name, widths.pop())
        elif getattr(config, name) is None:
            # GPT-2's None follows the hidden size
            setattr(config, name, 4 * stock)
    heads = {block.heads for block in structure.blocks}
    if family.stream_scaled and hidden != stock:
        return
    if family.head_size:
        stated = _stated_heads(config, structure)
        if len(heads) == 1 and 0 not in heads and _accepted(config, stated):
            for name, value in stated.items():
                setattr(config, name, value)
        return
    whole = len(heads) == 1 and hidden == structure.head_width * max(heads)
    if hidden != stock and whole and not _loses_projection(config, hidden):
        if family.embedding_size and config_value(config, family, "embedding_size") == stock:
            setattr(config, family.embedding_size, hidden)
        setattr(config, family.hidden_size, hidden)
        for stack in family.stacks:
            setattr(config, stack.num_heads, max(heads) * structure.queries)


def _loses_projection(config: PretrainedConfig, hidden: int) -> bool:
    """Whether a stock model of this hidden size would lack the projection that the model of ``config`` has."""
    family = family_of(config)
    stock = config_value(config, family, "hidden_size")
    return bool(family.embedding_size) and config_value(config, family, "embedding_size") == hidden != stock


def shape_skeleton(model: PreTrainedModel, structure: Structure) -> None:
    """Give a newly built model the shapes of ``structure``; the new matrices have no values yet.

    Args:
        model: modified in place; usually on ``meta``, where nothing is allocated.
        structure: structure in a checkpoint's config.

    Raises:
        CheckpointError: If the number of blocks or the head size is not the model's, or the hidden size is greater.
    """
    blocks = anatomy_of(model).blocks
    _check_number(len(blocks), structure)
    if blocks and blocks[0].head_size != structure.head_size:
        raise CheckpointError(
            f"config.json makes heads of {blocks[0].head_size}, quantization_config.structure of "
            f"{structure.head_size}: the config is damaged; load the checkpoint as it was written"
        )
    if blocks and blocks[0].queries != structure.queries:
        raise CheckpointError(
            f"config.json gives each key {blocks[0].queries} query heads, quantization_config.structure "
            f"{structure.queries}: the config is damaged; load the checkpoint as it was written"
        )
    hidden = anatomy_of(model).hidden_size
    if structure.hidden is not None and structure.hidden > hidden:
        raise CheckpointError(
            f"config.json says a hidden size of {hidden}, quantization_config.structure of {structure.hidden}, which "
            "must not be greater: the config is damaged; load the checkpoint as it was written"
        )
    shapes = structure.model_dump()
    shapes["hidden"] = None if structure.hidden == hidden else structure.hidden
    family = anatomy_of(model).family
    shape_model(model, shapes, paths_of(family), HEAD_ATTRIBUTES[family.model_type])


def check_config(config: PretrainedConfig, structure: Structure | None) -> None:
    """Refuse a config whose stock model alone would take forever to build, or has not the blocks described.

    Args:
        config: config of a model, before any is built from it; of a family that is not described, only the structure
            is refused.
        structure: structure in the checkpoint's config, or None.

    Raises:
        CheckpointError: If it has implausible numbers or sizes, or another number of blocks.
    """
    if structure is None and config.model_type not in FAMILIES:
        return
    stock = stock_structure(config)
    if structure is not None:
        _check_number(len(stock.blocks), structure)
        if stock.encoder != structure.encoder:
            raise CheckpointError(
                f"config.json says {stock.encoder} blocks of an encoder, quantization_config.structure "
                f"{structure.encoder}: the config is damaged; load the checkpoint as it was written"
            )


def _check_number(layers: int, structure: Structure) -> None:
    if layers != len(structure.blocks):
        raise CheckpointError(
            f"config.json says {layers} layers, quantization_config.structure describes {len(structure.blocks)} "
            "blocks: the config is damaged; load the checkpoint as it was written"
        )


def _head_attributes(family: Family) -> dict[str, tuple[int, int]]:
    one, two = family.head_attributes(1, 1), family.head_attributes(1, 2)
    return {name: (2 * one[name] - two[name], two[name] - one[name]) for name in one}


_PARTS = (
    "blocks", "attention", *BLOCK_PARTS, "qkv_interleaved", "ffn_in_copies", "attention_tail",
    "heads_in_config", "hidden_size", "embedding_size", "num_layers", "per_layer", "pooler", "word_embeddings",
)  # fmt: skip


def paths_of(family: Family) -> dict[str, Any]:
    """What :func:`~lmcompress.families.shaping.shape_model` needs to know of a family.

    Args:
        family: the description.

    Returns:
        Its fields by name; ``decoder`` has those of a second stack.
    """
    decoder = {} if family.decoder is None else {"decoder": paths_of(family.decoder)}
    return {part: getattr(family, part) for part in _PARTS} | decoder


PATHS = {name: paths_of(family) for name, family in FAMILIES.items()}
"""Per family: what :func:`~lmcompress.families.shaping.shape_model` needs to know of it."""

HEAD_ATTRIBUTES = {name: _head_attributes(family) for name, family in FAMILIES.items()}
"""Per family: attributes of the attention module as (a, b), for a * heads + b * heads * head size."""


def register(family: Family) -> None:
    """Let a family be known until the process ends, or until :func:`forget`.

    Args:
        family: its description; one of the same model type is replaced.
    """
    name = family.model_type
    FAMILIES[name] = family
    PATHS[name] = paths_of(family)
    HEAD_ATTRIBUTES[name] = _head_attributes(family)


def forget(model_type: str) -> None:
    """Undo :func:`register`.

    Args:
        model_type: of the family.
    """
    FAMILIES.pop(model_type, None)
    PATHS.pop(model_type, None)
    HEAD_ATTRIBUTES.pop(model_type, None)
