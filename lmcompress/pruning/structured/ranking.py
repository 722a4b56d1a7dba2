"""From scores to a mask: the number of units to cut, and their places."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lmcompress.checkpoint.structure import why_not_vanilla
from lmcompress.errors import LmcompressError, nearest
from lmcompress.families import family_of
from lmcompress.pruning.structured.costs import CostModel, ModelSizes
from lmcompress.pruning.structured.order import (
    KEEP_AT_LEAST,
    ORDERS,
    RANKINGS,
    Order,
    Plan,
    Ranking,
    group_units,
    steps_of,
    uniform_steps,
)
from lmcompress.pruning.structured.targets import Shape, Target, counted_in
from lmcompress.pruning.structured.units import PARTS, Part, Units, check_units, masked_structure, unit_shapes

# this many of the last cuts are retried one by one if the last group was a large one
_PUT_BACK = 200
# a budget is met when at most this share of it is left, and large groups are
# avoided at most this number of times
_NEAR, _TRIES = 0.04, 16


def select(
    scores: Units,
    sizes: ModelSizes,
    target: Target,
    *,
    ranking: Ranking = "global",
    order: Order = "score",
    multiple_of: int = 1,
    uniform: bool = False,
    keep_at_least: Mapping[Part, int] | None = None,
    cost: CostModel | None = None,
    gone: Units | None = None,
) -> Units:
    """The mask that meets a target by cutting the units with the lowest scores.

    - ``ranking="global"``: all units in one list by score per cost. A part whose scores have a different scale from
      another's (heads and neurons under :func:`~lmcompress.pruning.structured.criteria.apoz`) is then cut first as a
      whole.
    - ``"per_layer"``: the same share of every block, for widths that stay even.
    - ``"isomorphic"``: units are compared only with their kind, heads with heads and neurons with neurons, in all
      blocks; each part loses the same share. Fang et al. 2024, https://arxiv.org/abs/2407.04616.
    - ``"relative"``: all units in one list, by score over the mean of its kind in its block (over all, for parts that
      have one number per block), so that scales and costs of blocks and parts do not matter. For scores that do not
      add up to a change of the loss; torch-pruning (Fang et al. 2023, https://arxiv.org/abs/2301.12900)
      ranks globally in this way.

    With ``order="cost"`` the sub-layers take turns in ten rounds, the costliest first, each losing a tenth of
    its units per round until the target is met, so that costly ones lose more: the order of Yang et al. 2017, section
        3.

    Args:
        scores: scores of the parts that may be cut; higher ones are kept longer.
        sizes: sizes of the scored model.
        target: the target.
        ranking: scope of the comparison.
        order: by score, or sub-layer by sub-layer by cost.
        multiple_of: group size of neurons and hidden dimensions: counts that change are multiples of it.
        uniform: whether every block loses as many units of a part, its own lowest ones, so that a stock config
            expresses the shape. Where a stock config derives the size of a head from the hidden size, heads and hidden
            dimensions are cut together.
        keep_at_least: minimum number of units of each part, overriding :data:`KEEP_AT_LEAST`.
        cost: cost that scores are divided by, and that a latency target is read from; a
            :class:`~lmcompress.pruning.structured.latency.LatencyTable` then. Default: the target's own unit.
        gone: mask of an earlier round, of the same parts: units that are False there are never in the result, and
            count as cut in every share.

    Returns:
        A bool mask of the parts that have scores; True is kept. Its cost is at most the target's. If the last group is
        so large (a block, say) that the target would be missed by more than 4 %, it is kept and smaller ones are cut
        instead, if there are any; ``per_layer`` keeps its even widths instead.

    Raises:
        LmcompressError: If no shape meets the target (the message gives the lowest cost that can be reached), the model
            already meets it, a latency target has no table, scores do not fit the model's shapes or are NaN, an
            argument is out of range, or with ``uniform`` the blocks differ already or no shape that meets the target is
            expressible in a stock config.
    """
    _check(scores, sizes, ranking, order, multiple_of, keep_at_least)
    keep = {**KEEP_AT_LEAST, **(keep_at_least or {})}
    left = _left(scores, sizes, gone)
    if target.shape is not None:
        return _select_shape(scores.zip(left, _last), sizes, target.shape)
    counted, budget, describe = _budget(target, sizes, cost)
    together: dict[Part, int] = {"neurons": multiple_of, "hidden": multiple_of}
    if uniform:
        _check_uniform(scores, left, order)
        keep |= {"heads": max(1, keep["heads"]), "neurons": max(1, keep["neurons"])}
        together |= _heads_with_hidden(scores, sizes, multiple_of)
    groups = group_units(scores, left, sizes, cost or counted, together, keep)
    steps = (
        uniform_steps(groups, ranking, heads_with_hidden="heads" in together)
        if uniform
        else steps_of(groups, ranking, order)
    )
    plan = Plan(scores, groups, steps)
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
            f"the model already meets the target {target.kind}={getattr(target, target.kind)}: nothing would be cut"
        )
    if ranking == "per_layer" and order == "score" and not uniform:
        return plan.mask(low)
    nearer, step = _around_large_pieces(plan, low, reached, budget)
    mask = _put_back(nearer.mask(step), nearer, step, lambda tried: reached(tried) <= budget)
    # the nearer plan keeps some pieces for good, and may have no such shape: the plain one has more
    return _expressible(mask, [(nearer, step), (plan, low)], sizes) if uniform else mask


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
                    f"block {block}: use another ranking than relative"
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


def _check_uniform(scores: Units, left: Units, order: str) -> None:
    """Refuse what cannot have as many units in every block."""
    if order != "score":
        raise LmcompressError(
            f"uniform cuts all blocks at once, so the order must be 'score', got {order!r}, which takes them in turn"
        )
    for part in scores.parts():
        if part in ("attention", "ffn"):
            raise LmcompressError(
                f"uniform blocks have both sub-layers, so {part} must have no scores: cut heads, neurons, layers or "
                "hidden dimensions"
            )
        counts = [int(tensor.sum()) for tensor in left.tensors(part)]
        if len(set(counts)) > 1:
            raise LmcompressError(
                f"uniform needs blocks that are alike to begin with, got {counts} {part}; cut the model without it"
            )


def _heads_with_hidden(scores: Units, sizes: ModelSizes, multiple_of: int) -> dict[Part, int]:
    """Groups of whole heads and as many hidden dimensions, where a stock config has no size of a head of its own."""
    if scores.heads is None or scores.hidden is None or family_of(sizes.config).head_size:
        return {}
    width = sizes.structure.head_width
    dimensions = math.lcm(width, multiple_of)
    return {"heads": dimensions // width, "hidden": dimensions}


def _expressible(mask: Units, plans: Sequence[tuple[Plan, int]], sizes: ModelSizes) -> Units:
    """The mask, or the first one of the plans, from these steps on, whose shapes a stock config can express."""

    def obstacle(tried: Units) -> str | None:
        return why_not_vanilla(masked_structure(sizes.structure, tried), sizes.config)

    if (first := obstacle(mask)) is None:
        return mask
    for plan, start in plans:
        for step in range(start, plan.last + 2):
            if obstacle(tried := plan.mask(step)) is None:
                return tried
    raise LmcompressError(
        f"no uniform shape that meets the target has a stock config: {first}. Leave out the part that it names, or "
        "give the target as a shape"
    )


def _budget(
    target: Target, sizes: ModelSizes, cost: CostModel | None
) -> tuple[CostModel, float, Callable[[float], str]]:
    """The cost that the target is counted in, its budget, and a formatter for messages."""
    counted = counted_in(target, sizes, cost)
    dense = counted.cost(sizes.structure)
    if target.latency_ms is not None:
        return counted, target.latency_ms, lambda value: f"{value:.4g} ms"
    if target.parameters is not None:
        return counted, target.parameters, lambda value: f"{value:.0f} parameters"
    if target.sparsity is not None:
        # a small tolerance: 1 - 0.9 is not 0.1
        budget = (1 - target.sparsity) * dense * (1 + 1e-9)
        return counted, budget, lambda value: f"a sparsity of {1 - value / dense:.4f}"
    share = target.flops_share or target.latency_share or 0.0
    return counted, share * dense, lambda value: f"a share of {value / dense:.4f} ({value:.4g} {counted.unit})"


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
    """Scores in which pruned units are the lowest."""
    return scores.detach().cpu().double().masked_fill(~left, float("-inf"))


def _first_step(plan: Plan, fits: Callable[[Units], bool]) -> int:
    """The smallest number of steps after which the mask fits; costs fall from step to step."""
    low, high = 0, plan.last + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(plan.mask(middle)) else (middle + 1, high)
    return low


def _around_large_pieces(plan: Plan, low: int, reached: Callable[[Units], float], budget: float) -> tuple[Plan, int]:
    """If the last group was so large that the budget is undershot, keep it and continue with smaller ones."""
    best = reached(plan.mask(low)), plan, low
    for _ in range(_TRIES):
        # pruned units come before the first step
        if best[0] >= (1 - _NEAR) * budget or low == 0:
            break
        plan = plan.without(low - 1)
        if reached(plan.mask(plan.last + 1)) > budget:
            break
        low = _first_step(plan, lambda mask: reached(mask) <= budget)
        if (cost := reached(plan.mask(low))) > best[0]:
            best = cost, plan, low
    return best[1], best[2]


def _put_back(mask: Units, plan: Plan, step: int, fits: Callable[[Units], bool]) -> Units:
    """Restore, the best first, the units whose cut the last and largest group made unnecessary."""
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
                f"the target shape names {part}, so scores of them are needed, got those of "
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
                f"the target shape must name {part} for each of the {len(staying)} remaining layers, got {len(each)}"
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
        raise LmcompressError("the model already has the target shape: nothing would be cut")
    return mask


def _top(scores: Tensor, count: int, what: str) -> Tensor:
    if count > len(scores):
        raise LmcompressError(f"the target shape must have at most the {len(scores)} {what} there are, got {count}")
    mask = torch.zeros(len(scores), dtype=torch.bool)
    # among equals the last is cut, as in torch's stable sort
    mask[scores.detach().cpu().double().argsort(descending=True, stable=True)[:count]] = True
    return mask
