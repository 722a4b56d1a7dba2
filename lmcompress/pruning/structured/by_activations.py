"""Scores of units from activations, attention and the outputs of blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmcompress.activations.calibration import CalibrationData
from lmcompress.activations.hooks import Taps
from lmcompress.families import anatomy_of, weight_view
from lmcompress.nn.listening import Heard
from lmcompress.pruning.structured.registry import Criterion
from lmcompress.pruning.structured.units import Part, Units, assembled


class _Means:
    """Sums in float64 by key, and their counts."""

    def __init__(self) -> None:
        self.sums: dict[tuple[Part, int], Tensor] = {}
        self.counts: dict[tuple[Part, int], float] = {}

    def add(self, key: tuple[Part, int], total: Tensor, count: float) -> None:
        value = total.detach().double().cpu()
        self.sums[key] = self.sums[key] + value if key in self.sums else value
        self.counts[key] = self.counts.get(key, 0.0) + count

    def means(self) -> dict[tuple[Part, int], Tensor]:
        return {key: total / max(self.counts[key], 1e-300) for key, total in self.sums.items()}


def from_activations(
    model: PreTrainedModel, criterion: Criterion, parts: Sequence[Part], data: CalibrationData
) -> Units:
    """Scores by a criterion that needs activations, attention, or inputs and outputs of blocks.

    Args:
        model: a model of a known family, in evaluation mode.
        criterion: called with activations of valid tokens.
        parts: units to score.
        data: calibration data.
    """
    means = _Means()
    pooled: dict[tuple[Part, int], list[Tensor]] = {}
    with Taps(model) as taps:
        for part in parts:
            if criterion.needs == "attention":
                _tap_attention(taps, criterion, means)
            elif criterion.needs == "blocks":
                _tap_blocks(taps, criterion, means)
            else:
                _tap_activations(taps, part, _feed(taps, criterion, means, pooled))
        for batch in data:
            taps.run(batch)
    values = means.means()
    if criterion.needs == "pooled":
        values = {key: criterion.function(torch.cat(rows)) for key, rows in pooled.items()}
    if criterion.needs == "norms":
        values = {key: _summed_columns(model, criterion, key, squares.sqrt()) for key, squares in values.items()}
    if criterion.flip:
        values = {key: 1 - value for key, value in values.items()}
    return assembled(model, parts, values)


Feed = Callable[[tuple[Part, int], Tensor], None]
"""``(key, activations (rows, length, units[, size]))``."""


def _feed(taps: Taps, criterion: Criterion, means: _Means, pooled: dict[tuple[Part, int], list[Tensor]]) -> Feed:
    def tokenwise(key: tuple[Part, int], values: Tensor) -> None:
        tokens = taps.tokens(values)
        means.add(key, criterion.function(tokens).double() * len(tokens), len(tokens))

    def by_example(key: tuple[Part, int], values: Tensor) -> None:
        sizes = values.float() if values.dim() == 3 else values.float().square().sum(dim=-1).sqrt()
        mask = taps.mask[..., None]
        pool = torch.where(mask, sizes, 0).sum(dim=1) / mask.sum(dim=1)
        pooled.setdefault(key, []).append(pool.cpu())

    def squares(key: tuple[Part, int], values: Tensor) -> None:
        tokens = taps.tokens(values).double().flatten(1)
        means.add(key, tokens.square().sum(dim=0), len(tokens))

    feeds: dict[str, Feed] = {"activations": tokenwise, "pooled": by_example, "norms": squares}
    return feeds[criterion.needs]


def _tap_activations(taps: Taps, part: Part, feed: Feed) -> None:
    def vectors(index: int, size: int, x: Tensor) -> None:
        feed(("heads", index), x.unflatten(-1, (-1, size)))

    for index, block in enumerate(anatomy_of(taps.model).blocks):
        if part == "neurons" and block.ffn_width:
            taps.on_input(block.get("ffn_out"), partial(feed, ("neurons", index)))
        elif part == "heads" and block.num_heads:
            taps.on_input(block.get("attention_out"), partial(vectors, index, block.head_width))
        elif part == "hidden":
            # the inputs of a block's matrices, which are normalised in every family
            for part_read in (block.readers("attention")[0], block.readers("ffn")[0]):
                taps.on_input(block.get(part_read), partial(feed, ("hidden", 0)))


def _tap_blocks(taps: Taps, criterion: Criterion, means: _Means) -> None:
    def take(index: int, before: Tensor, after: Tensor) -> None:
        values = criterion.function(taps.tokens(before), taps.tokens(after))
        means.add(("layers", index), values.double().sum()[None], len(values))

    for index, module in enumerate(anatomy_of(taps.model).block_list):
        taps.on_block(module, partial(take, index))


def _tap_attention(taps: Taps, criterion: Criterion, means: _Means) -> None:
    anatomy = anatomy_of(taps.model)

    def take(index: int, heads: int, causal: bool, heard: Heard) -> None:
        summed = criterion.function(heard.probabilities(), taps.mask, causal=causal)
        # a unit is a key head with its queries
        of_units = summed[:, :-1].unflatten(1, (heads, -1)).mean(dim=-1)
        means.add(("heads", index), of_units.sum(dim=0), float(summed[:, -1].sum()))

    for index, block in enumerate(anatomy.blocks):
        if block.num_heads:
            taps.on_attention(block, partial(take, index, block.num_heads, anatomy.causal or block.looks_back))


def _summed_columns(model: PreTrainedModel, criterion: Criterion, key: tuple[Part, int], norm: Tensor) -> Tensor:
    part, index = key
    block = anatomy_of(model).blocks[index]
    module = block.get("attention_out" if part == "heads" else "ffn_out")
    columns = criterion.function(weight_view(module).detach().cpu(), norm).double().sum(dim=0)
    return columns.unflatten(0, (-1, block.head_width)).sum(dim=-1) if part == "heads" else columns
