"""From scores to a mask: how much to cut, and where."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from transformers import PretrainedConfig

from lmcompress.checkpoint.config import BlockShape, Structure
from lmcompress.checkpoint.structure import why_not_vanilla
from lmcompress.errors import LmcompressError, nearest
from lmcompress.families import config_value, family_of
from lmcompress.pruning.structured.costs import CostModel, FlopCost, LatencyTable, ModelSizes, ParameterCost
from lmcompress.pruning.structured.units import PARTS, Part, Units, check_units, masked_structure, unit_shapes

Ranking = Literal["global", "per_layer", "isomorphic", "relative"]
RANKINGS: tuple[Ranking, ...] = get_args(Ranking)
Order = Literal["score", "cost"]
ORDERS: tuple[Order, ...] = get_args(Order)

KEEP_AT_LEAST: dict[Part, int] = {"heads": 1, "neurons": 1, "attention": 0, "ffn": 0, "layers": 1, "hidden": 1}
"""Units of each part that always stay: heads and neurons of every block, of the others in the model."""

# of what is cut last, so much is tried again one by one, where the last piece was a large one
_PUT_BACK = 200
# parts whose units cost the same in one place, so that there the least score always goes first
_ALIKE: tuple[Part, ...] = ("heads", "neurons", "hidden")
# a budget is met well enough when no more than this share of it is left, and large pieces are gone around so many times
_NEAR, _TRIES = 0.04, 16
# rounds in which order="cost" goes through the layers
_ROUNDS = 10
_NEVER = torch.iinfo(torch.long).max


class Shape(BaseModel):
    """A shape to be reached; what is not named stays as it is.

    Attributes:
        layers: number of blocks.
        heads: of every block, or of each block that stays, in order.
        ffn: neurons of every block, or of each block that stays, in order.
        hidden: width of the residual stream.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: Annotated[int, Field(ge=1)] | None = None
    heads: Annotated[int, Field(ge=0)] | tuple[Annotated[int, Field(ge=0)], ...] | None = None
    ffn: Annotated[int, Field(ge=0)] | tuple[Annotated[int, Field(ge=0)], ...] | None = None
    hidden: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _names_something(self) -> Shape:
        if self == Shape.model_construct():
            raise ValueError("a shape must name at least one of layers, heads, ffn, hidden; got none")
        return self


class Target(BaseModel):
    """How much to prune: exactly one of these.

    Attributes:
        sparsity: share of the parameters of the blocks that goes; embeddings do not count, as since CoFi.
        parameters: of the whole model, at most.
        flops_share: share of the blocks' floating-point operations that stays, at most.
        latency_share: share of the model's time that stays, at most, by a table measured on this machine.
        latency_ms: time of one forward pass, at most, by the same table.
        shape: the shape itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sparsity: Annotated[float, Field(gt=0, lt=1)] | None = None
    parameters: Annotated[int, Field(ge=1)] | None = None
    flops_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    latency_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    latency_ms: Annotated[float, Field(gt=0)] | None = None
    shape: Shape | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Target:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            names = ", ".join(type(self).model_fields)
            raise ValueError(f"a target must be exactly one of {names}, got {' and '.join(given) or 'none'}")
        return self

    @property
    def kind(self) -> str:
        """Name of the one that is given."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)


@dataclass(frozen=True)
class StockVerdict:
    """Whether a shape loads with stock Transformers, without lmcompress.

    Attributes:
        loads: whether it does.
        reason: why not, in one clause; None if it does.
        nearest: the shape with the least more that would; the shape itself if it does.
    """

    loads: bool
    reason: str | None
    nearest: Structure


