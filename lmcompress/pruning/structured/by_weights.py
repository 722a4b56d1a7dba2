"""Scores of units from their coupled weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcompress.checkpoint.cutting import hidden_axes
from lmcompress.families import Block, anatomy_of
from lmcompress.pruning.structured.groups import unit_views
from lmcompress.pruning.structured.registry import Criterion
from lmcompress.pruning.structured.units import Part, Units, assembled


def from_weights(model: PreTrainedModel, criterion: Criterion, parts: Sequence[Part]) -> Units:
    """Scores by a criterion that needs weights.

    Args:
        model: a model of a known family.
        criterion: called with the coupled weights of each tensor of units.
        parts: units to score.
    """
    return assembled(
        model,
        parts,
        {(part, index): criterion.function(group) for part in parts for index, group in _groups(model, part)},
    )


def _groups(model: PreTrainedModel, part: Part) -> Iterator[tuple[int, Tensor]]:
    """The coupled weights of a part's units as ``(units, weights)``; for sub-layers and blocks one row at a time."""
    blocks = anatomy_of(model).blocks
    if part == "hidden":
        pieces, seen = [], set()
        for parameter, axes in hidden_axes(model).values():
            if id(parameter) not in seen:
                pieces += [parameter.detach().movedim(axis, 0).reshape(parameter.shape[axis], -1) for axis in axes]
            seen.add(id(parameter))
        yield 0, torch.cat(pieces, dim=1)
        return
    for index, block in enumerate(blocks):
        if part == "heads" or part == "neurons":
            if block.num_heads if part == "heads" else block.ffn_width:
                views = unit_views(block, part)
                yield index, torch.cat([view.reshape(len(view), -1) for view in views], dim=1)
            continue
        parameters = [p.detach().flatten() for module in _modules(block, part) for p in module.parameters()]
        yield index, torch.cat(parameters)[None]


def _modules(block: Block, part: Part) -> list[nn.Module]:
    if part == "layers":
        return [block.module]
    return [block.get(coupled.part) for coupled in block.coupled("neurons" if part == "ffn" else "heads")]
