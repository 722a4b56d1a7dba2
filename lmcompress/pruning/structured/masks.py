"""The effect of a mask on whole blocks."""

from __future__ import annotations

from torch import Tensor

from lmcompress.checkpoint.schema import Structure
from lmcompress.pruning.structured.units import Part, Units

_SUB_LAYERS: tuple[tuple[Part, Part], ...] = (("attention", "heads"), ("ffn", "neurons"))


def survivors(mask: Units, structure: Structure) -> list[int]:
    """Numbers, from 1, of the blocks that still compute something.

    Args:
        mask: bool, True is kept; heads and neurons may have one entry for all of a block.
        structure: structure of the model before it is cut.
    """

    def alive(sub_layer: Part, units: Part, index: int) -> bool:
        inner = mask.tensors(units)
        return _open(mask, index, sub_layer) and (not inner or bool(inner[index].any()))

    return [
        index + 1
        for index in range(len(structure.blocks))
        if _open(mask, index, "layers") and any(alive(*names, index) for names in _SUB_LAYERS)
    ]


def leaves_gaps(mask: Units) -> bool:
    """Whether a remaining sub-layer loses heads or neurons.

    Args:
        mask: bool, True is kept.
    """
    return any(
        _open(mask, index, "layers", sub_layer) and not bool(kept.all())
        for sub_layer, units in _SUB_LAYERS
        for index, kept in enumerate(mask.tensors(units))
    )


def kept_heads(mask: Units, structure: Structure) -> list[list[int]]:
    """Numbers of the remaining heads, for each block.

    Args:
        mask: bool, True is kept.
        structure: structure of the model before it is cut.
    """
    kept = []
    for index, block in enumerate(structure.blocks):
        heads = list(range(block.heads)) if mask.heads is None else mask.heads[index].nonzero().flatten().tolist()
        kept.append(heads if _open(mask, index, "layers", "attention") else [])
    return kept


def with_something(mask: Units) -> Units:
    """A mask that keeps the first layer and hidden dimension if noise has closed all: shapes must have some.

    Args:
        mask: bool.
    """
    changed: dict[str, Tensor] = {}
    for part in ("layers", "hidden"):
        tensors = mask.tensors(part)
        if tensors and not bool(tensors[0].any()):
            changed[part] = tensors[0].clone()
            changed[part][0] = True
    return mask.updated(**changed)


def _open(mask: Units, index: int, *parts: Part) -> bool:
    """Whether the gates of whole sub-layers or blocks are open at a block; those that a mask lacks are."""
    return all(bool(tensors[0][index]) for part in parts if (tensors := mask.tensors(part)))
