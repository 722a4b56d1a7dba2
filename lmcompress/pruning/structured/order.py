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
"""Units of each part that always stay: heads and neurons of every block, of the others in the model."""

# parts whose units cost the same in one place, so that there the least score always goes first
_ALIKE: tuple[Part, ...] = ("heads", "neurons", "hidden")

# rounds in which order="cost" goes through the layers
_ROUNDS = 10

NEVER = torch.iinfo(torch.long).max


@dataclass
class Groups:
    """Units that are cut together, all lists one after another, in each list the least score first.

    Attributes:
        members: for each tensor of the scores, the number of the group of each unit; -1 for one that always stays, -2
            for one that is pruned already.
        part: of each group, as a number in PARTS.
        source: number of the tensor that each group is of.
        value: score per cost of each group.
        mean: for each tensor, the mean score per cost of what is not pruned.
        share: position of each group in its tensor's list, those that are pruned already before it, in (0, 1].
        totals: groups of each part, by its number in PARTS, those that always stay and those that are pruned too.
        gone: groups of each part that are gone already.
        costs: for each tensor, the cost of all of it.
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
    scores: Units, left: Units, sizes: ModelSizes, cost: CostModel, multiple_of: int, keep: Mapping[Part, int]
) -> Groups:
    """Put units that are cut together into groups.

    Args:
        scores: of the units.
        left: bool, False where a unit is pruned already.
        sizes: of the model.
        cost: that scores are divided by.
        multiple_of: size of the groups of neurons and hidden dimensions.
        keep: units of each part that always stay.
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
        size = multiple_of if part in ("neurons", "hidden") else 1
        places = there.nonzero().flatten()
        per_cost = (tensor.detach().cpu().double() / unit_costs)[places]
        by_score = per_cost.argsort(stable=True)
        # the first group is the small one: what stays after it is a multiple
        first = len(places) % size
        index = torch.empty(len(places), dtype=torch.long)
        index[by_score] = (torch.arange(len(places)) - first).div(size, rounding_mode="floor") + (first > 0)
        count, every = -(-len(places) // size), -(-len(tensor) // size)
        removable = max(0, len(places) - keep[part])
        # groups that would go below what must stay are left alone
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
        groups: of :func:`group_units`.
        ranking: what is compared with what.
        order: by score, or sub-layer by sub-layer by cost.
    """
    if order == "cost":
        costs = torch.tensor(groups.costs, dtype=torch.float64)
        rank = torch.empty_like(costs)
        rank[costs.argsort(descending=True, stable=True)] = torch.arange(len(costs), dtype=torch.float64)
        rounds = (groups.share * _ROUNDS - 1e-9).floor()
        # within a round and a sub-layer, the least score first
        return _positions(rounds * len(costs) + rank[groups.source] + groups.share / 2)
    if ranking == "global":
        return _positions(groups.value)
    if ranking == "relative":
        return _positions(groups.value / groups.mean.clamp_min(torch.finfo(torch.float64).tiny)[groups.source])
    if ranking == "per_layer":
        # what has the same place in its list goes at the same time, or the first blocks would lose more
        return torch.unique(groups.share.round(decimals=12), return_inverse=True)[1]
    share = torch.zeros_like(groups.value)
    for part in groups.part.unique():
        of_part = groups.part == part
        before = groups.gone[part] + 1
        share[of_part] = (_positions(groups.value[of_part]).double() + before) / groups.totals[part]
    return _positions(share)


def _positions(keys: Tensor) -> Tensor:
    positions = torch.empty(len(keys), dtype=torch.long)
    positions[keys.argsort(stable=True)] = torch.arange(len(keys))
    return positions


class Plan:
    """The order in which groups go, and the mask after n steps."""

    def __init__(self, scores: Units, groups: Groups, steps: Tensor) -> None:
        self.last = int(steps.max()) if len(steps) else -1
        self._scores = scores
        self._alike = [part in _ALIKE for part, _, _ in scores.items()]
        # those that are pruned went before everything; those that always stay never go; both are read from the end
        extended = torch.cat([steps, torch.tensor([-1, NEVER])])
        self._when = [extended[members] for members in groups.members]

    def mask(self, step: int) -> Units:
        """What stays when everything before ``step`` has gone."""
        return self._build([when >= step for when in self._when])

    def without(self, step: int) -> Plan:
        """The same order, in which what goes at ``step`` always stays, and what is alike and better with it."""
        other = copy.copy(self)
        other._when = [
            torch.where(when >= step if alike and bool((when == step).any()) else when == step, NEVER, when)
            for when, alike in zip(self._when, self._alike, strict=True)
        ]
        return other

    def with_step(self, mask: Units, step: int) -> Units | None:
        """The mask with what goes at ``step`` put back; None where something alike and better would still be pruned."""
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