def select(
    scores: Units,
    sizes: ModelSizes,
    target: Target,
    *,
    ranking: Ranking = "global",
    order: Order = "score",
    multiple_of: int = 1,
    keep_at_least: Mapping[Part, int] | None = None,
    cost: CostModel | None = None,
    gone: Units | None = None,
) -> Units:
    """The mask that meets a target by cutting the units of the least score.

    - ``ranking="global"``: all units in one list by score per cost. A part whose scores are of another scale than
      another's (heads beside neurons under :func:`~lmcompress.pruning.structured.criteria.apoz`) then goes first as a
      whole.
    - ``"per_layer"``: the same share of every block, for widths that stay even.
    - ``"isomorphic"``: units are compared with their like only, heads with heads and neurons with neurons, in all
      blocks; each part loses the same share. Fang et al. 2024, https://arxiv.org/abs/2407.04616.
    - ``"relative"``: all units in one list, by score over the mean of its like in its block (over all, of parts that
      have one number per block), so that neither scales nor costs of blocks and parts count. For scores that do not
      add up to a change of the loss; it is how torch-pruning (Fang et al. 2023, https://arxiv.org/abs/2301.12900)
      ranks globally.

    With ``order="cost"`` the sub-layers are gone through in ten rounds, the most costly first, each losing a tenth of
    its units a round until the target is met, so that costly ones lose more: the order of Yang et al. 2017, section 3.

    Args:
        scores: of the parts that may be cut; greater stays longer.
        sizes: of the model that was scored.
        target: how much.
        ranking: what is compared with what.
        order: by score, or sub-layer by sub-layer by cost.
        multiple_of: neurons and hidden dimensions go in groups so that counts which change are multiples of this.
        keep_at_least: units of each part that stay, over :data:`KEEP_AT_LEAST`.
        cost: that scores are divided by, and that a latency target is read from; a
            :class:`~lmcompress.pruning.structured.costs.LatencyTable` then. Default: what the target is counted in.
        gone: a mask of an earlier round, of the same parts: units that are False there are never in the result, and
            count in every share as cut already.

    Returns:
        A bool mask of the parts that have scores; True stays. Its cost is at most the target's. Where the last piece is
        so large (a block, say) that the target would be missed by more than 4 %, it stays and smaller ones go in its
        place, if there are any; ``per_layer`` keeps its even widths instead.

    Raises:
        LmcompressError: no shape meets the target (the message says the least that can be reached), the model meets it
            already, a latency target without a table, scores that are not of the model's shapes or are NaN, or an
            argument out of range.
    """
    _check(scores, sizes, ranking, order, multiple_of, keep_at_least)
    keep = {**KEEP_AT_LEAST, **(keep_at_least or {})}
    left = _left(scores, sizes, gone)
    if target.shape is not None:
        return _select_shape(scores.zip(left, _last), sizes, target.shape)
    counted, budget, describe = _budget(target, sizes, cost)
    groups = _groups(scores, left, sizes, cost or counted, multiple_of, keep)
    steps = _steps(groups, ranking, order)
    plan = _Plan(scores, groups, steps)
    structure = sizes.structure

    def reached(mask: Units) -> float:
        return counted.cost(masked_structure(structure, mask))

    least = reached(plan.mask(plan.last + 1))
    if least > budget:
        raise LmcompressError(
            f"no shape meets the target {target.kind}={getattr(target, target.kind)}: the least that can be reached is "
            f"{describe(least)}, by cutting all of {', '.join(scores.parts())} down to {_floor(scores, keep)}. "
            "Ask for less, score more parts, or lower keep_at_least"
        )
    low = _first_step(plan, lambda mask: reached(mask) <= budget)
    if low == 0 and gone is None:
        raise LmcompressError(
            f"the model meets the target {target.kind}={getattr(target, target.kind)} as it is: nothing would be cut"
        )
    if ranking == "per_layer" and order == "score":
        return plan.mask(low)
    plan, low = _around_large_pieces(plan, low, reached, budget)
    return _put_back(plan.mask(low), plan, low, lambda tried: reached(tried) <= budget)


