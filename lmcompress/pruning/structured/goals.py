"""Targets as numbers: the cost counted, the share to remove, intermediate targets, and the mask that meets one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmcompress.checkpoint.schema import BlockShape, Structure
from lmcompress.checkpoint.structure import why_not_vanilla
from lmcompress.errors import LmcompressError
from lmcompress.pruning.structured.config import PruningConfig
from lmcompress.pruning.structured.costs import CostModel, ModelSizes, ParameterCost, secant_costs
from lmcompress.pruning.structured.learned import UnitCosts
from lmcompress.pruning.structured.ranking import select
from lmcompress.pruning.structured.targets import Shape, Target, counted_in
from lmcompress.pruning.structured.units import Part, Units, masked_structure, unit_shapes


@dataclass(frozen=True)
class Goal:
    """The cost a target is counted in, and the share to remove.

    Attributes:
        counted: the cost model.
        dense: cost of the unpruned model.
        removed: share of it to remove, in (0, 1).
    """

    counted: CostModel
    dense: float
    removed: float

    def share_removed(self, structure: Structure) -> float:
        """Share of the cost that a structure saves.

        Args:
            structure: a structure cut from the model's.
        """
        return 1 - self.counted.cost(structure) / self.dense


def goal_of(target: Target, sizes: ModelSizes, cost: CostModel | None = None) -> Goal:
    """A target as a share of a cost.

    Args:
        target: a target; a shape is counted in parameters of the blocks.
        sizes: sizes of the model.
        cost: a latency table for latency targets; FLOPs at a given batch size and length.

    Returns:
        The goal.

    Raises:
        LmcompressError: If a latency target has no table, or the model already meets the target.
    """
    structure = sizes.structure
    counted = counted_in(target, sizes, cost)
    dense = counted.cost(structure)
    if target.sparsity is not None:
        removed = target.sparsity
    elif target.shape is not None:
        named = _parts_of(target.shape)
        mask = select(_in_order(sizes, named), sizes, target)
        removed = 1 - counted.cost(masked_structure(structure, mask)) / dense
    elif target.flops_share is not None or target.latency_share is not None:
        removed = 1 - (target.flops_share or target.latency_share or 0.0)
    else:
        removed = 1 - (target.parameters or target.latency_ms or 0.0) / dense
    if removed <= 0:
        raise LmcompressError(
            f"the model already meets the target {target.kind}={getattr(target, target.kind)} ({dense:.6g} "
            f"{counted.unit}): nothing would be cut"
        )
    return Goal(counted, dense, removed)


def partial_target(target: Target, share: float, sizes: ModelSizes, goal: Goal) -> Target | None:
    """An intermediate target.

    Args:
        target: the final target.
        share: share of the way, in (0, 1]; 1 returns the target itself.
        sizes: sizes of the model before pruning.
        goal: goal of the target.

    Returns:
        Of the same kind; None if it is so near to the beginning that nothing would be cut. For a shape, layers and
        quantities that depend on their number come last, in one step.

    Raises:
        LmcompressError: If ``share`` is outside (0, 1].
    """
    if not 0 < share <= 1:
        raise LmcompressError(f"the share of the way to a target must be in (0, 1], got {share}")
    if share == 1:
        return target
    removed = share * goal.removed
    if target.sparsity is not None:
        return Target(sparsity=removed)
    if target.flops_share is not None:
        return Target(flops_share=1 - removed)
    if target.latency_share is not None:
        return Target(latency_share=1 - removed)
    if target.latency_ms is not None:
        return Target(latency_ms=goal.dense * (1 - removed))
    if target.parameters is not None:
        return Target(parameters=int(goal.dense * (1 - removed)))
    assert target.shape is not None
    return _partial_shape(target.shape, share, sizes)


def expected_costs(sizes: ModelSizes, cost: CostModel) -> UnitCosts:
    """The cost of units, for the expectation over gates: exact for parameters, slopes between all and none otherwise.

    Args:
        sizes: sizes of the model.
        cost: a cost model.

    Returns:
        On the CPU, float32.
    """
    structure, width = sizes.structure, sizes.hidden
    count = len(structure.blocks)
    if isinstance(cost, ParameterCost):
        per_head, head_fixed = (torch.full((count,), float(number)) for number in sizes.head)
        per_neuron, neuron_fixed = (torch.full((count,), float(number)) for number in sizes.neuron)
        return UnitCosts(
            per_head, head_fixed, per_neuron, neuron_fixed, torch.full((count,), float(sizes.block_vectors)), width
        )
    parts: tuple[Part, ...] = ("heads", "neurons") if count == 1 else ("heads", "neurons", "layers")
    slopes = secant_costs(sizes, cost, parts)
    heads = torch.stack([t.mean() if len(t) else t.new_zeros(()) for t in slopes.tensors("heads")])
    neurons = torch.stack([t.mean() if len(t) else t.new_zeros(()) for t in slopes.tensors("neurons")])
    sublayers = torch.tensor([float(heads[i] * b.heads + neurons[i] * b.ffn) for i, b in enumerate(structure.blocks)])
    rest = torch.zeros(count) if slopes.layers is None else (slopes.layers.float() - sublayers).clamp(min=0)
    none = torch.zeros(count)
    return UnitCosts(heads.float() / width, none, neurons.float() / width, none, rest / width, width)


def choose(
    config: PruningConfig,
    scores: Units,
    sizes: ModelSizes,
    target: Target,
    *,
    cost: CostModel | None = None,
    gone: Units | None = None,
    per_cost: bool = True,
) -> Units:
    """The mask that meets a target; pruned units stay pruned.

    Args:
        config: configuration with ranking, order, multiples and minimum counts.
        scores: scores of the units; higher ones are kept longer.
        sizes: sizes of the model before pruning.
        target: the target.
        cost: a latency table for latency targets.
        gone: a mask whose False units must not be reactivated.
        per_cost: whether scores are divided by cost (criteria), or used as they are (probabilities).

    Returns:
        A bool mask on the CPU.

    Raises:
        LmcompressError: As :func:`~lmcompress.pruning.structured.ranking.select`, or if all scores are equal.
    """
    scores = scores.map(lambda tensor: tensor.detach().double().cpu())
    _refuse_constant(scores, zeros=not per_cost)
    if not per_cost:
        # the divisor used by select
        counted = cost or goal_of(target, sizes, cost).counted
        scores = scores.zip(secant_costs(sizes, counted, scores.parts()), torch.mul)
    mask = select(
        scores,
        sizes,
        target,
        ranking=config.ranking,
        order=config.order,
        multiple_of=config.multiple_of,
        uniform=config.uniform,
        keep_at_least=config.keep_at_least,
        cost=cost,
        gone=gone,
    )
    full = scores.map(lambda tensor: torch.ones(len(tensor), dtype=torch.bool))
    # a shape names some parts only; the others stay
    return full.updated(**{part: getattr(mask, part) for part in mask.parts()})


def along_chains(open_probability: Units) -> Units:
    """Probabilities that units count at all: each times those of its sub-layer and its layer.

    Args:
        open_probability: probability of each gate alone.

    Returns:
        The products, in the same parts.
    """
    layers = open_probability.tensors("layers")
    attention, ffn = open_probability.tensors("attention"), open_probability.tensors("ffn")
    heads, neurons = open_probability.tensors("heads"), open_probability.tensors("neurons")
    result: dict[str, Any] = {}
    for part, tensors, outer in (("heads", heads, (layers, attention)), ("neurons", neurons, (layers, ffn))):
        if tensors:
            result[part] = tuple(_times(tensor, [o[0][i] for o in outer if o]) for i, tensor in enumerate(tensors))
    for part, own in (("attention", attention), ("ffn", ffn)):
        if own:
            result[part] = own[0] * layers[0] if layers else own[0]
    return open_probability.updated(**result)


def feasible(config: PruningConfig, sizes: ModelSizes, cost: CostModel | None = None) -> Structure:
    """Refuse a target that no shape can meet, before any long work.

    Args:
        config: configuration with the target.
        sizes: sizes of the model.
        cost: a latency table for latency targets.

    Returns:
        A shape that meets it (the choice of units is another question).

    Raises:
        LmcompressError: If no shape meets the target, the model already meets it, or a uniform shape has no stock
            config.
    """
    mask = choose(config, _in_order(sizes, config.parts), sizes, config.target, cost=cost, per_cost=False)
    structure = masked_structure(sizes.structure, mask)
    if config.uniform and (reason := why_not_vanilla(structure, sizes.config)) is not None:
        raise LmcompressError(f"uniform: true needs a target that a stock config can express: {reason}")
    return structure


def _times(tensor: Tensor, factors: list[Tensor]) -> Tensor:
    for factor in factors:
        tensor = tensor * factor
    return tensor


def _in_order(sizes: ModelSizes, parts: tuple[Part, ...]) -> Units:
    """Distinct scores without preference."""
    shapes = unit_shapes(sizes.structure, sizes.hidden)
    state = {
        (f"{part}.{i}" if part in ("heads", "neurons") else part): (torch.arange(n, dtype=torch.float64) + 1) / (n + 1)
        for part in parts
        for i, n in enumerate(shapes[part])
    }
    return Units.from_state_dict(state)


def _parts_of(shape: Shape) -> tuple[Part, ...]:
    named: dict[Part, object] = {
        "heads": shape.heads, "neurons": shape.ffn, "layers": shape.layers, "hidden": shape.hidden
    }  # fmt: skip
    return tuple(part for part, wanted in named.items() if wanted is not None)


def _partial_shape(shape: Shape, share: float, sizes: ModelSizes) -> Target | None:
    blocks = sizes.structure.blocks

    def between(counts: int | tuple[int, ...] | None, read: Callable[[BlockShape], int]) -> tuple[int, ...] | None:
        if counts is None or (shape.layers is not None and isinstance(counts, tuple)):
            return None
        each = (counts,) * len(blocks) if isinstance(counts, int) else counts
        # a block with fewer already keeps what it has: only the final target reports an error
        return tuple(read(b) - round(share * max(0, read(b) - n)) for b, n in zip(blocks, each, strict=True))

    heads, ffn = between(shape.heads, lambda block: block.heads), between(shape.ffn, lambda block: block.ffn)
    hidden = None if shape.hidden is None else sizes.hidden - round(share * (sizes.hidden - shape.hidden))
    unchanged = (
        (heads is None or heads == tuple(block.heads for block in blocks))
        and (ffn is None or ffn == tuple(block.ffn for block in blocks))
        and hidden in (None, sizes.hidden)
    )
    return None if unchanged else Target(shape=Shape(heads=heads, ffn=ffn, hidden=hidden))


def _refuse_constant(scores: Units, *, zeros: bool) -> None:
    for part in scores.parts():
        joined = torch.cat(scores.tensors(part))
        if zeros and not bool(joined.any()):
            continue  # the group lasso has removed all of them
        if len(joined) > 1 and bool((joined == joined[0]).all()):
            raise LmcompressError(
                f"scores of {part} must differ, all {len(joined)} are {float(joined[0]):.4g}: they would prune at "
                "random. Usual causes: a learning rate of 0, too few steps before the first pruning, or a frozen model"
            )
