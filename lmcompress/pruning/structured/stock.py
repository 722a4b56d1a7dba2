"""Whether a shape loads with stock Transformers."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from lmcompress.checkpoint.schema import BlockShape, Structure
from lmcompress.checkpoint.structure import why_not_vanilla
from lmcompress.families import config_value, family_of


@dataclass(frozen=True)
class StockVerdict:
    """Whether a shape loads with stock Transformers, without lmcompress.

    Attributes:
        loads: whether it does.
        reason: why not, in one clause; None if it does.
        nearest: the shape with the smallest additions that would; the shape itself if it does.
    """

    loads: bool
    reason: str | None
    nearest: Structure


def stock_verdict(structure: Structure, config: PretrainedConfig) -> StockVerdict:
    """Whether stock Transformers can load a model of these shapes; for checks before training.

    Args:
        structure: the desired shapes.
        config: the stock config of the model to cut.
    """
    family = family_of(config)
    hidden = structure.hidden or int(config_value(config, family, "hidden_size"))
    reason = why_not_vanilla(structure, config)
    if reason is None:
        return StockVerdict(True, None, structure)
    if family.head_size:
        heads = max(1, *(block.heads for block in structure.blocks))
    else:
        # a stock config has hidden / heads as the size of a head, so the width goes up to a whole number of heads
        heads = -(-hidden // structure.head_width)
    width = max(1, *(block.ffn for block in structure.blocks))
    blocks = tuple(BlockShape(heads=heads, ffn=width, source=block.source) for block in structure.blocks)
    wider = None
    if structure.hidden is not None:
        wider = structure.hidden if family.head_size else heads * structure.head_width
    return StockVerdict(False, reason, structure.model_copy(update={"blocks": blocks, "hidden": wider}))
