"""The order in which units are cut, and the mask after n steps."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lmcompress.pruning.structured.costs import CostModel, ModelSizes, secant_costs
from lmcompress.pruning.structured.units import PARTS, Part, Units

Ranking = Literal["global", "per_layer", "isomorphic", "relative"]

RANKINGS: tuple[Ranking, ...] = get_args(Ranking)

Order = Literal["score", "cost"]

ORDERS: tuple[Order, ...] = get_args(Order)

KEEP_AT_LEAST: dict[Part, int] = {"heads": 1, "neurons": 1, "attention": 0, "ffn": 0, "layers": 1, "hidden": 1}
"""Minimum number of units kept of each part: heads and neurons of every block, others of the model."""

# parts whose units have equal costs in one place, so that the lowest score there always goes first
_ALIKE: tuple[Part, ...] = ("heads", "neurons", "hidden")

# rounds in which order="cost" goes through the layers
_ROUNDS = 10

NEVER = torch.iinfo(torch.long).max


@dataclass
class Groups:
    """Groups of units that are cut together, all lists concatenated, in each list the lowest score first.

    Attributes:
        members: for each tensor of the scores, the group number of each unit; -1 for units that always stay, -2
            for pruned ones.
        part: part of each group, as a number in PARTS.
        source: number of the tensor of each group.
        value: score per cost of each group.
        mean: for each tensor, the mean score per cost of the remaining units.
        share: position of each group in its tensor's list, after the pruned ones, in (0, 1].
        totals: number of groups of each part, by its number in PARTS, including fixed and pruned ones.
        gone: number of pruned groups of each part.
        costs: for each tensor, its total cost.
    """

    members: list[Tensor]
    part: Tensor
    source: Tensor
    value: Tensor
    mean: Tensor
    share: Tensor
    totals: Tensor
    gone: Tensor
    costs: list[float]


def group_units(
    scores: Units,
    left: Units,
    sizes: ModelSizes,
    cost: CostModel,
    together: Mapping[Part, int],
    keep: Mapping[Part, int],
) -> Groups:
    """Group units that are cut together.

    Args:
        scores: scores of the units.
        left: bool, False if a unit is pruned already.
        sizes: sizes of the model.
        cost: cost by which scores are divided.
        together: size of the groups, by part; 1 where it is left out.
        keep: minimum number of units of each part.
    """
    members: list[Tensor] = []
    parts: list[Tensor] = []
    sources: list[Tensor] = []
    values: list[Tensor] = []
    shares: list[Tensor] = []
    overall: list[Tensor] = []
    costs: list[float] = []
    totals, behind = torch.zeros(len(PARTS)), torch.zeros(len(PARTS))
    start = 0
    slopes = secant_costs(sizes, cost, scores.parts())
    for number, ((part, _, tensor), (_, _, unit_costs), (_, _, there)) in enumerate(
        zip(scores.items(), slopes.items(), left.items(), strict=True)
    ):
        costs.append(float(unit_costs.sum()))
        size = together.get(part, 1)
        places = there.nonzero().flatten()
        per_cost = (tensor.detach().cpu().double() / unit_costs)[places]
        by_score = per_cost.argsort(stable=True)
        # the first group is the small one: the remaining count is a multiple
        first = len(places) % size
        index = torch.empty(len(places), dtype=torch.long)
        index[by_score] = (torch.arange(len(places)) - first).div(size, rounding_mode="floor") + (first > 0)
        count, every = -(-len(places) // size), -(-len(tensor) // size)
        removable = max(0, len(places) - keep[part])
        # groups that would go below the minimum are kept
        ends = torch.bincount(index, minlength=count).cumsum(0)
        free = int((ends <= removable).sum())
        means = torch.zeros(count, dtype=torch.float64).scatter_reduce_(0, index, per_cost, "mean", include_self=False)
        group = torch.full((len(tensor),), -2)
        group[places] = torch.where(index < free, index + start, -1)
        members.append(group)
        parts.append(torch.full((free,), PARTS.index(part)))
        sources.append(torch.full((free,), number))
        values.append(means[:free])
        overall.append(per_cost.mean() if len(per_cost) else per_cost.sum())
        shares.append(torch.arange(1 + every - count, 1 + every - count + free, dtype=torch.float64) / max(every, 1))
        totals[PARTS.index(part)] += every
        behind[PARTS.index(part)] += every - count
        start += free
    lists = {"part": parts, "source": sources, "value": values, "share": shares}
    joined = {name: torch.cat(tensors) for name, tensors in lists.items()}
    return Groups(members=members, totals=totals, gone=behind, costs=costs, mean=torch.stack(overall), **joined)


def steps_of(groups: Groups, ranking: Ranking, order: Order) -> Tensor:
    """Step at which each group is cut, from 0.

    Args:
        groups: from :func:`group_units`.
        ranking: scope of the comparison.
        order: by score, or sub-layer by sub-layer by cost.
    """
    if order == "cost":
        costs = torch.tensor(groups.costs, dtype=torch.float64)
        rank = torch.empty_like(costs)
        rank[costs.argsort(descending=True, stable=True)] = torch.arange(len(costs), dtype=torch.float64)
        rounds = (groups.share * _ROUNDS - 1e-9).floor()
        # within a round and a sub-layer, the lowest score first
        return _positions(rounds * len(costs) + rank[groups.source] + groups.share / 2)
    if ranking == "global":
        return _positions(groups.value)
    if ranking == "relative":
        return _positions(groups.value / groups.mean.clamp_min(torch.finfo(torch.float64).tiny)[groups.source])
    if ranking == "per_layer":
        # groups at the same place in their lists are cut together, or the first blocks would lose more
        return torch.unique(groups.share.round(decimals=12), return_inverse=True)[1]
    share = torch.zeros_like(groups.value)
    for part in groups.part.unique():
        of_part = groups.part == part
        before = groups.gone[part] + 1
        share[of_part] = (_positions(groups.value[of_part]).double() + before) / groups.totals[part]
    return _positions(share)


def uniform_steps(groups: Groups, ranking: Ranking, *, heads_with_hidden: bool) -> Tensor:
    """Step at which each group is cut, from 0, if every block is to have as many units as the others.

    The n-th lowest group of a part is cut from all blocks at once, by the mean over blocks.

    Args:
        groups: from :func:`group_units`, with as many groups of a part in each block.
        ranking: scope of the comparison; ``per_layer`` and ``isomorphic``, by which each part loses the same share, are
            the same here.
        heads_with_hidden: whether the n-th group of hidden dimensions goes with the n-th heads.
    """
    part = groups.part.clone()
    if heads_with_hidden:
        part[part == PARTS.index("hidden")] = PARTS.index("heads")
    # within a part, the share of a group is its place in every block
    places = torch.stack([part.double(), groups.share.round(decimals=12)], dim=1)
    found, joint = torch.unique(places, dim=0, return_inverse=True)
    value = groups.value
    if ranking in ("per_layer", "isomorphic"):
        value = groups.share
    elif ranking == "relative":
        value = value / groups.mean.clamp_min(torch.finfo(torch.float64).tiny)[groups.source]
    means = torch.zeros(len(found), dtype=torch.float64).scatter_reduce_(0, joint, value, "mean", include_self=False)
    return _positions(means)[joint]


def _positions(keys: Tensor) -> Tensor:
    positions = torch.empty(len(keys), dtype=torch.long)
    positions[keys.argsort(stable=True)] = torch.arange(len(keys))
    return positions


class Plan:
    """The order in which groups are cut, and the mask after n steps."""

    def __init__(self, scores: Units, groups: Groups, steps: Tensor) -> None:
        self.last = int(steps.max()) if len(steps) else -1
        self._scores = scores
        self._alike = [part in _ALIKE for part, _, _ in scores.items()]
        # pruned groups come before everything; fixed ones are never cut; both are read from the end
        extended = torch.cat([steps, torch.tensor([-1, NEVER])])
        self._when = [extended[members] for members in groups.members]

    def mask(self, step: int) -> Units:
        """The remaining units once everything before ``step`` is cut."""
        return self._build([when >= step for when in self._when])

    def without(self, step: int) -> Plan:
        """The same order, in which the group at ``step`` always stays, and better ones of its kind with it."""
        other = copy.copy(self)
        other._when = [
            torch.where(when >= step if alike and bool((when == step).any()) else when == step, NEVER, when)
            for when, alike in zip(self._when, self._alike, strict=True)
        ]
        return other

    def with_step(self, mask: Units, step: int) -> Units | None:
        """The mask with the group at ``step`` restored; None if a better one of its kind would still be pruned."""
        tensors = []
        for (_, _, kept), when, alike in zip(mask.items(), self._when, self._alike, strict=True):
            back = when == step
            if alike and bool(back.any()) and not bool(kept[when > step].all()):
                return None
            tensors.append(kept | back)
        return self._build(tensors)

    def _build(self, tensors: list[Tensor]) -> Units:
        left = iter(tensors)
        return self._scores.map(lambda _: next(left))