def stock_verdict(structure: Structure, config: PretrainedConfig) -> StockVerdict:
    """Whether stock Transformers will load a model of these shapes; to be asked before training.

    Args:
        structure: the shapes wanted.
        config: the stock config of the model that is to be cut.
    """
    family = family_of(config)
    hidden = structure.hidden or int(config_value(config, family, "hidden_size"))
    reason = why_not_vanilla(structure, config)
    if reason is None:
        return StockVerdict(True, None, structure)
    # a stock config has hidden / heads as the size of a head, so the width goes up to a whole number of heads
    heads = -(-hidden // structure.head_size)
    width = max(1, *(block.ffn for block in structure.blocks))
    blocks = tuple(BlockShape(heads=heads, ffn=width, source=block.source) for block in structure.blocks)
    wider = heads * structure.head_size if structure.hidden is not None else None
    return StockVerdict(False, reason, Structure(head_size=structure.head_size, blocks=blocks, hidden=wider))


def _check(
    scores: Units,
    sizes: ModelSizes,
    ranking: str,
    order: str,
    multiple_of: int,
    keep_at_least: Mapping[Part, int] | None,
) -> None:
    if not scores.parts():
        raise LmcompressError("scores must have at least one part, got none: nothing could be cut")
    check_units(scores, unit_shapes(sizes.structure, sizes.hidden), "scores")
    for part, block, tensor in scores.items():
        if not bool(tensor.isfinite().all()):
            raise LmcompressError(f"scores of {part} in block {block} must be finite, got {tensor[~tensor.isfinite()]}")
    if ranking not in RANKINGS:
        raise LmcompressError(f"unknown ranking {ranking!r}{nearest(ranking, RANKINGS)}")
    if ranking == "relative":
        for part, block, tensor in scores.items():
            if bool((tensor < 0).any()):
                raise LmcompressError(
                    f"scores must be >= 0 to be compared with their mean, got {float(tensor.min()):.4g} for {part} in "
                    f"block {block}: take another ranking than relative"
                )
    if order not in ORDERS:
        raise LmcompressError(f"unknown order {order!r}{nearest(order, ORDERS)}")
    if multiple_of < 1:
        raise LmcompressError(f"multiple_of must be >= 1, got {multiple_of}")
    for part, count in (keep_at_least or {}).items():
        if part not in PARTS:
            raise LmcompressError(f"keep_at_least has the unknown part {part!r}{nearest(part, PARTS)}")
        least = 1 if part in ("layers", "hidden") else 0
        if count < least:
            raise LmcompressError(f"keep_at_least of {part} must be >= {least}, got {count}; no model has fewer")


def _budget(
    target: Target, sizes: ModelSizes, cost: CostModel | None
) -> tuple[CostModel, float, Callable[[float], str]]:
    """What the target is counted in, how much of it may stay, and the same for a message."""
    if target.kind in ("latency_share", "latency_ms"):
        if not isinstance(cost, LatencyTable):
            raise LmcompressError(
                f"{target.kind} must come with cost=, a LatencyTable measured on this machine, got {cost!r}; make one "
                "with measure_latency, or aim at flops_share"
            )
        dense = cost.cost(sizes.structure)
        if target.latency_ms is not None:
            return cost, target.latency_ms, lambda value: f"{value:.4g} ms"
        assert target.latency_share is not None
        return cost, target.latency_share * dense, lambda value: f"a share of {value / dense:.4f} ({value:.4g} ms)"
    if target.flops_share is not None:
        # what the caller divides by may know batch and length; the share is of that
        flops = cost if isinstance(cost, FlopCost) else FlopCost(sizes)
        dense = flops.cost(sizes.structure)
        return flops, target.flops_share * dense, lambda value: f"a share of {value / dense:.4f}"
    if target.parameters is not None:
        return ParameterCost(sizes, "whole"), target.parameters, lambda value: f"{value:.0f} parameters"
    assert target.sparsity is not None
    encoder = ParameterCost(sizes)
    dense = encoder.cost(sizes.structure)
    # a hair of tolerance: 1 - 0.9 is not 0.1
    return encoder, (1 - target.sparsity) * dense * (1 + 1e-9), lambda v: f"a sparsity of {1 - v / dense:.4f}"


def secant_costs(sizes: ModelSizes, cost: CostModel, parts: Collection[Part]) -> Units:
    """What each unit saves on the mean when all of its kind in its place go: its slope between all and none.

    Not the saving of the one unit: on a measured table that is often nothing, where the steps of the hardware are
    coarser, and a unit that saves nothing would never go. Of hidden dimensions, the slope between all and half.

    Args:
        sizes: of the model.
        cost: any.
        parts: which units.

    Returns:
        float64 on the CPU, never 0.
    """
    structure = sizes.structure
    dense = cost.cost(structure)
    shapes = unit_shapes(structure, sizes.hidden)

    def saved(**changes: Any) -> float:
        return dense - cost.cost(structure.model_copy(update=changes))

    def without(index: int, name: str) -> float:
        changed = structure.blocks[index].model_copy(update={name: 0})
        return saved(blocks=(*structure.blocks[:index], changed, *structure.blocks[index + 1 :]))

    def filled(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).clamp_min(1e-12 * max(dense, 1e-12))

    found: dict[Part, Tensor | tuple[Tensor, ...]] = {}
    for part in parts:
        counts = shapes[part]
        name = "heads" if part in ("heads", "attention") else "ffn"
        if part in ("heads", "neurons"):
            found[part] = tuple(filled([without(i, name) / max(1, n)] * n) for i, n in enumerate(counts))
        elif part == "hidden":
            half = max(1, counts[0] // 2)
            # a table of latencies cannot answer, and says so
            found[part] = filled([saved(hidden=half) / max(1, counts[0] - half)] * counts[0])
        elif part == "layers":
            single = counts[0] == 1
            blocks = structure.blocks
            found[part] = filled(
                [dense if single else saved(blocks=blocks[:i] + blocks[i + 1 :]) for i in range(counts[0])]
            )
        else:
            found[part] = filled([without(i, name) for i in range(counts[0])])
    return Units().updated(**found)


def _left(scores: Units, sizes: ModelSizes, gone: Units | None) -> Units:
    """A mask of the scores' parts, True where a unit can still be cut."""
    if gone is None:
        return scores.map(lambda tensor: torch.ones(len(tensor), dtype=torch.bool))
    check_units(gone, unit_shapes(sizes.structure, sizes.hidden), "gone")
    if gone.parts() != scores.parts() or any(tensor.dtype != torch.bool for _, _, tensor in gone.items()):
        raise LmcompressError(
            f"gone must be a bool mask of the parts that have scores, {', '.join(scores.parts())}, got one of "
            f"{', '.join(gone.parts()) or 'none'}"
        )
    return gone.map(Tensor.cpu)


def _last(scores: Tensor, left: Tensor) -> Tensor:
    """Scores in which those that are gone already are the least."""
    return scores.detach().cpu().double().masked_fill(~left, float("-inf"))


@dataclass
class _Groups:
    """Units that are cut together, all lists one after another, in each list the least score first.

    Attributes:
        members: for each tensor of the scores, the number of the group of each unit; -1 for one that always stays, -2
            for one that is gone already.
        part: of each group, as a number in PARTS.
        source: number of the tensor that each group is of.
        value: score per cost of each group.
        mean: for each tensor, the mean score per cost of what is not gone.
        share: position of each group in its tensor's list, those that are gone already before it, in (0, 1].
        totals: groups of each part, by its number in PARTS, those that always stay and those that are gone too.
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


def _groups(
    scores: Units, left: Units, sizes: ModelSizes, cost: CostModel, multiple_of: int, keep: Mapping[Part, int]
) -> _Groups:
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
    return _Groups(members=members, totals=totals, gone=behind, costs=costs, mean=torch.stack(overall), **joined)


def _steps(groups: _Groups, ranking: Ranking, order: Order) -> Tensor:
    """When each group goes: 0 is first."""
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


class _Plan:
    """The order in which groups go, and the mask after so many steps."""

    def __init__(self, scores: Units, groups: _Groups, steps: Tensor) -> None:
        self.last = int(steps.max()) if len(steps) else -1
        self._scores = scores
        self._alike = [part in _ALIKE for part, _, _ in scores.items()]
        # those that are gone went before everything; those that always stay never go; both are read from the end
        extended = torch.cat([steps, torch.tensor([-1, _NEVER])])
        self._when = [extended[members] for members in groups.members]

    def mask(self, step: int) -> Units:
        """What stays when everything before ``step`` has gone."""
        return self._build([when >= step for when in self._when])

    def without(self, step: int) -> _Plan:
        """The same order, in which what goes at ``step`` always stays, and what is alike and better with it."""
        other = copy.copy(self)
        other._when = [
            torch.where(when >= step if alike and bool((when == step).any()) else when == step, _NEVER, when)
            for when, alike in zip(self._when, self._alike, strict=True)
        ]
        return other

    def with_step(self, mask: Units, step: int) -> Units | None:
        """The mask with what goes at ``step`` put back; None where something alike and better would still be gone."""
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


def _first_step(plan: _Plan, fits: Callable[[Units], bool]) -> int:
    """The least number of steps after which the mask fits; costs fall from step to step."""
    low, high = 0, plan.last + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(plan.mask(middle)) else (middle + 1, high)
    return low


def _around_large_pieces(plan: _Plan, low: int, reached: Callable[[Units], float], budget: float) -> tuple[_Plan, int]:
    """Where the last piece was so large that the budget is missed from below, keep it and go on with smaller ones."""
    best = reached(plan.mask(low)), plan, low
    for _ in range(_TRIES):
        # before the first step lies what is gone already
        if best[0] >= (1 - _NEAR) * budget or low == 0:
            break
        plan = plan.without(low - 1)
        if reached(plan.mask(plan.last + 1)) > budget:
            break
        low = _first_step(plan, lambda mask: reached(mask) <= budget)
        if (cost := reached(plan.mask(low))) > best[0]:
            best = cost, plan, low
    return best[1], best[2]


def _put_back(mask: Units, plan: _Plan, step: int, fits: Callable[[Units], bool]) -> Units:
    """Give back, the best first, what the last and largest piece made unnecessary to cut."""
    for earlier in range(step - 2, max(-1, step - 2 - _PUT_BACK), -1):
        tried = plan.with_step(mask, earlier)
        if tried is not None and fits(tried):
            mask = tried
    return mask


def _floor(scores: Units, keep: Mapping[Part, int]) -> str:
    return ", ".join(f"{keep[part]} {part}" for part in scores.parts())


def _select_shape(scores: Units, sizes: ModelSizes, shape: Shape) -> Units:
    structure = sizes.structure
    asked: dict[Part, object] = {
        "layers": shape.layers,
        "heads": shape.heads,
        "neurons": shape.ffn,
        "hidden": shape.hidden,
    }
    for part, wanted in asked.items():
        if wanted is not None and getattr(scores, part) is None:
            raise LmcompressError(
                f"the target shape names {part}, so there must be scores of them, got those of "
                f"{', '.join(scores.parts())}; score that part too"
            )
    layers = torch.ones(len(structure.blocks), dtype=torch.bool)
    if shape.layers is not None and scores.layers is not None:
        layers = _top(scores.layers, shape.layers, "layers")
    staying = layers.nonzero().flatten().tolist()
    parts: dict[str, Tensor | tuple[Tensor, ...]] = {}
    for part, counts in (("heads", shape.heads), ("neurons", shape.ffn)):
        tensors: tuple[Tensor, ...] | None = getattr(scores, part)
        if tensors is None or counts is None:
            continue
        each = (counts,) * len(staying) if isinstance(counts, int) else counts
        if len(each) != len(staying):
            raise LmcompressError(
                f"the target shape must name {part} for each of the {len(staying)} layers that stay, got {len(each)}"
            )
        wanted_of = dict(zip(staying, each, strict=True))
        parts[part] = tuple(
            _top(tensor, wanted_of.get(index, len(tensor)), f"{part} in block {index}")
            for index, tensor in enumerate(tensors)
        )
    if shape.layers is not None:
        parts["layers"] = layers
    if shape.hidden is not None and scores.hidden is not None:
        parts["hidden"] = _top(scores.hidden, shape.hidden, "hidden dimensions")
    mask = Units().updated(**parts)
    if all(bool(tensor.all()) for _, _, tensor in mask.items()):
        raise LmcompressError("the model has the target shape already: nothing would be cut")
    return mask


def _top(scores: Tensor, count: int, what: str) -> Tensor:
    if count > len(scores):
        raise LmcompressError(f"the target shape must have at most the {len(scores)} {what} there are, got {count}")
    mask = torch.zeros(len(scores), dtype=torch.bool)
    # the last of equals goes, as in torch's stable sort
    mask[scores.detach().cpu().double().argsort(descending=True, stable=True)[:count]] = True
    return mask
