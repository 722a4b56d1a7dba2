"""Shapes of a model: reading them, recording them in a config, giving them to a skeleton."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel

from lmcompress.checkpoint.config import recorded_compression
from lmcompress.checkpoint.schema import MAX_BLOCKS, MAX_HEADS, MAX_WIDTH, BlockShape, Structure
from lmcompress.errors import CheckpointError
from lmcompress.families import FAMILIES, Family, anatomy_of, config_value, family_of
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
    )


def same_shapes(one: Structure, other: Structure) -> bool:
    """Whether two structures differ at most in the origin of their blocks.

    Args:
        one: a structure.
        other: the structure to compare with.
    """
    compared = [
        (shapes.head_size, shapes.hidden, [(block.heads, block.ffn) for block in shapes.blocks])
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
        model: a model of a known family; its config is modified in place.

    Returns:
        None if the stock config expresses all shapes.
    """
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
    hidden, size = structure.hidden or stock, structure.head_size
    counts = [block.heads for block in structure.blocks]
    widths = [block.ffn for block in structure.blocks]
    full = hidden // size
    if hidden % size:
        near = [n * size for n in (full, full + 1) if n and n * size <= stock]
        return (
            f"{family.model_type} derives the size of a head from hidden size / heads, and heads of {size} do not "
            f"divide a hidden size of {hidden}. Nearest that is expressible: a hidden size of "
            f"{' or '.join(f'{n} with {n // size} heads everywhere' for n in near)}"
        )
    if set(counts) != {full}:
        return (
            f"{family.model_type} derives the size of a head from hidden size / heads, so every block needs all "
            f"{full} heads; here they have {counts}. Nearest that is expressible: {full} heads everywhere"
        )
    if len(set(widths)) > 1:
        return (
            f"a stock {family.model_type} has one FFN width for all blocks; here they are {widths}. "
            f"Nearest that is expressible: {max(widths)} everywhere"
        )
    if 0 in widths:
        return f"a stock {family.model_type} has no FFN of width 0. Nearest that is expressible: 1 everywhere"
    if hidden != stock and _loses_projection(config, hidden):
        return (
            f"a stock {family.model_type} has no projection of its embeddings where they are as wide as the hidden "
            f"size, {hidden}, and this model has one. Nearest expressible: a hidden size of {hidden - size or stock} "
            f"with {(hidden - size or stock) // size} heads everywhere"
        )
    return None


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
    """Give a newly built model the shapes of ``structure``; the new matrices have no values yet.

    Args:
        model: modified in place; usually on ``meta``, where nothing is allocated.
        structure: structure in a checkpoint's config.

    Raises:
        CheckpointError: If the number of blocks or the head size is not the model's, or the hidden size is greater.
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
    shapes = structure.model_dump()
    shapes["hidden"] = None if structure.hidden == hidden else structure.hidden
    shape_model(model, shapes, PATHS[model.config.model_type], HEAD_ATTRIBUTES[model.config.model_type])


def _head_attributes(family: Family) -> dict[str, tuple[int, int]]:
    one, two = family.head_attributes(1, 1), family.head_attributes(1, 2)
    return {name: (2 * one[name] - two[name], two[name] - one[name]) for name in one}


_PARTS = (
    "blocks", "attention", "query", "key", "value", "qkv", "attention_out", "ffn_in", "ffn_out", "attention_tail",
    "hidden_size", "num_layers",
)  # fmt: skip
PATHS = {name: {part: getattr(family, part) for part in _PARTS} for name, family in FAMILIES.items()}
"""Per family: what :func:`~lmcompress.families.shaping.shape_model` needs to know of it."""

HEAD_ATTRIBUTES = {name: _head_attributes(family) for name, family in FAMILIES.items()}
"""Per family: attributes of the attention module as (a, b), for a * heads + b * heads * head size."""
