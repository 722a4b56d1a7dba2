"""Importance scores of units: a criterion applied to a model and calibration data."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmcompress.activations.calibration import Batch, CalibrationData
from lmcompress.activations.running import evaluating
from lmcompress.checkpoint.structure import structure_of
from lmcompress.errors import LmcompressError, nearest
from lmcompress.families import anatomy_of
from lmcompress.families.refusal import refuse_unproven
from lmcompress.pruning.structured import criteria
from lmcompress.pruning.structured.by_activations import from_activations
from lmcompress.pruning.structured.by_gradients import from_gradients
from lmcompress.pruning.structured.by_weights import from_weights
from lmcompress.pruning.structured.config import PruningConfig
from lmcompress.pruning.structured.objectives import Labels
from lmcompress.pruning.structured.registry import CRITERIA, Criterion, criteria_for
from lmcompress.pruning.structured.units import PARTS, PER_BLOCK, Part, Units, check_units, full, unit_shapes

# scores that differ by less, relative to the largest, differ by rounding only
_EQUAL = 1e-6


def score(
    model: PreTrainedModel,
    criterion: Criterion | str,
    parts: Collection[Part],
    batches: Iterable[Batch] | None = None,
    *,
    labels: Labels = "given",
    seed: int = 0,
    progress: bool = False,
) -> Units:
    """Importance scores of a model's units, one number per unit.

    Absolute values and squares are taken for each example, and means over examples or valid tokens: the scores are
    independent of batches and padding. The model runs in evaluation mode and is left
    unchanged.

    Args:
        model: a model of a known family, on any device.
        criterion: a name in :data:`~lmcompress.pruning.structured.registry.CRITERIA`, ``module:attribute`` of a custom
            one, or a :class:`~lmcompress.pruning.structured.registry.Criterion`.
        parts: units to score.
        batches: calibration data; not needed if the criterion uses only weights.
        labels: for criteria with gradients, ``given`` uses those of the batches (a causal language model without any
            uses its text), ``self`` samples them from the model's own predictions, see
            :func:`~lmcompress.pruning.structured.objectives.own_objectives`; that works for regression too.
        seed: seed of the sampling.
        progress: whether to show a bar, on a terminal, if the number of batches is known.

    Returns:
        Float32 on the CPU, in the requested parts; higher is more important.

    Raises:
        LmcompressError: If criterion or part are unknown, or do not go together; there are no calibration data, tokens
            or labels; a criterion of your own fails; the model's own labels are requested with a criterion whose sign
            matters; scores are of other shapes, NaN or infinite (the message names the block), or all equal in a part,
            which would prune at random.
    """
    chosen = CRITERIA.resolve(criterion)
    _check_request(chosen, parts, batches, labels)
    refuse_unproven(model, "scores", *parts)
    wanted: tuple[Part, ...] = tuple(part for part in PARTS if part in parts)
    if chosen.needs == "nothing":
        generator = torch.Generator().manual_seed(seed)
        # a control with equal scores would be one with no units
        return full(model, wanted, 0.0, torch.float32).map(lambda units: chosen.function(len(units), generator))
    try:
        if chosen.needs == "weights":
            scores = from_weights(model, chosen, wanted)
        else:
            data = CalibrationData(model, batches if batches is not None else (), progress)
            with evaluating(model):
                if chosen.by_gradients:
                    scores = from_gradients(model, chosen, wanted, data, labels, seed)
                else:
                    scores = from_activations(model, chosen, wanted, data)
    except Exception as error:
        if isinstance(error, LmcompressError) or chosen in CRITERIA.values():
            raise
        raise LmcompressError(f"the criterion {chosen.name!r} fails: {type(error).__name__}: {error}") from error
    check_units(scores, unit_shapes(structure_of(model), anatomy_of(model).hidden_size), f"scores by {chosen.name}")
    check_scores(scores, chosen.name)
    return scores


def calibrated(
    model: PreTrainedModel, config: PruningConfig, batches: Iterable[Batch], *, progress: bool = False
) -> Units:
    """Scores as configured.

    Args:
        model: a model of a known family.
        config: criterion, parts, labels and seed.
        batches: calibration data.
        progress: as for :func:`score`.

    Raises:
        LmcompressError: As :func:`score`.
    """
    criterion = config.chosen_criterion
    return score(model, criterion, config.parts, batches, labels=config.labels, seed=config.seed, progress=progress)


def normalized(scores: Units) -> Units:
    """Scores of heads and neurons over their Euclidean norm in their block, as in Michel et al.

    Args:
        scores: scores of any parts; the other parts are unchanged.
    """
    changed: dict[str, tuple[Tensor, ...]] = {}
    for part in PER_BLOCK:
        if tensors := scores.tensors(part):
            changed[part] = tuple(criteria.normalize_by_layer(tensor) for tensor in tensors)
    return scores.updated(**changed)


def check_scores(scores: Units, name: str) -> None:
    """Refuse scores without information.

    Args:
        scores: scores of any parts.
        name: name of the criterion in the message.

    Raises:
        LmcompressError: If a score is NaN or infinite, or all scores of a part are equal, zero for example.
    """
    for part, block, tensor in scores.items():
        bad = ~tensor.isfinite()
        if bool(bad.any()):
            where = f"{part} in block {block}" if part in PER_BLOCK else f"{part}, number {int(bad.nonzero()[0])}"
            raise LmcompressError(
                f"scores must be finite, got {float(tensor[bad][0])} from {name} for {where} ({int(bad.sum())} of "
                f"{len(tensor)}): the model overflows there; score it in float32, or look for NaN in its weights"
            )
    for part in scores.parts():
        values = torch.cat([tensor.double() for tensor in scores.tensors(part)])
        if len(values) and not bool(values.any()):
            raise LmcompressError(
                f"scores must differ, got zero from {name} for all {len(values)} {part}: they would be pruned at "
                "random. Nothing in the loss depends on them; are the labels right, or is the head detached?"
            )
        if len(values) > 1 and float(values.max() - values.min()) <= _EQUAL * float(values.abs().max()):
            raise LmcompressError(
                f"scores must differ, got {float(values[0]):.4g} from {name} for all {len(values)} {part}: they would "
                "be pruned at random; use another criterion, or more calibration data"
            )


def _check_request(criterion: Criterion, parts: Collection[Part], batches: Iterable[Batch] | None, labels: str) -> None:
    if not parts:
        raise LmcompressError(f"parts must name at least one of {', '.join(PARTS)}, got none")
    for part in parts:
        if part not in PARTS:
            raise LmcompressError(f"unknown part {part!r}{nearest(part, PARTS)}")
        if part not in criterion.parts:
            raise LmcompressError(
                f"{criterion.name} scores {', '.join(criterion.parts)}, got {part}; criteria for {part} are "
                f"{criteria_for([part])}"
            )
    if labels not in get_args(Labels):
        raise LmcompressError(f"labels must be given or self, got {labels!r}{nearest(labels, get_args(Labels))}")
    if criterion.needs_data and batches is None:
        raise LmcompressError(f"{criterion.name} must have calibration data, got batches=None; l1 and l2 need none")
    if criterion.signed and labels == "self":
        raise LmcompressError(
            f"{criterion.name} must have given labels, got labels='self': it adds gradients with their signs, and over "
            "labels sampled from the model's own predictions these cancel; use taylor_gates or fisher"
        )
