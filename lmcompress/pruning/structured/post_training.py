"""Structured pruning without training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from transformers import PreTrainedModel

from lmcompress.activations.batches import Batch, batches_for
from lmcompress.activations.calibration import on_device
from lmcompress.errors import LmcompressError
from lmcompress.families import inner_model
from lmcompress.model import CompressedModel, unwrapped
from lmcompress.pruning.structured.config import PruningConfig
from lmcompress.pruning.structured.costs import CostModel, ModelSizes
from lmcompress.pruning.structured.finishing import Finish
from lmcompress.pruning.structured.gates import Gates
from lmcompress.pruning.structured.goals import choose, feasible, goal_of, partial_target
from lmcompress.pruning.structured.report import PruningReport
from lmcompress.pruning.structured.scoring import calibrated
from lmcompress.pruning.structured.surgery import refuse_quantized
from lmcompress.pruning.structured.units import Units
from lmcompress.schedules import Iterative


def prune(
    model: PreTrainedModel | CompressedModel,
    config: PruningConfig,
    batches: Iterable[Batch] | None = None,
    *,
    cost: CostModel | None = None,
    progress: bool = False,
    before_cut: Callable[[PreTrainedModel], object] | None = None,
) -> PruningReport:
    """Score, choose, optionally repair, and cut, without training: the schedules one_shot and iterative.

    With ``iterative``, each round scores the model with the pruned units masked. The model changes only at the end:
    any error leaves it as it was, except for a repair.

    Args:
        model: cut in place.
        config: the configuration; shares of training in its schedule are ignored.
        batches: calibration data, with labels if the criterion needs them; none for criteria of weights only. Any form
            that :func:`~lmcompress.activations.batches.as_batches` takes: batches, a ``DataLoader``, a ``Dataset``.
        cost: a latency table, for a latency target.
        progress: whether to show a bar while scoring.
        before_cut: called with the masked model before it is cut, for example to keep its outputs for the round-trip
            check of :meth:`~lmcompress.model.CompressedModel.save_pretrained`.

    Returns:
        The result.

    Raises:
        LmcompressError: If the schedule needs training, no shape meets the target, the model is quantized by another
            library, the criterion is a custom one without a name, or as
            :func:`~lmcompress.pruning.structured.scoring.score`.
        EquivalenceError: If the outputs of the cut model differ from the masked one's.
    """
    inner = inner_model(unwrapped(model))
    if config.trains:
        raise LmcompressError(
            f"the schedule {config.schedule.kind} needs training: use PruningTrainer, or choose one_shot or iterative"
        )
    refuse_quantized(inner)
    started = time.perf_counter()
    data = [] if batches is None else [on_device(batch, inner.device) for batch in batches_for(inner, batches)]
    sizes, end = ModelSizes.of(inner), Finish(inner, config)
    goal = goal_of(config.target, sizes, cost)
    feasible(config, sizes, cost)
    mask: Units | None = None
    rounds = config.schedule.rounds if isinstance(config.schedule, Iterative) else 1
    with Gates(inner, config.parts) as gates:
        for number in range(1, rounds + 1):
            target = partial_target(config.target, number / rounds, sizes, goal)
            if target is None:
                continue
            scores = calibrated(inner, config, data, progress=progress)
            new = choose(config, scores, sizes, target, cost=cost, gone=mask)
            if number == rounds:
                # of the dense model: units pruned in earlier rounds are compensated too
                gates.set(new.map(lambda tensor: torch.ones(len(tensor))))
                end.repair(new, data)
            mask = new
            gates.set(mask)
        if mask is None:
            raise LmcompressError(f"a schedule must have at least one round that prunes something, got {rounds}")
        if before_cut is not None:
            before_cut(inner)
        values = mask.map(lambda tensor: tensor.float())
        return end.cut(gates, values, mask, data, goal, time.perf_counter() - started)
