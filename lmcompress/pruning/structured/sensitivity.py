"""Sensitivity: the quality lost when one block loses a share of its heads, or of its neurons."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmcompress.activations.batches import as_batches
from lmcompress.activations.calibration import CalibrationData
from lmcompress.activations.hooks import model_inputs
from lmcompress.activations.running import evaluating, with_progress
from lmcompress.errors import LmcompressError, argument
from lmcompress.pruning.structured.gates import Gates
from lmcompress.pruning.structured.objectives import label_objective
from lmcompress.pruning.structured.units import Part, Units, full
from lmcompress.pruning.unstructured.scoring import Batch

Evaluate = Callable[[PreTrainedModel], float]
"""From a model to one number, such as an accuracy or a loss."""


@dataclass(frozen=True)
class SensitivityRow:
    """One measurement.

    Attributes:
        part: ``heads`` or ``neurons``; ``none`` is the unpruned model.
        block: from 0; -1 for the unpruned model.
        share: requested share of the block's units to remove.
        removed: number of units removed.
        units: number of units of the block.
        quality: result of ``evaluate``.
    """

    part: str
    block: int
    share: float
    removed: int
    units: int
    quality: float

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON types."""
        return asdict(self)


def sensitivity(
    model: PreTrainedModel,
    scores: Units,
    evaluate: Evaluate,
    *,
    shares: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    progress: bool = False,
) -> list[SensitivityRow]:
    """Quality against the share removed, one block at a time, heads and neurons separately.

    Nothing is cut: the units with the lowest scores are gated, and the gates are removed afterwards.

    Args:
        model: a model of a known family.
        scores: scores of ``heads``, ``neurons`` or both; other parts are ignored.
        evaluate: called with the model once for each row; :func:`mean_loss` creates one from batches.
        shares: shares of a block's units, each in (0, 1].
        progress: whether to show a bar, on a terminal.

    Returns:
        First the unpruned model, then a row for each part, block and share. Shares that round to the same number of
        units are measured once.

    Raises:
        LmcompressError: If there are no shares or some are out of range, or there are no scores of heads or neurons.

    Reference:
        Li, Kadav, Durdanovic, Samet & Graf, *Pruning Filters for Efficient ConvNets*, ICLR 2017,
        https://arxiv.org/abs/1608.08710, section 3.2.
    """
    if not shares or not all(0 < share <= 1 for share in shares):
        raise LmcompressError(f"{argument('shares')} must be in (0, 1] and at least one, got {list(shares)}")
    parts: list[Part] = [part for part in scores.parts() if part in ("heads", "neurons")]
    if not parts:
        raise LmcompressError(
            f"sensitivity must have scores of heads or neurons, got {', '.join(scores.parts()) or 'none'}"
        )
    kept = full(model, parts)
    plan = [(part, block, tensor, share) for part, block, tensor in scores.items() if part in parts for share in shares]
    rows = [SensitivityRow("none", -1, 0.0, 0, 0, float(evaluate(model)))]
    measured: dict[tuple[str, int, int], float] = {(part, block, 0): rows[0].quality for part, block, _, _ in plan}
    with Gates(model, parts) as gates:
        for part, block, tensor, share in with_progress(plan, "sensitivity", enabled=progress):
            removed = round(share * len(tensor))
            if (part, block, removed) not in measured:
                gates.set(_without(kept, part, block, tensor, removed))
                measured[part, block, removed] = float(evaluate(model))
            rows.append(SensitivityRow(part, block, share, removed, len(tensor), measured[part, block, removed]))
    return rows


def mean_loss(batches: Iterable[Batch]) -> Evaluate:
    """A function that returns a model's mean loss over the examples of some batches.

    Args:
        batches: with labels, or those of a causal language model.

    Returns:
        A function from a model to its loss; lower is better.

    Raises:
        LmcompressError: If the batches have no labels; when called.
    """
    data = as_batches(batches)

    def evaluate(model: PreTrainedModel) -> float:
        total, count = 0.0, 0.0
        with evaluating(model):
            for batch in CalibrationData(model, data):
                objective = label_objective(model, model(**model_inputs(model, batch)), batch)
                counts = objective.weight > 0
                total += float(objective.loss[counts].double().sum())
                count += float(counts.sum())
        if not count:
            raise LmcompressError("batches must have labels that count, got only -100")
        return total / count

    return evaluate


def _without(kept: Units, part: Part, block: int, scores: Tensor, removed: int) -> Units:
    tensors = list(kept.tensors(part))
    mask = torch.ones(len(scores), dtype=torch.bool)
    mask[scores.detach().cpu().argsort(stable=True)[:removed]] = False
    tensors[block] = mask
    return kept.updated(**{part: tuple(tensors)})
